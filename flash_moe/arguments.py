"""Checks of single arguments by type and range, with errors that name the argument.

Whether tensors fit together: `flash_moe.ops.input_checks`.
"""

import operator
import os
from numbers import Real
from pathlib import Path

import torch

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
    """Return a number of Python or NumPy as a float.

    Raises:
        TypeError: `value` is no number, or a bool.
        ValueError: it is less than `minimum`, or not a number in floating point.
    """
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


def check_parameter_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless layers can have parameters of that dtype; None: the default one."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be None or one of {dtype_names(FLOAT_DTYPES)}, got {dtype!r}")


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """List dtypes without the name of the package."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
