"""Clock that times work on several ranks, begun on all at once."""

import time
from collections.abc import Callable

import torch

from flash_moe.bench.measure import FLUSHED_BYTES, FLUSHES_AHEAD
from scaling.rank_group import RankGroup

# A sharded layer launches about this many times as many kernels as the op on one device, for which
# FLUSHES_AHEAD was chosen.
LAUNCHES_OF_A_LAYER = 3


class Clock:
    """Timer of work that begins on all ranks at once; gives the seconds of the slowest rank.

    On CUDA the level-2 cache is flushed first. With `busy` the device still works on flushes when
    the host has launched the pass, so that launching is not timed.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self.flushed = (
            torch.zeros(FLUSHED_BYTES, device=ranks.device, dtype=torch.int8)
            if ranks.device.type == "cuda"
            else None
        )

    def start(self, busy: bool) -> Callable[[], float]:
        """Start the clock; the function returned stops it and gives this rank's seconds."""
        if self.flushed is None:
            self.ranks.align()
            begun = time.perf_counter()
            return lambda: time.perf_counter() - begun
        torch.cuda.synchronize()
        for _ in range(LAUNCHES_OF_A_LAYER * FLUSHES_AHEAD if busy else 0):
            self.flushed.zero_()
        self.ranks.align()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def stop() -> float:
            last.record()
            torch.cuda.synchronize()
            return first.elapsed_time(last) / 1e3

        return stop

    def __call__(self, work: Callable[[], object], busy: bool = True) -> float:
        """Run `work` on all ranks; return the seconds of the slowest, the same on every rank."""
        stop = self.start(busy)
        work()
        return max(self.ranks.gather(stop()))
