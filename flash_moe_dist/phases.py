"""Phases of a pass through an expert-parallel layer: trace ranges, and device time on request.

dispatch, experts, combine                              phases of a forward pass
combine_backward, experts_backward, dispatch_backward   phases of a backward pass
communication                                           waits for other ranks, within a phase

The transfer of the combine starts within "experts", as soon as the partial sums are written.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler

from flash_moe.arguments import checked_device

# In the order of a forward pass; names in a backward pass end in _backward.
PHASES = ("dispatch", "experts", "combine", "communication")
# Timer of the open `time_phases` block. Not thread-local: backward runs on autograd's threads.
_timer: "_Timer | None" = None


def phase(name: str) -> AbstractContextManager[object]:
    """Mark the block as the phase `name`: the range `flash_moe::name` of a profiler trace."""
    traced: AbstractContextManager[object] = nullcontext()
    # Entering a range takes as long as launching a kernel, so check PyTorch's own flag first.
    if profiler._is_profiler_enabled:
        traced = profiler.record_function(f"flash_moe::{name}")
    return traced if _timer is None else _both(traced, _timer.timed(name))


def communication() -> AbstractContextManager[object]:
    """Mark the block as a wait for other ranks; a trace shows PyTorch's range of the collective."""
    return nullcontext() if _timer is None else _timer.timed("communication")


@contextmanager
def _both(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def time_phases(device: torch.device | str) -> Iterator[dict[str, float]]:
    """Measure the device time of each phase of all sharded layers within the block.

        with time_phases(device) as seconds:
            model(tokens).sum().backward()
        print(seconds["experts"], seconds["communication"])

    Yields a dictionary that is filled at the end of the block, after a device synchronization:
    seconds by phase, summed over all passes, each phase without the phases nested in it. Times are
    differences of CUDA events on the stream that the layer runs on (of the host's clock on the
    CPU), so "communication" is the exposed part, which no other work hides, and a phase includes
    the time in which the device waits for the host, as when `dispatch` reads counts. Layers whose
    ep mesh has one rank have no phases.

    Args:
        device: where the layers run.

    Raises:
        TypeError: `device` is no device.
        ValueError: PyTorch knows no device of that name.
        RuntimeError: the block is within another `time_phases` block.
    """
    global _timer
    device = checked_device("device", device)
    if _timer is not None:
        raise RuntimeError("time_phases blocks cannot be nested")
    timer = _timer = _Timer(device)
    seconds: dict[str, float] = {}
    try:
        yield seconds
    finally:
        _timer = None
    seconds.update(timer.seconds())


class _Span:
    """Interval on the current stream, from construction to `end`."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.nested: list[_Span] = []
        self.first = self.now()

    def end(self) -> None:
        self.last = self.now()

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> float:
        if self.device.type != "cuda":
            return self.last - self.first
        return self.first.elapsed_time(self.last) / 1e3

    def own_seconds(self) -> float:
        return self.seconds() - sum(span.seconds() for span in self.nested)


class _Timer:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[_Span] = []
        self.ended: list[_Span] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        span = _Span(name, self.device)
        if self.open:
            self.open[-1].nested.append(span)
        self.open.append(span)
        yield
        span.end()
        self.open.remove(span)
        self.ended.append(span)

    def seconds(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = defaultdict(float)
        for span in self.ended:
            total[span.name] += span.own_seconds()
        return dict(total)
