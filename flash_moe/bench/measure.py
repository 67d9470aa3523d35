"""Errors against float64, memory and time of each variant in both directions."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from flash_moe.bench.cases import LEAVES, Func, Inputs
from flash_moe.bench.peers import SUBJECT

DIRECTIONS = ("forward", "backward")
# A result further from float64 than this is wrong, and gets no time: the op rounds once; autograd
# keeps its sums for table rows in 16 bits, and errs the more, the more tokens use a row.
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8}
LARGEST_PEER_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LARGEST_PEER_TABLE_ERROR = {torch.float32: 1e-5, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
RESULTS = ("output", *(f"gradient of {name}" for name in LEAVES))
TABLES = ("gradient of down_weights", "gradient of up_weights")
# Elements of the largest float64 tensor made on the way.
EXACT_ELEMENTS = {"cuda": 2**29, "cpu": 2**25}
# More than the level-2 cache of any GPU.
FLUSHED_BYTES = 2**28
# Each takes about 60 us on an H200: together longer than the host needs to launch a pass.
FLUSHES_AHEAD = 40

R = TypeVar("R")
S = TypeVar("S")
Work = Callable[[], R]


@dataclass
class Result:
    """Of one variant: why it has no times; seconds of each repeat, peak extra bytes, error.

    idle_seconds: of each repeat on a device that was idle, launching included.
    """

    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})
    idle_seconds: dict[str, list[float]] = field(
        default_factory=lambda: {d: [] for d in DIRECTIONS}
    )
    extra_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Clock:
    """Times calls. On CUDA each finds a cache full of something else.

    Either the host is ahead, as in a training step: the device still has work queued before the
    call's when the call has been launched. Or the device is idle: then the time has in it what
    the host needs to launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.flushed = (
            torch.zeros(FLUSHED_BYTES, device=device, dtype=torch.int8)
            if device.type == "cuda"
            else None
        )

    def __call__(self, work: Work[R], idle: bool = False) -> tuple[R, float]:
        """What `work` returns, and seconds."""
        if self.flushed is None:
            begin = time.perf_counter()
            result = work()
            return result, time.perf_counter() - begin
        for _ in range(1 if idle else FLUSHES_AHEAD):
            self.flushed.zero_()
        if idle:
            torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        result = work()
        events[1].record()
        torch.cuda.synchronize()
        return result, events[0].elapsed_time(events[1]) / 1e3

    def median(self, work: Work[R], repeats: int) -> float:
        """Seconds, after one call that does not count."""
        work()
        return statistics.median(self(work)[1] for _ in range(repeats))


class PeakMemory:
    """Bytes beyond what stood before and beyond all results, at the peak since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = start_of_peak(device)
        self.results = 0

    def __call__(self, work: Work[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
        results = work()
        self.results += sum(result.nbytes for result in results)
        return results, max(0, peak_bytes(self.device) - self.before - self.results)


def unobserved(work: Work[R]) -> tuple[R, None]:
    return work(), None


def count_launches(work: Work[R]) -> tuple[R, int]:
    """CUDA kernels that `work` starts, copies and fills by the driver not counted."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = work()
        torch.cuda.synchronize()
    return result, sum(
        event.device_type.name == "CUDA" and not event.name.startswith("Mem")
        for event in profile.events() or ()
    )


def one_pass(
    inputs: Inputs,
    func: Func,
    observe: Callable[[Work[tuple[Tensor, ...]]], tuple[tuple[Tensor, ...], S]],
) -> tuple[tuple[Tensor, ...], dict[str, S]]:
    """Output and gradients of the leaves; what `observe` says of each direction."""
    outs, forward = observe(lambda: (inputs.call(func),))
    grads, backward = observe(lambda: torch.autograd.grad(outs[0], inputs.leaves, inputs.grad))
    return (*outs, *grads), dict(zip(DIRECTIONS, (forward, backward), strict=True))


def measure(inputs: Inputs, variants: dict[str, Func], repeats: int) -> dict[str, Result]:
    """All variants: first verified, which compiles them, then memory, then times by turns.

    Verified again at the end: what is fast only once it is wrong gets no time either.

    Raises:
        RuntimeError: the result of the op is wrong, or a variant writes to the inputs; and
            whatever else the op raises. A peer's failure is kept in its result.
    """
    results = {name: Result() for name in variants}

    def of_all(step: Callable[[str, Func, Result], None]) -> None:
        for name, func in variants.items():
            result = results[name]
            if result.failure:
                continue
            gc.collect()
            try:
                step(name, func, result)
            except Exception as error:
                if name == SUBJECT:
                    raise
                # Without times, if it had any.
                result = results[name] = Result(failure=_first_line(error))
            if inputs.versions() != versions:
                raise RuntimeError(f"{name} writes to its inputs: nothing after it can be measured")
            if result.failure:
                gc.collect()
                # What the allocator keeps would be missing where kernels are loaded.
                torch.cuda.empty_cache()

    device = inputs.grad.device
    versions = inputs.versions()
    of_all(partial(_verify, inputs, exact_results(inputs)))
    of_all(partial(_weigh, inputs))
    clock = Clock(device)
    for _ in range(repeats):
        of_all(partial(_time, inputs, clock))
    of_all(partial(_verify, inputs, exact_results(inputs)))
    return results


def _first_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = next(iter(str(error).splitlines()), "")
    return (
        first if isinstance(error, RuntimeError) and first else f"{type(error).__name__}: {first}"
    )


def _verify(
    inputs: Inputs, exact: tuple[Tensor, ...], name: str, func: Func, result: Result
) -> None:
    computed, _ = one_pass(inputs, func, unobserved)
    errors = [relative_error(*pair) for pair in zip(computed, exact, strict=True)]
    for what, error in zip(RESULTS, errors, strict=True):
        limits = LARGEST_PEER_TABLE_ERROR if what in TABLES else LARGEST_PEER_ERROR
        limits = LARGEST_ERROR if name == SUBJECT else limits
        if error > limits[inputs.grad.dtype]:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} of the {what}")
    result.errors = {"forward": errors[0], "backward": max(errors[1:])}


def _weigh(inputs: Inputs, name: str, func: Func, result: Result) -> None:
    _, result.extra_bytes = one_pass(inputs, func, PeakMemory(inputs.grad.device))


def _time(inputs: Inputs, clock: Clock, name: str, func: Func, result: Result) -> None:
    for kept, idle in ((result.seconds, False), (result.idle_seconds, True)):
        if idle and inputs.grad.device.type == "cpu":
            continue
        # The results are let go of before the next pass.
        seconds = one_pass(inputs, func, partial(clock, idle=idle))[1]
        for direction in DIRECTIONS:
            kept[direction].append(seconds[direction])


def exact_results(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients of the leaves in float64, some tokens at a time.

    The formulas are those of `flash_moe.ops.flash_expert`; ids of -1 contribute nothing.
    """
    hidden_TH, down_EH, up_EH, weights_TK = (leaf.detach() for leaf in inputs.leaves)
    out_TH, hidden_grad_TH = (torch.zeros_like(hidden_TH, dtype=torch.float64) for _ in range(2))
    down_grad_EH, up_grad_EH = (torch.zeros_like(down_EH, dtype=torch.float64) for _ in range(2))
    weights_grad_TK = torch.zeros_like(weights_TK, dtype=torch.float64)
    step = max(1, EXACT_ELEMENTS[out_TH.device.type] // (weights_TK.shape[1] * out_TH.shape[1]))
    # t: tokens of a chunk; shapes (t, H, 1), (t, 1, K) and (t, K, 1) make products of matrices.
    for begin in range(0, len(out_TH), step):
        part = slice(begin, begin + step)
        empty = inputs.indices[part] < 0
        ids = inputs.indices[part].masked_fill(empty, 0)
        weights = weights_TK[part].double().masked_fill(empty, 0)
        hidden, grad = hidden_TH[part].double(), inputs.grad[part].double()
        down_rows, up_rows = down_EH[ids].double(), up_EH[ids].double()
        scores = (down_rows @ hidden[..., None])[..., 0]
        sigmoid = scores.sigmoid()
        activations = scores * sigmoid * weights
        activation_grads = (up_rows @ grad[..., None])[..., 0]
        score_grads = activation_grads * weights * sigmoid * (1 + scores * (1 - sigmoid))
        out_TH[part] = (activations[:, None] @ up_rows)[:, 0]
        hidden_grad_TH[part] = (score_grads[:, None] @ down_rows)[:, 0]
        weights_grad_TK[part] = (activation_grads * scores * sigmoid).masked_fill(empty, 0)
        del down_rows, up_rows
        for table_grad, values, rows in (
            (down_grad_EH, score_grads, hidden),
            (up_grad_EH, activations, grad),
        ):
            products = values[..., None] * rows[:, None]
            table_grad.index_add_(0, ids.flatten(), products.flatten(0, 1))
    return out_TH, hidden_grad_TH, down_grad_EH, up_grad_EH, weights_grad_TK


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Distance from `exact` over its norm, some rows at a time; infinite where it is no number.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != exact.shape:
        raise ValueError(f"expected a result of {tuple(exact.shape)}, got {tuple(result.shape)}")
    rows = max(1, EXACT_ELEMENTS[exact.device.type] // exact.shape[1])
    squares = torch.zeros(2, device=exact.device, dtype=torch.float64)
    for part, exact_part in zip(result.detach().split(rows), exact.split(rows), strict=True):
        exact_part = exact_part.double()
        difference = part.double() - exact_part
        squares += torch.stack([difference.square().sum(), exact_part.square().sum()])
    error = float((squares[0] / squares[1]).sqrt())
    return error if math.isfinite(error) else math.inf


def start_of_peak(device: torch.device) -> int:
    """Bytes in use; from here on the peak is counted anew."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What the C library keeps of freed memory would hide what a pass takes.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux: 5 sets the high-water mark of resident memory back.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since `start_of_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
