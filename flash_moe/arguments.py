"""Checks of arguments of public functions and layers, with errors that name the argument.

`flash_moe.ops.input_checks` checks whether the tensors given to the expert op fit together.
"""

import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_int(name: str, value: object, minimum: int) -> int:
    """Return an integer of Python, NumPy or torch as an int.

    Raises:
        TypeError: `value` is no integer, or a bool.
        ValueError: it is less than `minimum`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def checked_number(name: str, value: object, minimum: float) -> float:
    """Return a number of Python, NumPy or torch, also as a tensor of shape (), as a float.

    The host waits for a tensor on a GPU.

    Raises:
        TypeError: `value` is no number, or a bool.
        ValueError: it is less than `minimum`, or not a number in floating point.
    """
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not number >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def checked_path(name: str, value: object) -> Path:
    """Return a str or path object as a Path; raise TypeError for anything else."""
    check_type(name, value, str, os.PathLike)
    return Path(value)  # type: ignore[arg-type]


def check_type(name: str, value: object, *types: type) -> None:
    """Raise TypeError unless `value` is an instance of one of `types`."""
    if not isinstance(value, types):
        expected = " or ".join(one.__name__ for one in types)
        raise TypeError(f"{name} must be of type {expected}, got {type(value).__name__}")


def checked_device(name: str, value: object) -> torch.device:
    """Return a device, its name, or the number of a GPU as a torch.device.

    Raises:
        TypeError: `value` is none of these.
        ValueError: PyTorch knows no device of that name.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a device, got {value}")
    check_type(name, value, torch.device, str, int)
    try:
        return torch.device(value)  # type: ignore[call-overload]
    except RuntimeError as error:
        raise ValueError(f"{name} must be a device such as cpu or cuda:0, got {value!r}") from error


def check_parameter_device(device: torch.device | str | None) -> None:
    """Raise as `checked_device` unless layers can have parameters there; None: the default one."""
    if device is not None:
        checked_device("device", device)


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless layers can have parameters of that dtype; None: the default one."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be None or one of {dtype_names(FLOAT_DTYPES)}, got {dtype!r}")


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """List dtypes without the name of the package."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensors_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """List one tensor or several; raise TypeError for anything else."""
    expected = "parameters must be tensors, as model.parameters() gives them"
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"{expected}, got {type(parameters).__name__}")
    tensors = list(parameters)
    for one in tensors:
        if not isinstance(one, Tensor):
            raise TypeError(f"{expected}, got {type(one).__name__} among them")
    return tensors


def check_dense(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor that is neither sparse nor nested."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def is_plain(value: object) -> bool:
    """Whether `value` is a tensor but not sparse, nested or a DTensor: one that can be reshaped."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        # By name, since this package does not import torch.distributed.
        and type(value).__name__ != "DTensor"
    )


def check_fits(hidden_states: Tensor, layer: nn.Module) -> None:
    """Raise unless `layer`, if it is linear, can multiply `hidden_states`.

    Raises:
        TypeError: their dtypes differ, and torch.autocast does not cast both to one.
        ValueError: they are on different devices.
    """
    if not isinstance(layer, nn.Linear):
        return
    weight = layer.weight
    if hidden_states.device != weight.device:
        raise ValueError(
            f"hidden_states must be on {weight.device}, where the layer's parameters are, "
            f"got {hidden_states.device}"
        )
    dtypes = (hidden_states.dtype, weight.dtype)
    device_type = hidden_states.device.type
    is_cast = (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and all(dtype.is_floating_point and dtype != torch.float64 for dtype in dtypes)
    )
    if hidden_states.dtype != weight.dtype and not is_cast:
        raise TypeError(
            f"hidden_states must have the dtype of the layer's parameters, {weight.dtype}, "
            "unless torch.autocast casts both (it casts all floats but float64), "
            f"got {hidden_states.dtype}"
        )
