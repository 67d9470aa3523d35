"""Error against float64, peak memory and time of each variant, forward and backward.

T tokens, H hidden size, E experts, K experts per token.
"""

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

from flash_moe.bench.baselines import OURS
from flash_moe.bench.cases import LEAVES, Func, Inputs
from flash_moe.deprecated import resolve_old_names

DIRECTIONS = ("forward", "backward")
# Largest relative error of a correct result. The op rounds once; baselines round intermediate
# results, and accumulate gradients of tables in 16 bits, one rounding for every token of an expert.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8}
MAX_BASELINE_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MAX_BASELINE_TABLE_ERROR = {torch.float32: 1e-5, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
RESULTS = ("output", *(f"gradient of {name}" for name in LEAVES))
TABLES = ("gradient of down_weights", "gradient of up_weights")
# Most elements of a temporary float64 tensor.
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
    """Measurements of one variant; the keys of dictionaries are directions.

    failure: reason if the variant could not be measured, otherwise empty.
    seconds: time of each repeat, on a device that is busy until the pass has been launched.
    idle_seconds: time of each repeat on an idle device, so that launching is included; none on the
        CPU.
    extra_bytes: peak memory beyond the inputs and the results.
    errors: largest relative error of the results.
    """

    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})
    idle_seconds: dict[str, list[float]] = field(
        default_factory=lambda: {d: [] for d in DIRECTIONS}
    )
    extra_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Clock:
    """Timer of calls. On CUDA it flushes the level-2 cache before each call.

    By default the device is still busy with the flushes when the call has been launched, as in a
    training step whose host runs ahead, so that launching is not timed. With `idle` the device
    waits for the host, so that it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.flushed = (
            torch.zeros(FLUSHED_BYTES, device=device, dtype=torch.int8)
            if device.type == "cuda"
            else None
        )

    def __call__(self, work: Work[R], idle: bool = False) -> tuple[R, float]:
        """Run `work`; return its result and the seconds it took."""
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
        """Median seconds of a call, after one that is not timed."""
        work()
        return statistics.median(self(work)[1] for _ in range(repeats))


class PeakMemory:
    """Peak bytes since construction, minus the bytes in use then and those of the results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = reset_peak_bytes(device)
        self.results = 0

    def __call__(self, work: Work[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
        """Run `work`; return its results and the peak extra bytes so far."""
        results = work()
        self.results += sum(result.nbytes for result in results)
        return results, max(0, peak_bytes(self.device) - self.before - self.results)


def unobserved(work: Work[R]) -> tuple[R, None]:
    """Run `work` and measure nothing."""
    return work(), None


def count_launches(work: Work[R]) -> tuple[R, int]:
    """Run `work` and count its CUDA kernels, without the driver's copies and fills."""
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
    """Run one forward and one backward pass, each through `observe`.

    observe: runs the work it is given; returns the result and a measurement.

    Returns:
        The output and the gradients of the leaves, and the measurement of each direction.
    """
    outs, forward = observe(lambda: (inputs.call(func),))
    grads, backward = observe(lambda: torch.autograd.grad(outs[0], inputs.leaves, inputs.grad))
    return (*outs, *grads), dict(zip(DIRECTIONS, (forward, backward), strict=True))


def measure(inputs: Inputs, variants: dict[str, Func], repeats: int) -> dict[str, Result]:
    """Measure all variants: verify them, which also compiles them, then memory, then times.

    Repeats of the variants are interleaved. All are verified again at the end, so that a variant
    whose result becomes wrong in later calls gets no time.

    Raises:
        RuntimeError: the op's result is wrong, or a variant writes to the inputs.
        Exception: anything else that the op raises. A baseline's error becomes its `failure`.
    """
    results = {name: Result() for name in variants}

    def for_each_variant(step: Callable[[str, Func, Result], None]) -> None:
        for name, func in variants.items():
            result = results[name]
            if result.failure:
                continue
            gc.collect()
            try:
                step(name, func, result)
            except Exception as error:
                if name == OURS:
                    raise
                # Drops what was measured before.
                result = results[name] = Result(failure=_first_line(error))
            if inputs.versions() != versions:
                raise RuntimeError(f"{name} writes to its inputs: nothing after it can be measured")
            if result.failure:
                gc.collect()
                # Loading kernels needs memory that PyTorch's allocator would keep reserved.
                torch.cuda.empty_cache()

    device = inputs.grad.device
    versions = inputs.versions()
    for_each_variant(partial(verify, inputs, exact_results(inputs)))
    for_each_variant(partial(measure_memory, inputs))
    clock = Clock(device)
    for _ in range(repeats):
        for_each_variant(partial(measure_times, inputs, clock))
    for_each_variant(partial(verify, inputs, exact_results(inputs)))
    return results


def _first_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = next(iter(str(error).splitlines()), "")
    return (
        first if isinstance(error, RuntimeError) and first else f"{type(error).__name__}: {first}"
    )


def verify(
    inputs: Inputs, exact: tuple[Tensor, ...], name: str, func: Func, result: Result
) -> None:
    """Compare a variant's results with `exact`, and record its errors.

    Raises:
        RuntimeError: an error is above the limit of the dtype.
    """
    computed, _ = one_pass(inputs, func, unobserved)
    errors = [relative_error(*pair) for pair in zip(computed, exact, strict=True)]
    for what, error in zip(RESULTS, errors, strict=True):
        limits = MAX_BASELINE_TABLE_ERROR if what in TABLES else MAX_BASELINE_ERROR
        limits = MAX_ERROR if name == OURS else limits
        if error > limits[inputs.grad.dtype]:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} of the {what}")
    result.errors = {"forward": errors[0], "backward": max(errors[1:])}


def measure_memory(inputs: Inputs, name: str, func: Func, result: Result) -> None:
    """Record the peak extra bytes of a pass."""
    _, result.extra_bytes = one_pass(inputs, func, PeakMemory(inputs.grad.device))


def measure_times(inputs: Inputs, clock: Clock, name: str, func: Func, result: Result) -> None:
    """Record the seconds of one pass, and on CUDA of another on an idle device."""
    for recorded, idle in ((result.seconds, False), (result.idle_seconds, True)):
        if idle and inputs.grad.device.type == "cpu":
            continue
        # Indexed here, so that the results are freed before the next pass.
        seconds = one_pass(inputs, func, partial(clock, idle=idle))[1]
        for direction in DIRECTIONS:
            recorded[direction].append(seconds[direction])


def exact_results(inputs: Inputs) -> tuple[Tensor, ...]:
    """Compute output and gradients of the leaves in float64, a chunk of tokens at a time.

    Uses the formulas in `flash_moe.ops.expert_math`; ids of -1 contribute nothing.

    Returns:
        Output (T, H), then gradients in the order of LEAVES, all float64.
    """
    hidden_TH, down_EH, up_EH, weights_TK = (leaf.detach() for leaf in inputs.leaves)
    out_TH, hidden_grad_TH = (torch.zeros_like(hidden_TH, dtype=torch.float64) for _ in range(2))
    down_grad_EH, up_grad_EH = (torch.zeros_like(down_EH, dtype=torch.float64) for _ in range(2))
    weights_grad_TK = torch.zeros_like(weights_TK, dtype=torch.float64)
    step = max(1, EXACT_ELEMENTS[out_TH.device.type] // (weights_TK.shape[1] * out_TH.shape[1]))
    # t: tokens of a chunk; matmuls have operands (t, H, 1), (t, 1, K) and (t, K, 1).
    for begin in range(0, len(out_TH), step):
        chunk = slice(begin, begin + step)
        empty = inputs.indices[chunk] < 0
        ids = inputs.indices[chunk].masked_fill(empty, 0)
        weights = weights_TK[chunk].double().masked_fill(empty, 0)
        hidden, grad = hidden_TH[chunk].double(), inputs.grad[chunk].double()
        down_rows, up_rows = down_EH[ids].double(), up_EH[ids].double()
        scores = (down_rows @ hidden[..., None])[..., 0]
        sigmoid = scores.sigmoid()
        activations = scores * sigmoid * weights
        activation_grads = (up_rows @ grad[..., None])[..., 0]
        score_grads = activation_grads * weights * sigmoid * (1 + scores * (1 - sigmoid))
        out_TH[chunk] = (activations[:, None] @ up_rows)[:, 0]
        hidden_grad_TH[chunk] = (score_grads[:, None] @ down_rows)[:, 0]
        weights_grad_TK[chunk] = (activation_grads * scores * sigmoid).masked_fill(empty, 0)
        del down_rows, up_rows
        for table_grad, values, rows in (
            (down_grad_EH, score_grads, hidden),
            (up_grad_EH, activations, grad),
        ):
            products = values[..., None] * rows[:, None]
            table_grad.index_add_(0, ids.flatten(), products.flatten(0, 1))
    return out_TH, hidden_grad_TH, down_grad_EH, up_grad_EH, weights_grad_TK


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Distance between `result` and `exact`, divided by the norm of `exact`.

    Infinite if the quotient is not finite. Computed in float64, some rows at a time.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != exact.shape:
        raise ValueError(f"result must have shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    rows = max(1, EXACT_ELEMENTS[exact.device.type] // exact.shape[1])
    squares = torch.zeros(2, device=exact.device, dtype=torch.float64)
    for chunk, exact_chunk in zip(result.detach().split(rows), exact.split(rows), strict=True):
        exact_chunk = exact_chunk.double()
        difference = chunk.double() - exact_chunk
        squares += torch.stack([difference.square().sum(), exact_chunk.square().sum()])
    error = float((squares[0] / squares[1]).sqrt())
    return error if math.isfinite(error) else math.inf


def reset_peak_bytes(device: torch.device) -> int:
    """Start measuring `peak_bytes` from now on; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Freed memory that the C library has not returned would hide what a pass allocates.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux: writing 5 resets the high-water mark of resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since `reset_peak_bytes`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


resolve_old_names(__name__)
