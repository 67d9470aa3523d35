"""Buffers that keep their precision when a model is converted to a narrower dtype."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WideBuffers(nn.Module):
    """Module whose buffers `.to`, `.bfloat16()` and the like convert to no narrower dtype.

    accumulators: names of attributes, tensors that follow the module to its device and are neither
        saved nor broadcast as buffers are.
    """

    accumulators: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideBuffers":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        device = None
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is None or after is None:
                continue
            device = after.device
            if after.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(device)
        for name in self.accumulators:
            value: Tensor = getattr(self, name)
            moved = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
            setattr(self, name, moved)
        return self
