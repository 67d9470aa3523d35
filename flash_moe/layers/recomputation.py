"""What a forward pass adds up counts once, though activation checkpointing repeats the pass."""

import torch
from torch import Tensor


def is_in_backward() -> bool:
    """Whether a backward pass runs this, as when activation checkpointing repeats a forward pass.

    Not known in a compiled graph, where it would be decided while tracing.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def accumulate(total: Tensor, added: Tensor) -> None:
    """Add to a total, unless a forward pass is repeated."""
    if torch.compiler.is_compiling():
        _accumulate(total, added)
    elif not is_in_backward():
        total += added


@torch.library.custom_op("flash_moe::accumulate", mutates_args=("total",))
def _accumulate(total: Tensor, added: Tensor) -> None:
    if not is_in_backward():
        total += added


@_accumulate.register_fake
def _(total: Tensor, added: Tensor) -> None:
    return None


def refuse_repetition(value: Tensor, message: str) -> Tensor:
    """Return `value`; raise when a compiled graph that holds this is run in a backward pass.

    Raises:
        RuntimeError: `message`.
    """
    return _refuse_repetition(value, message) if torch.compiler.is_compiling() else value


@torch.library.custom_op("flash_moe::refuse_repetition", mutates_args=())
def _refuse_repetition(value: Tensor, message: str) -> Tensor:
    if is_in_backward():
        raise RuntimeError(message)
    return value.clone()


@_refuse_repetition.register_fake
def _(value: Tensor, message: str) -> Tensor:
    return torch.empty_like(value)


_refuse_repetition.register_autograd(lambda ctx, grad: (grad, None))
