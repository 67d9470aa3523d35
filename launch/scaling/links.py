"""Measure latency and rate of each collective between ranks."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe_dist.dispatch.collectives import all_gather_rows, all_to_all_rows
from scaling.clock import Clock
from scaling.predict import Link
from scaling.rank_group import RankGroup
from scaling.traffic import COLLECTIVES, Collective

# Bytes that each rank hands over in the small and the large message.
LINK_BYTES = {"cuda": (2**20, 2**26), "cpu": (2**14, 2**22)}
REPEATS = 10
# Elements of a row.
WIDTH = 2**10


def measure_links(ranks: RankGroup) -> dict[Collective, Link]:
    """Fit latency and rate of each collective to the times of a small and a large message."""
    return {collective: _link(ranks, collective) for collective in COLLECTIVES}


def _link(ranks: RankGroup, collective: Collective) -> Link:
    small, large = (
        _time_transfer(ranks, collective, handed) for handed in LINK_BYTES[ranks.device.type]
    )
    # On a busy machine noise could make the difference zero or negative.
    seconds = max(large.seconds - small.seconds, 0.05 * large.seconds)
    rate = (large.leaving - small.leaving) / seconds
    return Link(max(0.0, small.seconds - small.leaving / rate), rate)


@dataclass(frozen=True)
class _Transfer:
    """Bytes that left each rank, and the seconds this took."""

    leaving: float
    seconds: float


def _time_transfer(ranks: RankGroup, collective: Collective, handed: int) -> _Transfer:
    """Time a collective to which each rank hands about `handed` bytes."""
    each = max(1, handed // (WIDTH * 2) // ranks.size)
    rows = torch.ones(each * ranks.size, WIDTH, device=ranks.device, dtype=torch.bfloat16)
    equal = [each] * ranks.size
    calls: dict[Collective, Callable[[], Tensor]] = {
        "all_to_all": lambda: all_to_all_rows(rows, equal, equal, ranks.group),
        "all_gather": lambda: all_gather_rows(rows, ranks.group),
    }
    copies = ranks.size - 1 if collective == "all_gather" else (ranks.size - 1) / ranks.size
    clock = Clock(ranks)
    calls[collective]()
    seconds = statistics.median(clock(calls[collective]) for _ in range(REPEATS))
    return _Transfer(rows.nbytes * copies, seconds)
