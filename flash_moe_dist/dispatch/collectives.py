"""Collectives over rows of tensors: every byte that a sharded layer hands to torch.distributed.

W ranks of the group, which must all make the same calls. Autograd does not see through them:
`autograd.py` has the backward pass.
"""

import torch.distributed as dist
from torch import Tensor

from flash_moe_dist.dispatch.pass_order import host_waits, wait_for_collective
from flash_moe_dist.phases import communication

# Names of functions of torch.distributed.
ALL_TO_ALL_COLLECTIVE = "all_to_all_single"
# torch 2.13 renames it, and warns about the old name.
ALL_GATHER_COLLECTIVE = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)


class Pending:
    """A collective under way, concurrent with what the device does until `wait`.

    received: where the rows will be.
    """

    def __init__(
        self, received: Tensor, sent: Tensor, work: dist.Work, group: dist.ProcessGroup
    ) -> None:
        # The sent rows must stay in memory until they have left.
        self.received, self._sent, self._work, self._group = received, sent, work, group

    def wait(self) -> Tensor:
        """Rows received; the current stream waits for them."""
        with communication():
            self.wait_uncounted()
        return self.received

    def wait_uncounted(self) -> None:
        """Wait without counting it as exposed communication: for a side stream."""
        if host_waits(self._group, self.received.is_cuda):
            wait_for_collective(self._work, self._group)
        else:
            self._work.wait()


def exchange_headers(received_WF: Tensor, sent_WF: Tensor, group: dist.ProcessGroup) -> None:
    """Send row w of `sent_WF` to rank w and receive its row for this rank; the stream waits."""
    if host_waits(group, sent_WF.is_cuda):
        work = dist.all_to_all_single(received_WF, sent_WF, group=group, async_op=True)
        Pending(received_WF, sent_WF, work, group).wait()
        return
    with communication():
        # On the current stream: the host, which waits for the headers, has them 7 us earlier.
        dist.all_to_all_single(received_WF, sent_WF, group=group)


def start_all_to_all(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Pending:
    """Start to send consecutive ranges of rows to the ranks of `group`, and to receive theirs.

    Args:
        rows: (sum(input_splits), ...); the first input_splits[0] rows go to rank 0, and so on.
        input_splits, output_splits: (W,) rows sent to, received from each rank.

    Returns:
        (sum(output_splits), ...), in the order of the ranks that sent, when it has arrived.
    """
    rows = rows.contiguous()
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    work = getattr(dist, ALL_TO_ALL_COLLECTIVE)(
        received, rows, output_splits, input_splits, group=group, async_op=True
    )
    return Pending(received, rows, work, group)


def all_to_all_rows(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> Tensor:
    """`start_all_to_all`, and wait."""
    return start_all_to_all(rows, input_splits, output_splits, group).wait()


def start_all_gather(rows: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to gather rows (T, ...), the same number on every rank: (W T, ...) by rank."""
    rows = rows.contiguous()
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    work = getattr(dist, ALL_GATHER_COLLECTIVE)(gathered, rows, group=group, async_op=True)
    return Pending(gathered, rows, work, group)


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_all_gather`, and wait."""
    return start_all_gather(rows, group).wait()
