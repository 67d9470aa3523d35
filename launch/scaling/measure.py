"""Time, steps and memory of the variants of a layer."""

import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch

from flash_moe.bench.measure import peak_bytes, start_of_peak
from flash_moe_dist import time_phases
from flash_moe_dist.dispatch.symmetric_memory import symmetric_memory_bytes
from flash_moe_dist.phases import PHASES
from scaling.layer import Layer
from scaling.ranks import Clock
from scaling.results import CONVENTIONAL, Result

LOOPS = 3


def measure_all(
    layer: Layer, results: dict[str, Result], repeats: int, advance: Callable[[], object]
) -> None:
    """Times of all variants by turns, then their steps and memory.

    advance: called `rounds(repeats)` times for each variant.
    """
    clock = Clock(layer.ranks)

    def by_turns(measure: Callable[[Result], None]) -> None:
        for name, result in results.items():
            if name != CONVENTIONAL:
                layer.choose(name)
                layer.clear()
                measure(result)
            advance()

    for _ in range(repeats):
        by_turns(partial(_time, layer, clock))
        if CONVENTIONAL in results and not results[CONVENTIONAL].failure:
            layer.clear()
            _keep(results[CONVENTIONAL], "forward", clock(layer.conventional))
    for _ in range(LOOPS):
        by_turns(partial(_time_loop, layer, clock, repeats))
    by_turns(partial(_time_steps, layer, clock, repeats))
    # Its buffer would count as memory of the layer.
    del clock
    by_turns(partial(_weigh, layer))
    layer.clear()


def rounds(repeats: int) -> int:
    return repeats + LOOPS + 2


def _time(layer: Layer, clock: Clock, result: Result) -> None:
    _keep(result, "forward", clock(layer.forward))
    _keep(result, "backward", clock(layer.backward))


def _time_loop(layer: Layer, clock: Clock, passes: int, result: Result) -> None:
    _keep(result, "loop", clock(partial(_loop, layer, passes), busy=False) / passes)


def _keep(result: Result, what: str, seconds: float) -> None:
    result.seconds.setdefault(what, []).append(seconds)


def _loop(layer: Layer, repeats: int) -> None:
    for _ in range(repeats):
        layer.clear()
        layer.forward()
        layer.backward()


def _time_steps(layer: Layer, clock: Clock, repeats: int, result: Result) -> None:
    totals = dict.fromkeys(("total", *PHASES), 0.0)
    for _ in range(repeats):
        layer.clear()
        for work in (layer.forward, layer.backward):
            with time_phases(layer.ranks.device) as seconds:
                ended = clock.start(busy=True)
                work()
                totals["total"] += ended() / repeats
            for name, taken in seconds.items():
                totals[name.removesuffix("_backward")] += taken / repeats
    of_ranks = layer.ranks.gather(totals)
    mean = {name: statistics.fmean(one[name] for one in of_ranks) for name in totals}
    total = mean.pop("total")
    # One rank does not dispatch, and times no steps.
    alone = layer.ranks.size == 1
    result.steps = {"experts": total} if alone else {**mean, "other": total - sum(mean.values())}


def _weigh(layer: Layer, result: Result) -> None:
    """The second of two steps, when the optimizer has its state."""
    if layer.ranks.device.type != "cuda":
        return
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=0.0, fused=True)
    for _step in range(2):
        gc.collect()
        start_of_peak(layer.ranks.device)
        layer.clear()
        layer.forward()
        layer.backward()
        optimizer.step()
    held = peak_bytes(layer.ranks.device) + symmetric_memory_bytes()
    result.peak_bytes = max(layer.ranks.gather(held))
