"""Memory of the ranks of one host that they read and write directly, over NVLink or PCIe.

By `torch.distributed._symmetric_memory`: copies of rows are then made by the copy engines of the
GPUs and leave multiprocessors to kernels, kernels read and write what others have or want where it
is, and a barrier takes some microseconds.
"""

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.side_stream import SideStream, current_stream, new_stream
from flash_moe.ops.triton_launch import cdiv
from flash_moe_dist.agreement import gather_objects

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ALIGNMENT = 256
# A region that has become too small is replaced by one that is larger by this factor at least.
GROWTH = 1.5
MOST_VIEWS = 1024


class Region:
    """Bytes of this rank that all ranks of a group read or write, and those of the others.

    What is used of PyTorch's symmetric memory, an untyped alpha feature, is in this class.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """Raises RuntimeError: there is no memory for it."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self.num_bytes = num_bytes
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)

    def meet(self, group: dist.ProcessGroup) -> None:
        """Collective; raises RuntimeError: ranks cannot read each other's memory."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handle: Any = symmetric_memory.rendezvous(self._memory, group)
        self._timeout_ms = int(timeout_seconds(group, self._memory.device) * 1000)

    def view(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, skipped_bytes: int
    ) -> Tensor:
        first = skipped_bytes // dtype.itemsize
        view: Tensor = self._handle.get_buffer(rank, list(shape), dtype, first)
        return view

    def barrier(self) -> None:
        self._handle.barrier(0, self._timeout_ms)


class SymmetricBuffers:
    """Regions of the same sizes on all ranks of a group, numbered from 0.

    One stream of each rank copies from others: `aside`. Barriers of a region must be met in the
    same order everywhere, one at a time.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ep_size = dist.get_world_size(group)
        self._group, self._device = group, device
        self._regions: list[Region] = []
        # Peers, or passes that are under way, may still use these: kept with the process.
        self._outgrown: list[Region] = []
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._turn = 0
        self._views: dict[object, Tensor] = {}
        # When those of the last pass that had any have been added up.
        self.sums_read: torch.Event | None = None

    def make_room(self, sizes: Sequence[int]) -> bool:
        """Have regions of at least so many bytes. Collective, with the same sizes everywhere.

        False on all ranks if any has no memory for that, or cannot read the others'; regions are
        then as before.
        """
        now = [region.num_bytes for region in self._regions]
        now += [0] * (len(sizes) - len(now))
        grown = {
            number: cdiv(max(wanted, int(GROWTH * have)), 2 * ALIGNMENT) * 2 * ALIGNMENT
            for number, (have, wanted) in enumerate(zip(now, sizes, strict=True))
            if wanted > have
        }
        made: dict[int, Region] = {}

        def allocate() -> None:
            for number, size in grown.items():
                made[number] = Region(self._device, size)

        def meet() -> None:
            for region in made.values():
                region.meet(self._group)

        # These outlive an inference mode that is on now.
        with torch.inference_mode(False):
            # One that has no memory must not leave the others waiting for it to meet them.
            done = not grown or (self._all_can(allocate) and self._all_can(meet))
        if not done:
            return False
        for number, region in made.items():
            if number < len(self._regions):
                self._outgrown.append(self._regions[number])
                self._regions[number] = region
            else:
                self._regions.append(region)
        if made:
            self._views.clear()
        return True

    def _all_can(self, do: Callable[[], None]) -> bool:
        reason = ""
        try:
            do()
        except RuntimeError as error:
            reason = f"rank {dist.get_rank(self._group)}: {error}".splitlines()[0]
        reasons = [one for one in gather_objects(reason, self._group) if one]
        if reasons:
            _warn(reasons[0])
        return not reasons

    @property
    def num_bytes(self) -> int:
        """Of this rank that others read or write, or have."""
        return sum(region.num_bytes for region in (*self._regions, *self._outgrown))

    def next_half(self, region: int) -> int:
        """Bytes before one half of a region and the other by turns, 0 first.

        Alike on all ranks if all ask equally often.
        """
        self._turn = 1 - self._turn
        return (1 - self._turn) * (self._regions[region].num_bytes // 2)

    def view(
        self,
        rank: int,
        region: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        skipped_bytes: int = 0,
    ) -> Tensor:
        """A tensor in that rank's region, after so many bytes."""
        # Kept, as making one takes longer than launching a kernel.
        key = (rank, region, tuple(shape), dtype, skipped_bytes)
        if key not in self._views:
            with torch.inference_mode(False):
                self._keep(key, self._regions[region].view(rank, shape, dtype, skipped_bytes))
        return self._views[key]

    def addresses(self, region: int, skipped_bytes: int) -> Tensor:
        """(W,) int64 on the device: of the byte after so many in each rank's region.

        Waits for the device when it is asked for the first time.
        """
        key = (region, skipped_bytes)
        if key not in self._views:
            views = [
                self.view(rank, region, (1,), torch.uint8, skipped_bytes)
                for rank in range(self.ep_size)
            ]
            pointers = [view.data_ptr() for view in views]
            with torch.inference_mode(False):
                self._keep(key, torch.tensor(pointers, device=self._device))
        return self._views[key]

    def _keep(self, key: object, view: Tensor) -> None:
        # Passes of ever other sizes would make ever more.
        if len(self._views) >= MOST_VIEWS:
            self._views.clear()
        self._views[key] = view

    def barrier(self, region: int) -> None:
        """The current stream goes on when all ranks' streams have come to theirs."""
        self._regions[region].barrier()

    def aside(self) -> SideStream:
        """On a stream of its own, after what the current one has to do so far."""
        return SideStream(self._device, self._stream)

    def reached(self) -> torch.Event:
        """What the current stream has to do so far; its `wait` makes another stream wait."""
        event = torch.Event(self._device)
        event.record(current_stream(self._device))
        return event

    def wait_until_sums_are_read(self) -> None:
        """The current stream waits until this rank has added up those it has received so far."""
        if self.sums_read is not None:
            self.sums_read.wait()

    def used_here(self, tensor: Tensor) -> Tensor:
        """One that was made aside, and is used on the current stream from now on."""
        if self._stream is not None:
            tensor.record_stream(current_stream(self._device))
        return tensor


_of_groups: dict[str, tuple[dist.ProcessGroup, SymmetricBuffers | None]] = {}


def peer_memory(
    group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int]
) -> SymmetricBuffers | None:
    """Memory of the group with regions of at least these sizes; None if there can be none.

    All of a group's layers share it, one pass after the other, as long as the process lives: less
    than 4.5 times what the largest pass needs, as regions grow by half at least. Collective:
    every rank of the group asks for the same sizes at the same time, and gets the same answer. Not
    if the environment says FLASH_MOE_PEER_MEMORY=0 on any rank.
    """
    known, memory = _of_groups.get(group.group_name, (None, None))
    if known is not group:
        memory = SymmetricBuffers(group, device) if _can_read_each_other(group, device) else None
        _of_groups[group.group_name] = (group, memory)
    if memory is None or not memory.make_room(sizes):
        return None
    return memory


def symmetric_memory_bytes() -> int:
    """Bytes of this rank that others read or write, in all groups; not in PyTorch's statistics."""
    return sum(memory.num_bytes for _, memory in _of_groups.values() if memory is not None)


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        "ranks of one host cannot read each other's memory, so that their rows travel by "
        f"collectives: {reason}",
        RuntimeWarning,
        stacklevel=2,
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


def timeout_seconds(group: dist.ProcessGroup, device: torch.device) -> float:
    """After which a collective of the group fails, and a barrier should."""
    options: Any = group._get_backend(device).options
    seconds: float = options._timeout.total_seconds()
    return seconds
