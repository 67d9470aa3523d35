"""Launching Triton kernels on the device of their tensors, and the arithmetic of grids."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run kernel[grid](*args, **options) on the device of the first argument, a tensor."""
    first = args[0]
    assert isinstance(first, Tensor)
    with _on_device(first):
        kernel[grid](*args, **options)


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def cdiv(number: int, divisor: int) -> int:
    """Divide and round up. Triton's own takes longer than the rest of a launcher's arithmetic."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()
