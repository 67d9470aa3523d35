"""Latency and rate of each collective between ranks, measured."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from flash_moe_dist.collectives import all_gather_rows, all_to_all_rows, reduce_scatter_rows
from scaling.predict import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, Link
from scaling.ranks import Clock, Ranks

# Bytes that each rank hands over.
LINK_BYTES = {"cuda": (2**20, 2**26), "cpu": (2**14, 2**22)}
REPEATS = 10


def measure_links(ranks: Ranks) -> dict[str, Link]:
    """Latency and rate of each collective, from a small and a large message; {} for one rank."""
    if ranks.size == 1:
        return {}
    return {name: _link(ranks, name) for name in (ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER)}


def _link(ranks: Ranks, name: str) -> Link:
    small, large = LINK_BYTES[ranks.device.type]
    of_small, of_large = (_seconds_of(ranks, name, handed) for handed in (small, large))
    leaving = ranks.size - 1 if name == ALL_GATHER else (ranks.size - 1) / ranks.size
    # Noise of a busy machine must not make a link of infinite rate.
    rate = (large - small) * leaving / max(of_large - of_small, 0.05 * of_large)
    return Link(max(0.0, of_small - small * leaving / rate), rate)


def _seconds_of(ranks: Ranks, name: str, handed: int) -> float:
    width = 2**10
    count = handed // (2 * width) // ranks.size * ranks.size
    rows = torch.ones(count, width, device=ranks.device, dtype=torch.bfloat16)
    equal = [count // ranks.size] * ranks.size
    calls: dict[str, Callable[[], Tensor]] = {
        ALL_TO_ALL: lambda: all_to_all_rows(rows, equal, equal, ranks.group),
        ALL_GATHER: lambda: all_gather_rows(rows, ranks.group),
        REDUCE_SCATTER: lambda: reduce_scatter_rows(rows, ranks.group),
    }
    clock = Clock(ranks)
    calls[name]()
    return statistics.median(clock(calls[name]) for _ in range(REPEATS))
