"""Latency and rate of each collective between ranks, measured."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe_dist.dispatch.collectives import all_gather_rows, all_to_all_rows
from scaling.predict import Link
from scaling.ranks import Clock, Ranks
from scaling.traffic import ALL_GATHER, ALL_TO_ALL

# Bytes that each rank hands over.
LINK_BYTES = {"cuda": (2**20, 2**26), "cpu": (2**14, 2**22)}
REPEATS = 10
WIDTH = 2**10


def measure_links(ranks: Ranks) -> dict[str, Link]:
    """Latency and rate of each collective, from a small and a large message."""
    return {name: _link(ranks, name) for name in (ALL_TO_ALL, ALL_GATHER)}


def _link(ranks: Ranks, name: str) -> Link:
    small, large = (_seconds_of(ranks, name, handed) for handed in LINK_BYTES[ranks.device.type])
    # Noise of a busy machine must not make a link of infinite rate.
    seconds = max(large.seconds - small.seconds, 0.05 * large.seconds)
    rate = (large.leaving - small.leaving) / seconds
    return Link(max(0.0, small.seconds - small.leaving / rate), rate)


@dataclass(frozen=True)
class _Sent:
    """Bytes that left each rank, and seconds."""

    leaving: float
    seconds: float


def _seconds_of(ranks: Ranks, name: str, handed: int) -> _Sent:
    """Of about `handed` bytes on each rank."""
    each = max(1, handed // (WIDTH * 2) // ranks.size)
    rows = torch.ones(each * ranks.size, WIDTH, device=ranks.device, dtype=torch.bfloat16)
    equal = [each] * ranks.size
    calls: dict[str, Callable[[], Tensor]] = {
        ALL_TO_ALL: lambda: all_to_all_rows(rows, equal, equal, ranks.group),
        ALL_GATHER: lambda: all_gather_rows(rows, ranks.group),
    }
    copies = ranks.size - 1 if name == ALL_GATHER else (ranks.size - 1) / ranks.size
    clock = Clock(ranks)
    calls[name]()
    seconds = statistics.median(clock(calls[name]) for _ in range(REPEATS))
    return _Sent(rows.nbytes * copies, seconds)
