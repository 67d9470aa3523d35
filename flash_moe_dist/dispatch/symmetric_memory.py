"""Memory that the ranks of one host read and write directly, over NVLink or PCIe.

Built on `torch.distributed._symmetric_memory`: rows are copied by the copy engines of the GPUs,
which leaves the multiprocessors to kernels; kernels read and write the memory of other ranks in
place; and a barrier takes some microseconds.
"""

import socket
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.environment import switch
from flash_moe.ops.side_stream import SideStream, current_stream, new_stream
from flash_moe.ops.triton_launch import cdiv
from flash_moe_dist.agreement import gather_objects

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ALIGNMENT = 256
# A region that has become too small is replaced by one larger by at least this factor.
GROWTH = 1.5
MAX_CACHED_VIEWS = 1024


class Region:
    """Bytes of this rank that all ranks of a group read or write, and those of the other ranks.

    The only class that uses PyTorch's symmetric memory, an untyped alpha feature.

    Args:
        device: where.
        num_bytes: how many.

    Raises:
        RuntimeError: the device is out of memory.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.num_bytes = num_bytes
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)

    def rendezvous(self, group: dist.ProcessGroup) -> None:
        """Exchange addresses with the other ranks. Collective.

        Raises:
            RuntimeError: ranks cannot read each other's memory.
        """
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handle: Any = symmetric_memory.rendezvous(self._memory, group)
        self._timeout_ms = int(timeout_seconds(group, self._memory.device) * 1000)

    def view(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int
    ) -> Tensor:
        """A tensor in that rank's bytes, from `offset_bytes` on."""
        first = offset_bytes // dtype.itemsize
        view: Tensor = self._handle.get_buffer(rank, list(shape), dtype, first)
        return view

    def barrier(self) -> None:
        """Make the current stream wait until the streams of all ranks have come to this barrier."""
        self._handle.barrier(0, self._timeout_ms)


class SymmetricBuffers:
    """Regions of the same sizes on all ranks of a group, numbered from 0.

    One side stream of each rank copies from other ranks. All ranks must call the barriers of a
    region in the same order, one at a time.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.ep_size = dist.get_world_size(group)
        self._group, self._device = group, device
        self._regions: list[Region] = []
        # Other ranks, or passes under way, may still use these, so they are never freed.
        self._outgrown: list[Region] = []
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._half = 0
        self._views: dict[object, Tensor] = {}
        # Reached when this rank has added up the partial sums of its last pass.
        self._sums_consumed: torch.Event | None = None

    def ensure_size(self, sizes: Sequence[int]) -> bool:
        """Grow the regions to at least these sizes in bytes. Collective, with the same sizes.

        Returns False on all ranks, with the regions as before, if any rank has no memory for that
        or cannot read the others'.
        """
        present = [region.num_bytes for region in self._regions]
        present += [0] * (len(sizes) - len(present))
        grown = {
            number: cdiv(max(needed, int(GROWTH * have)), 2 * ALIGNMENT) * 2 * ALIGNMENT
            for number, (have, needed) in enumerate(zip(present, sizes, strict=True))
            if needed > have
        }
        regions: dict[int, Region] = {}

        def allocate() -> None:
            for number, size in grown.items():
                regions[number] = Region(self._device, size)

        def rendezvous() -> None:
            for region in regions.values():
                region.rendezvous(self._group)

        # The regions outlive an inference mode that is on now.
        with torch.inference_mode(False):
            # All ranks hear of one without memory before they wait for it in the rendezvous.
            done = not grown or (self._all_ranks_can(allocate) and self._all_ranks_can(rendezvous))
        if not done:
            return False
        for number, region in regions.items():
            if number < len(self._regions):
                self._outgrown.append(self._regions[number])
                self._regions[number] = region
            else:
                self._regions.append(region)
        if regions:
            self._views.clear()
        return True

    def _all_ranks_can(self, do: Callable[[], None]) -> bool:
        reason = ""
        try:
            do()
        except RuntimeError as error:
            reason = f"rank {dist.get_rank(self._group)}: {error}".splitlines()[0]
        reasons = [one for one in gather_objects(reason, self._group) if one]
        if reasons:
            _warn_of_fallback(reasons[0])
        return not reasons

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory this rank has allocated, outgrown regions included."""
        return sum(region.num_bytes for region in (*self._regions, *self._outgrown))

    def next_buffer_offset(self, region: int) -> int:
        """Byte offset of the next half of a double buffer: 0 first, then alternating.

        Every rank must call it equally often.
        """
        self._half = 1 - self._half
        return (1 - self._half) * (self._regions[region].num_bytes // 2)

    def view(
        self,
        rank: int,
        region: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        offset_bytes: int = 0,
    ) -> Tensor:
        """A tensor in that rank's region, from `offset_bytes` on."""
        # Cached, as making a view takes longer than launching a kernel.
        key = (rank, region, tuple(shape), dtype, offset_bytes)
        if key not in self._views:
            with torch.inference_mode(False):
                self._cache(key, self._regions[region].view(rank, shape, dtype, offset_bytes))
        return self._views[key]

    def pointers(self, region: int, offset_bytes: int) -> Tensor:
        """(W,) int64 on the device: address of byte `offset_bytes` in each rank's region.

        The first call for an offset waits for the device.
        """
        key = (region, offset_bytes)
        if key not in self._views:
            views = [
                self.view(rank, region, (1,), torch.uint8, offset_bytes)
                for rank in range(self.ep_size)
            ]
            pointers = [view.data_ptr() for view in views]
            with torch.inference_mode(False):
                self._cache(key, torch.tensor(pointers, device=self._device))
        return self._views[key]

    def _cache(self, key: object, view: Tensor) -> None:
        # Passes of ever new sizes would otherwise make ever more views.
        if len(self._views) >= MAX_CACHED_VIEWS:
            self._views.clear()
        self._views[key] = view

    def barrier(self, region: int) -> None:
        """Make the current stream wait until the streams of all ranks have come to this barrier."""
        self._regions[region].barrier()

    def side_stream(self) -> SideStream:
        """The side stream that copies from other ranks, after the current stream's work so far."""
        return SideStream(self._device, self._stream)

    def record_event(self) -> torch.Event:
        """Event of the current stream's work so far; its `wait` makes another stream wait."""
        event = torch.Event(self._device)
        event.record(current_stream(self._device))
        return event

    def record_sums_consumed(self) -> None:
        """Note that the current stream's work so far includes adding up partial sums received."""
        self._sums_consumed = self.record_event()

    def wait_until_sums_are_consumed(self) -> None:
        """Make the current stream wait until partial sums of the last pass have been added up."""
        if self._sums_consumed is not None:
            self._sums_consumed.wait()

    def record_stream(self, tensor: Tensor) -> Tensor:
        """Tell the caching allocator that the current stream uses a tensor of the side stream."""
        if self._stream is not None:
            tensor.record_stream(current_stream(self._device))
        return tensor


# By name of the group, with the group itself, as names are used again.
_buffers_of_groups: dict[str, tuple[dist.ProcessGroup, SymmetricBuffers | None]] = {}


def symmetric_buffers(
    group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int], required: bool
) -> SymmetricBuffers | None:
    """Buffers of the group with regions of at least these sizes in bytes, or None.

    All layers of a group share them, one pass after the other, as long as the process lives. They
    take less than 4.5 times what the largest pass needs, as regions grow by half at least.
    Collective: every rank asks for the same sizes at the same time, and gets the same answer. None
    if the ranks cannot have them, or if FLASH_MOE_PEER_MEMORY=0 in the environment of any rank.

    Raises:
        RuntimeError: on every rank alike, if they are `required` and there can be none.
    """
    buffers = _buffers_of(group, device)
    if buffers is not None and buffers.ensure_size(sizes):
        return buffers
    if required:
        raise _unavailable()
    return None


def check_symmetric_memory(group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that the ranks share a host. Collective, once for a group.

    Raises:
        RuntimeError: on every rank alike, if they can have no symmetric memory.
    """
    if _buffers_of(group, device) is None:
        raise _unavailable()


def _buffers_of(group: dist.ProcessGroup, device: torch.device) -> SymmetricBuffers | None:
    known, buffers = _buffers_of_groups.get(group.group_name, (None, None))
    if known is not group:
        buffers = SymmetricBuffers(group, device) if _share_one_host(group, device) else None
        _buffers_of_groups[group.group_name] = (group, buffers)
    return buffers


def _unavailable() -> RuntimeError:
    return RuntimeError(
        "transport 'symmetric_memory' needs ranks of one host, each with an NVIDIA GPU of its "
        "own, the nccl backend, memory to spare, and FLASH_MOE_PEER_MEMORY unset or 1"
    )


def symmetric_memory_bytes() -> int:
    """Bytes of symmetric memory this rank has allocated; not in PyTorch's memory statistics."""
    return sum(
        buffers.num_bytes for _, buffers in _buffers_of_groups.values() if buffers is not None
    )


@cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        "ranks of one host cannot read each other's memory, so their rows travel by collectives: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _share_one_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks run on GPUs of their own on one host, and want symmetric memory."""
    wanted = switch("FLASH_MOE_PEER_MEMORY", True)
    mine = None
    if wanted and device.type == "cuda" and dist.get_backend(group) == "nccl":
        boot = BOOT_ID.read_text() if BOOT_ID.exists() else ""
        index = torch.cuda.current_device() if device.index is None else device.index
        mine = (socket.gethostname(), boot, str(torch.cuda.get_device_properties(index).uuid))
    ranks = gather_objects(mine, group)
    return (
        None not in ranks
        and len({one[:2] for one in ranks}) == 1
        and len({one[2] for one in ranks}) == len(ranks)
    )


def timeout_seconds(group: dist.ProcessGroup, device: torch.device) -> float:
    """Timeout of a collective of the group, in seconds."""
    options: Any = group._get_backend(device).options
    seconds: float = options._timeout.total_seconds()
    return seconds
