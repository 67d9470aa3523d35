"""Collectives over rows of tensors: every byte that the expert layer sends goes through here.

W ranks of the group. All of them must call alike. Autograd does not see through these: see
`flash_moe_dist.expert_parallel` for the backward pass.
"""

import torch.distributed as dist
from torch import Tensor

from flash_moe_dist.steps import communication

ALL_TO_ALL = "all_to_all_single"
# Their names from torch 2.13 on, where the older ones warn.
ALL_GATHER, REDUCE_SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if hasattr(dist, "all_gather_single")
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)


def all_to_all_rows(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive runs of rows to the ranks of `group` and receive theirs.

    Args:
        rows: (sum(input_splits), ...); the first input_splits[0] rows go to rank 0, and so on.
        input_splits, output_splits: (W,) rows sent to, received from each rank.

    Returns:
        (sum(output_splits), ...), in the order of the ranks that sent.
    """
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    rows = rows.contiguous()
    with communication():
        dist.all_to_all_single(received, rows, output_splits, input_splits, group=group)
    return received


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows (T, ...), as many on every rank, of all ranks: (W T, ...)."""
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    rows = rows.contiguous()
    with communication():
        getattr(dist, ALL_GATHER)(gathered, rows, group=group)
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows (W T, ...) summed over the ranks; the r-th T of them stay with rank r: (T, ...)."""
    summed = rows.new_empty(rows.shape[0] // dist.get_world_size(group), *rows.shape[1:])
    rows = rows.contiguous()
    with communication():
        getattr(dist, REDUCE_SCATTER)(summed, rows, group=group)
    return summed
