"""Measure device time, wall clock, phases and memory of the variants of a layer."""

import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch

from flash_moe.bench.measure import peak_bytes, reset_peak_bytes
from flash_moe_dist import time_phases
from flash_moe_dist.dispatch.symmetric_memory import symmetric_memory_bytes
from flash_moe_dist.phases import PHASES
from scaling.clock import Clock
from scaling.layer import Layer
from scaling.results import CONVENTIONAL, Result

# Loops timed for each variant; each runs as many passes as there are repeats.
LOOPS = 3


def measure_all(
    layer: Layer, results: dict[str, Result], repeats: int, advance: Callable[[], object]
) -> None:
    """Fill `results` by variant: device times, loops, phases, then memory. Collective.

    Repeats of the variants are interleaved.

    Args:
        advance: moves a progress bar; called `rounds(repeats)` times for each variant.
    """
    clock = Clock(layer.ranks)

    def for_each_variant(measure: Callable[[Result], None]) -> None:
        for name, result in results.items():
            if name != CONVENTIONAL:
                layer.choose(name)
                layer.clear()
                measure(result)
            advance()

    for _ in range(repeats):
        for_each_variant(partial(time_passes, layer, clock))
        if CONVENTIONAL in results and not results[CONVENTIONAL].failure:
            layer.clear()
            _record(results[CONVENTIONAL], "forward", clock(layer.conventional))
    for _ in range(LOOPS):
        for_each_variant(partial(time_loop, layer, clock, repeats))
    for_each_variant(partial(measure_phases, layer, clock, repeats))
    # Its buffer would count as memory of the layer.
    del clock
    for_each_variant(partial(measure_memory, layer))
    layer.clear()


def rounds(repeats: int) -> int:
    """How often `measure_all` moves the progress bar for each variant."""
    return repeats + LOOPS + 2


def time_passes(layer: Layer, clock: Clock, result: Result) -> None:
    """Record the device time of one forward and one backward pass."""
    _record(result, "forward", clock(layer.forward))
    _record(result, "backward", clock(layer.backward))


def time_loop(layer: Layer, clock: Clock, passes: int, result: Result) -> None:
    """Record the wall clock of a pass in a loop of `passes`, launching included."""
    _record(result, "loop", clock(partial(_loop, layer, passes), busy=False) / passes)


def _record(result: Result, what: str, seconds: float) -> None:
    result.seconds.setdefault(what, []).append(seconds)


def _loop(layer: Layer, passes: int) -> None:
    for _ in range(passes):
        layer.clear()
        layer.forward()
        layer.backward()


def measure_phases(layer: Layer, clock: Clock, repeats: int, result: Result) -> None:
    """Record the mean seconds of each phase of a forward and backward pass."""
    totals = dict.fromkeys(("total", *PHASES), 0.0)
    for _ in range(repeats):
        layer.clear()
        for work in (layer.forward, layer.backward):
            with time_phases(layer.ranks.device) as seconds:
                stop = clock.start(busy=True)
                work()
                totals["total"] += stop() / repeats
            for name, taken in seconds.items():
                totals[name.removesuffix("_backward")] += taken / repeats
    of_ranks = layer.ranks.gather(totals)
    mean = {name: statistics.fmean(one[name] for one in of_ranks) for name in totals}
    total = mean.pop("total")
    if layer.ranks.size == 1:
        # A layer on one rank has no phases.
        result.phases = {"experts": total}
    else:
        result.phases = {**mean, "other": total - sum(mean.values())}


def measure_memory(layer: Layer, result: Result) -> None:
    """Record the peak bytes of a training step, of the rank with most.

    The step is the second, so that the optimizer's state exists. Does nothing on the CPU.
    """
    if layer.ranks.device.type != "cuda":
        return
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=0.0, fused=True)
    for _step in range(2):
        gc.collect()
        reset_peak_bytes(layer.ranks.device)
        layer.clear()
        layer.forward()
        layer.backward()
        optimizer.step()
    # Symmetric memory is allocated outside PyTorch's caching allocator.
    peak = peak_bytes(layer.ranks.device) + symmetric_memory_bytes()
    result.peak_bytes = max(layer.ranks.gather(peak))
