"""Memory of the ranks of one host that they read directly, over NVLink or PCIe.

By `torch.distributed._symmetric_memory`: copies between ranks are then made by the copy engines of
the GPUs and leave multiprocessors to kernels, and a barrier takes some microseconds.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.aside import Aside, current_stream, side_stream
from flash_moe_dist.agreement import gather_objects

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ALIGNMENT = 256
# A region that has become too small is replaced by one that is larger by this factor at least.
GROWTH = 1.5
MOST_VIEWS = 1024


class PeerMemory:
    """Regions of bytes, of the same sizes on all ranks of a group.

    Args:
        sizes: bytes of each region.

    Raises:
        RuntimeError: on this rank or any, if ranks cannot read each other's memory.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int]
    ) -> None:
        # An alpha feature of PyTorch, untyped: what is used of it is in this class.
        import torch.distributed._symmetric_memory as symmetric_memory

        self.sizes, self.ep_size = tuple(sizes), dist.get_world_size(group)
        rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self.begins = [sum(rounded[:number]) for number in range(len(sizes))]
        self.num_bytes = sum(rounded)
        self._memory = symmetric_memory.empty(self.num_bytes, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric_memory.rendezvous(self._memory, group)
        self._device = device
        self._timeout_ms = int(_timeout_seconds(group) * 1000)
        self._stream = side_stream(device)
        self._turn = 0
        self._views: dict[object, Tensor] = {}

    def next_turn(self) -> int:
        """0 and 1 by turns, alike on all ranks if all ask equally often."""
        self._turn = 1 - self._turn
        return self._turn

    def view(
        self, rank: int, region: int, shape: Sequence[int], dtype: torch.dtype, skipped: int = 0
    ) -> Tensor:
        """A tensor in a region of that rank's memory, after `skipped` elements."""
        # Kept, as making one takes longer than launching a kernel.
        key = (rank, region, tuple(shape), dtype, skipped)
        if key not in self._views:
            first = self.begins[region] // dtype.itemsize + skipped
            self._keep(key, self._handle.get_buffer(rank, list(shape), dtype, first))
        return self._views[key]

    def addresses(self, region: int, skipped: int) -> Tensor:
        """(W,) int64 on the device: of the byte after `skipped` others, in each rank's memory."""
        key = (region, skipped)
        if key not in self._views:
            views = [
                self.view(rank, region, (1,), torch.uint8, skipped) for rank in range(self.ep_size)
            ]
            pointers = [view.data_ptr() for view in views]
            self._keep(key, torch.tensor(pointers, device=self._device))
        return self._views[key]

    def _keep(self, key: object, view: Tensor) -> None:
        # Passes of ever other sizes would make ever more.
        if len(self._views) >= MOST_VIEWS:
            self._views.clear()
        self._views[key] = view

    def barrier(self, channel: int) -> None:
        """The current stream goes on when all ranks' streams have come to theirs.

        Barriers of one channel must be met in the same order everywhere, one at a time.
        """
        self._handle.barrier(channel, self._timeout_ms)

    def aside(self) -> Aside:
        """On a stream of its own, after what the current one has to do so far."""
        return Aside(self._device, self._stream)

    def reached(self) -> torch.Event:
        """What the current stream has to do so far; its `wait` makes another stream wait."""
        event = torch.Event(self._device)
        event.record(current_stream(self._device))
        return event

    def used_here(self, tensor: Tensor) -> Tensor:
        """One that was made aside, and is used on the current stream from now on."""
        tensor.record_stream(current_stream(self._device))
        return tensor


_of_groups: dict[str, tuple[dist.ProcessGroup, PeerMemory | None]] = {}


def peer_memory(
    group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int]
) -> PeerMemory | None:
    """Memory of the group with regions of at least these sizes; None if there can be none.

    All of a group's layers share it, one pass after the other. Collective: every rank of the group
    asks for the same sizes at the same time, and gets the same answer. Not if the environment says
    FLASH_MOE_PEER_MEMORY=0 on any rank.
    """
    known, memory = _of_groups.get(group.group_name, (None, None))
    if known is group and (memory is None or all(map(int.__le__, sizes, memory.sizes))):
        return memory
    if known is not group and not _can_read_each_other(group, device):
        _of_groups[group.group_name] = (group, None)
        return None
    if known is group and memory is not None:
        sizes = [
            max(old, new) if new <= old else max(new, int(GROWTH * old))
            for old, new in zip(memory.sizes, sizes, strict=True)
        ]
        # Peers may still read it: kept as long as the process lives.
        _outgrown.append(memory)
    made: PeerMemory | None = None
    with suppress(RuntimeError):
        made = PeerMemory(group, device, sizes)
    made = made if all(gather_objects(made is not None, group)) else None
    _of_groups[group.group_name] = (group, made)
    return made


_outgrown: list[PeerMemory] = []


def peer_memory_bytes() -> int:
    """Bytes of this rank that others read, in all groups; not in PyTorch's own statistics."""
    return sum(one.num_bytes for _, one in _of_groups.values() if one is not None) + sum(
        one.num_bytes for one in _outgrown
    )


def _can_read_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    wanted = os.environ.get("FLASH_MOE_PEER_MEMORY", "1") != "0"
    mine = None
    if wanted and device.type == "cuda" and dist.get_backend(group) == "nccl":
        boot = BOOT_ID.read_text() if BOOT_ID.exists() else ""
        index = torch.cuda.current_device() if device.index is None else device.index
        mine = (socket.gethostname(), boot, str(torch.cuda.get_device_properties(index).uuid))
    everyone = gather_objects(mine, group)
    return (
        None not in everyone
        and len({one[:2] for one in everyone}) == 1
        and len({one[2] for one in everyone}) == len(everyone)
    )


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    """After which a collective of the group fails, and a barrier should."""
    options: Any = group._get_backend(torch.device("cuda")).options
    seconds: float = options._timeout.total_seconds()
    return seconds
