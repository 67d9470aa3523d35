"""Fresh memory holds NaN, so that an element nobody wrote shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors


def poison_fresh_memory() -> None:
    """Make torch.empty and its kin return NaN, or the least integer, from now on."""
    # `with torch.device(...)` goes by a list made once of the functions themselves.
    _device_constructors()
    torch.empty = _poisoned(torch.empty)
    torch.empty_like = _poisoned(torch.empty_like)
    torch.empty_strided = _poisoned(torch.empty_strided)
    torch.Tensor.new_empty = _poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return poisoned
