"""Starting Triton kernels with little work on the host, and where a tensor is.

Triton's own launch takes about as long as a small kernel runs: it binds arguments by name, looks
at each, and builds a text to find the compiled kernel by. Here the compiled kernel is remembered
under the few properties that Triton compiles differently for.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Scalar = int | float
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | Scalar,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """kernel[grid](*args, **constants) on the device of the first argument.

    Args:
        args: all but the kernel's constants, which come after them in its signature.
    """
    first = args[0]
    assert isinstance(first, Tensor)
    if not first.is_cuda:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    with on_device(first):
        key = (
            kernel,
            first.device.index,
            num_warps,
            num_stages,
            *constants.values(),
            *[_compiled_for(arg) for arg in args],
        )
        known = _compiled.get(key)
        if known is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = kernel[grid](*args, **constants, **options)
            names = kernel.arg_names[len(args) :]
            _compiled[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*args, *values)


def _compiled_for(arg: Tensor | Scalar) -> Any:
    """What of an argument Triton compiles differently for."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    return float


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
