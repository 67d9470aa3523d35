"""Modules that update themselves when an optimizer of theirs has made a step."""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from flash_moe.layers.recomputation import is_in_backward


class UpdatedAfterSteps(nn.Module):
    """Module whose `after_optimizer_step` is called at the end of a step of its optimizer.

    That is any optimizer that holds one of its parameters. Modules are called in the order in which
    they were made, the same on all ranks, so that they can communicate. A step within a backward
    pass does not count, as the pass may have to be recomputed.
    """

    def call_after_steps(self) -> None:
        """Register the module; to be called at the end of its `__init__`."""
        global _num_called
        if _num_called == 0:
            register_optimizer_step_post_hook(_after_step)
        _called[_num_called] = self
        _num_called += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has not been through `__init__`.
        super().__setstate__(state)
        self.call_after_steps()

    def after_optimizer_step(self) -> None:
        """Update buffers, from what the forward passes since the last step have added up."""
        raise NotImplementedError


_called: WeakValueDictionary[int, UpdatedAfterSteps] = WeakValueDictionary()
_num_called = 0


@torch.compiler.disable
@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_in_backward() or not _called:
        return
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    for _, module in sorted(_called.items()):
        if any(id(parameter) in held for parameter in module.parameters()):
            module.after_optimizer_step()
