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
from flash_moe_dist.volume import Load
from scaling.conventional import bytes_needed
from scaling.layer import Layer
from scaling.ranks import Clock
from scaling.verify import verify, verify_conventional

CONVENTIONAL = "conventional"
STEPS = ("dispatch", "experts", "combine", "communication")


@dataclass
class Result:
    """Of one variant on some ranks.

    failure: why there is nothing else.
    seconds: by "forward", "backward", and "loop" for both in a training loop: of each repeat, on
        the rank that took longest. The conventional baseline has only a forward pass.
    steps: seconds of both passes in "dispatch", "experts", "combine", each without the waiting
        for other ranks, which is "communication"; "other" is the rest. Means over ranks.
    peak_bytes: most that a rank's memory held in a training step with AdamW.
    error: the largest relative distance from what one device computes.
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
    layer: Layer, expected: tuple[Tensor, ...], variants: list[str]
) -> dict[str, Result]:
    """Results with an error, or a reason for having none; raises as `verify`."""
    results = {name: Result() for name in variants}
    for name, result in results.items():
        if name == CONVENTIONAL:
            result.failure = why_not_conventional(layer, layer.load())
            if not result.failure:
                result.error = verify_conventional(layer, expected)
        else:
            result.error = verify(layer, expected, name)
        layer.clear()
    return results


def why_not_conventional(layer: Layer, load: Load) -> str:
    """Why the baseline's rows do not fit, on any rank; empty if they do."""
    needed = bytes_needed(load.pairs_sent, load.pairs_received, layer.tokens.hidden_TH)
    if layer.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        # All ranks of a machine share it.
        free = _available_bytes() // layer.ranks.size
    if any(layer.ranks.gather(needed > 0.9 * free)):
        most = max(layer.ranks.gather(needed))
        return f"left out: rows of all pairs take {most / 1e9:.1f} GB a rank"
    return ""


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def measure_all(
    layer: Layer, results: dict[str, Result], repeats: int, advance: Callable[[], object]
) -> None:
    """Times of all variants by turns, then what is measured of each: loop, steps, memory.

    advance: called as a variant is done.
    """
    clock = Clock(layer.ranks)
    for _ in range(repeats):
        for name, result in results.items():
            if name != CONVENTIONAL:
                layer.choose(name)
                layer.clear()
                _keep(result, "forward", clock(layer.forward))
                _keep(result, "backward", clock(layer.backward))
            elif not result.failure:
                layer.clear()
                _keep(result, "forward", clock(layer.conventional))
    for name, result in results.items():
        if name != CONVENTIONAL:
            layer.choose(name)
            _keep(result, "loop", clock(partial(_loop, layer, repeats), busy=False) / repeats)
            result.steps = _steps(layer, clock, repeats)
            result.peak_bytes = _peak_of_training(layer)
            layer.clear()
        advance()


def _keep(result: Result, what: str, seconds: float) -> None:
    result.seconds.setdefault(what, []).append(seconds)


def _loop(layer: Layer, repeats: int) -> None:
    for _ in range(repeats):
        layer.clear()
        layer.forward()
        layer.backward()


def _steps(layer: Layer, clock: Clock, repeats: int) -> dict[str, float]:
    """Means over repeats and ranks; all of it is the experts' on one rank."""
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
    if layer.ranks.size == 1:
        return {"experts": mean["total"]}
    total = mean.pop("total")
    return mean | {"other": total - sum(mean.values())}


def _peak_of_training(layer: Layer) -> int:
    """Of the second of two steps, when the optimizer has its state."""
    layer.clear()
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=0.0)
    for _ in range(2):
        gc.collect()
        start_of_peak(layer.ranks.device)
        layer.clear()
        layer.forward()
        layer.backward()
        optimizer.step()
    return max(layer.ranks.gather(peak_bytes(layer.ranks.device)))
