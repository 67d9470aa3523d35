"""Buffers that hold statistics of tokens, and what keeps them right during training."""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StatisticsModule(nn.Module):
    """Module whose buffers are never converted to a narrower dtype, as by `model.bfloat16()`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatisticsModule":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(after.device)
        return self


class UpdatedAfterSteps(nn.Module):
    """Module whose `after_optimizer_step` is called at the end of each step of any optimizer.

    Modules are called in the order in which they were made, so that ranks can communicate in it.
    """

    def __init__(self) -> None:
        super().__init__()
        _note(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _note(self)

    def after_optimizer_step(self) -> None:
        """Update buffers, from what the forward passes since the last step have added up."""
        raise NotImplementedError


_noted: WeakValueDictionary[int, UpdatedAfterSteps] = WeakValueDictionary()
_num_noted = 0


def _note(module: UpdatedAfterSteps) -> None:
    global _num_noted
    if not _num_noted:
        register_optimizer_step_post_hook(_after_optimizer_step)
    _noted[_num_noted] = module
    _num_noted += 1


@torch.compiler.disable
@torch.no_grad()
def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, module in sorted(_noted.items()):
        module.after_optimizer_step()


def is_recomputing() -> bool:
    """Whether a backward pass runs this: activation checkpointing repeats a forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
