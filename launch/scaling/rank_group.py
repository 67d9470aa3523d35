"""Some of the ranks, and a clock that runs on all of them."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flash_moe.bench.measure import FLUSHED_BYTES, FLUSHES_AHEAD
from flash_moe_dist.agreement import gather_objects

# Times as many kernels as the op on one device, for which FLUSHES_AHEAD was chosen.
LAUNCHES_OF_A_LAYER = 3


class Ranks:
    """The first `size` ranks of the world: their group, mesh, and this one's place."""

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.size, self.group, self.device = size, group, device
        self.mesh = DeviceMesh.from_group(group, device.type)
        self.rank = dist.get_rank(group)

    def gather(self, mine: Any) -> list[Any]:
        return gather_objects(mine, self.group)

    def meet(self) -> None:
        """What the device does next begins on all ranks at the same time."""
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)


class Clock:
    """Seconds of work that begins on all ranks at once, of the rank that takes longest.

    On CUDA the device has work queued before it, longer than the host needs to launch a pass, and
    finds a cache full of something else.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.flushed = (
            torch.zeros(FLUSHED_BYTES, device=ranks.device, dtype=torch.int8)
            if ranks.device.type == "cuda"
            else None
        )

    def start(self, busy: bool) -> Callable[[], float]:
        """Returns what ends the work and gives this rank's seconds."""
        if self.flushed is None:
            self.ranks.meet()
            begun = time.perf_counter()
            return lambda: time.perf_counter() - begun
        torch.cuda.synchronize()
        for _ in range(LAUNCHES_OF_A_LAYER * FLUSHES_AHEAD if busy else 0):
            self.flushed.zero_()
        self.ranks.meet()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def ended() -> float:
            last.record()
            torch.cuda.synchronize()
            return first.elapsed_time(last) / 1e3

        return ended

    def __call__(self, work: Callable[[], object], busy: bool = True) -> float:
        ended = self.start(busy)
        work()
        return max(self.ranks.gather(ended()))
