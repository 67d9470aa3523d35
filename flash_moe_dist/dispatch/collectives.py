"""Collectives over rows of tensors: every byte that the expert layer sends goes through here.

W ranks of the group. All of them must call alike. Autograd does not see through these: see
`flash_moe_dist.expert_parallel` for the backward pass.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from flash_moe_dist.phases import communication

ALL_TO_ALL_COLLECTIVE = "all_to_all_single"
# Its name from torch 2.13 on, where the older one warns.
ALL_GATHER_COLLECTIVE = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)


class Pending:
    """Rows on their way, beside whatever the device does until `wait`.

    received: where they will be.
    """

    def __init__(self, received: Tensor, sent: Tensor, work: Any) -> None:
        self.received, self._sent, self._work = received, sent, work

    def wait(self) -> Tensor:
        """The rows received; what the device does next comes after them."""
        with communication():
            self.join()
        return self.received

    def join(self) -> None:
        """`wait`, on a stream whose time is nobody's."""
        self._work.wait()


def start_all_to_all(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Pending:
    """Send consecutive runs of rows to the ranks of `group` and receive theirs.

    Args:
        rows: (sum(input_splits), ...); the first input_splits[0] rows go to rank 0, and so on.
        input_splits, output_splits: (W,) rows sent to, received from each rank.

    Returns:
        (sum(output_splits), ...), in the order of the ranks that sent, once they are there.
    """
    rows = rows.contiguous()
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    work = dist.all_to_all_single(
        received, rows, output_splits, input_splits, group=group, async_op=True
    )
    return Pending(received, rows, work)


def all_to_all_rows(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    """`start_all_to_all`, and wait."""
    return start_all_to_all(rows, input_splits, output_splits, group).wait()


def start_all_gather(rows: Tensor, group: dist.ProcessGroup) -> Pending:
    """Rows (T, ...), as many on every rank, of all ranks: (W T, ...), once they are there."""
    rows = rows.contiguous()
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    work = getattr(dist, ALL_GATHER_COLLECTIVE)(gathered, rows, group=group, async_op=True)
    return Pending(gathered, rows, work)


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_all_gather`, and wait."""
    return start_all_gather(rows, group).wait()
