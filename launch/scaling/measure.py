"""Time, steps and memory of the variants of a layer."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flash_moe.bench.measure import peak_bytes, start_of_peak
from flash_moe_dist import time_steps
from scaling.conventional import bytes_needed
from scaling.layer import Layer
from scaling.ranks import Clock
from scaling.traffic import Traffic
from scaling.verify import verify, verify_conventional

# What is measured beside the dispatchers: one rank, which dispatches nothing, and the baseline.
ALONE, CONVENTIONAL = "one rank", "conventional"
STEPS = ("dispatch", "experts", "combine", "communication")
LOOPS = 3


@dataclass
class Result:
    """Of one variant on some ranks.

    failure: why there is nothing else.
    seconds: of each repeat, on the rank that took longest: "forward" and "backward", begun on all
        ranks at once on devices with work before it; "loop", of a pass of both among many, without
        any wait in between but their own. The conventional baseline has only a forward pass.
    steps: seconds of both passes in "dispatch", "experts", "combine", each without the waiting
        for other ranks, which is "communication"; "other" is the rest. Means over ranks and
        repeats.
    peak_bytes: most that a GPU's memory held in a training step with AdamW; 0 on CPUs.
    error: the largest relative distance from what one device computes; 0 on one rank.
    """

    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    error: float = 0.0

    def median(self, what: str) -> float:
        """Of "forward", "backward", "loop", or "total": forward and backward."""
        if what == "total":
            return self.median("forward") + self.median("backward")
        return statistics.median(self.seconds[what])


def verify_all(
    layer: Layer, expected: tuple[Tensor, ...], variants: list[str], traffic: Traffic
) -> dict[str, Result]:
    """Results with an error, or a reason for having none; raises as `verify`."""
    results = {name: Result() for name in variants}
    for name, result in results.items():
        if name == CONVENTIONAL:
            result.failure = why_not_conventional(layer, traffic)
            if not result.failure:
                result.error = verify_conventional(layer, expected)
        else:
            result.error = verify(layer, expected, name)
        layer.clear()
    return results


def why_not_conventional(layer: Layer, traffic: Traffic) -> str:
    """Why the baseline's rows do not fit, on any rank; empty if they do."""
    pairs_WW = traffic.pairs_WW
    most_pairs = int(torch.maximum(pairs_WW.sum(0), pairs_WW.sum(1)).max())
    needed = bytes_needed(most_pairs, layer.tokens.hidden_TH)
    if layer.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        # All ranks of a machine share it.
        free = _available_bytes() // layer.ranks.size
    if needed > 0.9 * min(layer.ranks.gather(free)):
        return f"left out: rows of all pairs take {needed / 1e9:.1f} GB a rank"
    return ""


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def measure_all(
    layer: Layer, results: dict[str, Result], repeats: int, advance: Callable[[], object]
) -> None:
    """Times of all variants by turns, then their steps and memory.

    advance: called `rounds(repeats)` times for each variant.
    """
    clock = Clock(layer.ranks)

    def by_turns(measure: Callable[[Layer, Clock, Result], None]) -> None:
        for name, result in results.items():
            if name != CONVENTIONAL:
                layer.choose(name)
                layer.clear()
                measure(layer, clock, result)
            advance()

    for _ in range(repeats):
        by_turns(_time)
        if CONVENTIONAL in results and not results[CONVENTIONAL].failure:
            layer.clear()
            _keep(results[CONVENTIONAL], "forward", clock(layer.conventional))
    for _ in range(LOOPS):
        by_turns(partial(_time_loop, repeats))
    by_turns(partial(_time_steps, repeats))
    # Its buffer would count as memory of the layer.
    clock.flushed = None
    by_turns(_weigh)
    layer.clear()


def rounds(repeats: int) -> int:
    return repeats + LOOPS + 2


def _time(layer: Layer, clock: Clock, result: Result) -> None:
    _keep(result, "forward", clock(layer.forward))
    _keep(result, "backward", clock(layer.backward))


def _time_loop(passes: int, layer: Layer, clock: Clock, result: Result) -> None:
    _keep(result, "loop", clock(partial(_loop, layer, passes), busy=False) / passes)


def _keep(result: Result, what: str, seconds: float) -> None:
    result.seconds.setdefault(what, []).append(seconds)


def _loop(layer: Layer, repeats: int) -> None:
    for _ in range(repeats):
        layer.clear()
        layer.forward()
        layer.backward()


def _time_steps(repeats: int, layer: Layer, clock: Clock, result: Result) -> None:
    totals = dict.fromkeys(("total", *STEPS), 0.0)
    for _ in range(repeats):
        layer.clear()
        for work in (layer.forward, layer.backward):
            with time_steps(layer.ranks.device) as seconds:
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


def _weigh(layer: Layer, _: Clock, result: Result) -> None:
    """The second of two steps, when the optimizer has its state."""
    if layer.ranks.device.type != "cuda":
        return
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=0.0)
    for _step in range(2):
        gc.collect()
        start_of_peak(layer.ranks.device)
        layer.clear()
        layer.forward()
        layer.backward()
        optimizer.step()
    result.peak_bytes = max(layer.ranks.gather(peak_bytes(layer.ranks.device)))
