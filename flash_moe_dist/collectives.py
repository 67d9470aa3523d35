"""Collectives that autograd sees through."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive runs of rows to the ranks of `group` and receive theirs; differentiable.

    Args:
        rows: (sum(input_splits), ...); the first input_splits[0] rows go to rank 0, and so on.
        input_splits, output_splits: (W,) rows sent to, received from each rank.
        group: the W ranks; all of them must call this, in the forward and in the backward pass.

    Returns:
        (sum(output_splits), ...), in the order of the ranks that sent. In the backward pass
        gradients travel the same way back.
    """
    received: Tensor = _AllToAllRows.apply(rows, input_splits, output_splits, group)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        input_splits: list[int],
        output_splits: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.splits, ctx.group = (input_splits, output_splits), group
        return _exchange(rows, input_splits, output_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input_splits, output_splits = ctx.splits
        return _exchange(grads[0], output_splits, input_splits, ctx.group), None, None, None


def _exchange(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), output_splits, input_splits, group=group)
    return received
