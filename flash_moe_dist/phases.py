"""The steps of an expert-parallel layer: named in traces of torch.profiler, and timed on request.

dispatch, experts, combine                              of a forward pass
dispatch_backward, experts_backward, combine_backward   of a backward pass
communication                                           within these: waiting for other ranks
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler

# In the order in which they come; of a backward pass with _backward.
PHASES = ("dispatch", "experts", "combine", "communication")
# Of the block of `time_phases` that is open. Not of a thread: autograd has threads of its own.
_timer: "_Timer | None" = None


def phase(name: str) -> AbstractContextManager[object]:
    """A part of a layer's pass, as the range `flash_moe::name` of a trace."""
    traced: AbstractContextManager[object] = nullcontext()
    # PyTorch's own flag for this: entering a range takes as long as launching a kernel.
    if profiler._is_profiler_enabled:
        traced = profiler.record_function(f"flash_moe::{name}")
    return traced if _timer is None else _both(traced, _timer.timed(name))


def communication() -> AbstractContextManager[object]:
    """A wait for other ranks. Collectives have ranges of PyTorch's own in a trace."""
    return nullcontext() if _timer is None else _timer.timed("communication")


@contextmanager
def _both(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def time_phases(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds that the device spent in each step of all sharded layers in the block.

        with time_phases(device) as seconds:
            model(tokens).sum().backward()
        print(seconds["experts"], seconds["communication"])

    Yields a dictionary that is filled at the end of the block, after a wait for the device: for
    each step the sum over all passes, without the steps within it. Times are between CUDA events on
    the stream that the layer runs on (the host's clock on the CPU). So "communication" is what no
    other work hides; and where the device waits for the host, as it does after the counts of a
    dispatch, that is part of the step. Layers whose ep mesh has one rank have no steps.

    Raises:
        RuntimeError: within another such block.
    """
    global _timer
    if _timer is not None:
        raise RuntimeError("time_phases is timing already: its blocks cannot be nested")
    timer = _timer = _Timer(device)
    seconds: dict[str, float] = {}
    try:
        yield seconds
    finally:
        _timer = None
    seconds.update(timer.seconds())


class _Span:
    """From when it is made to `end`, on the current stream."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.within: list[_Span] = []
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
        return self.seconds() - sum(span.seconds() for span in self.within)


class _Timer:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[_Span] = []
        self.ended: list[_Span] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        span = _Span(name, self.device)
        if self.open:
            self.open[-1].within.append(span)
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
