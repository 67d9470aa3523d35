"""Time, memory and error of the expert op beside gather and matrix product, on one device.

    python -m flash_moe.bench --tokens 2048 --hidden-size 512 --num-experts 65536 \\
        --num-experts-per-tok 64 --dtype float32

Uniform random routing. Variants run by turns on the same inputs; each must agree with
float64 before its times are printed. Memory is the peak, until the end of that direction, beyond
what stood before the forward pass and beyond the results themselves (output, gradients).
"""

import argparse
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_moe.ops.flash_expert import triton_flash_expert_func
from flash_moe.ops.naive import naive_expert_func

Func = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# A result further from float64 than this is wrong, and gets no time: the op rounds once; autograd
# keeps its sums for table rows in 16 bits, and errs the more, the more tokens use a row.
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8}
LARGEST_PEER_ERROR = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
GATHERED_ELEMENTS = 2**26


@dataclass(frozen=True)
class Inputs:
    """Leaves (hidden states, down table, up table, routing weights), ids, gradient of output."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    indices: Tensor
    grad: Tensor

    def call(self, func: Func) -> Tensor:
        hidden_states, down_weights, up_weights, routing_weights = self.leaves
        return func(hidden_states, down_weights, up_weights, self.indices, routing_weights)


@dataclass(frozen=True)
class Measurement:
    """Of one variant and direction: seconds of each repeat, peak extra bytes, worst error."""

    seconds: list[float]
    extra_bytes: int
    error: float


VARIANTS: dict[str, Func] = {
    "flash_moe": triton_flash_expert_func,
    "gather and matmul": naive_expert_func,
}


def make_inputs(
    tokens: int, hidden_size: int, experts: int, slots: int, dtype: torch.dtype, device: str
) -> Inputs:
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=draw, device=device, dtype=torch.float32) * std
        return values.to(dtype).requires_grad_()

    leaves = (
        normal(tokens, hidden_size),
        normal(experts, hidden_size, std=hidden_size**-0.5),
        normal(experts, hidden_size),
        normal(tokens, slots),
    )
    indices = torch.randint(experts, (tokens, slots), generator=draw, device=device)
    return Inputs(leaves, indices, normal(tokens, hidden_size).detach())


def exact_results(inputs: Inputs) -> list[Tensor]:
    """Output and gradients in float64, some tokens at a time."""
    hidden_states, down, up, weights = (
        leaf.detach().double().requires_grad_() for leaf in inputs.leaves
    )
    outs = []
    for part in torch.arange(len(inputs.indices)).split(
        max(1, GATHERED_ELEMENTS // (inputs.indices.shape[1] * hidden_states.shape[1]))
    ):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        out = naive_expert_func(hidden_states[rows], down, up, inputs.indices[rows], weights[rows])
        out.backward(inputs.grad[rows].double())
        outs.append(out.detach())
    grads = [leaf.grad for leaf in (hidden_states, down, up, weights)]
    return [torch.cat(outs), *(grad for grad in grads if grad is not None)]


def relative_error(result: Tensor, exact: Tensor) -> float:
    distance = torch.linalg.vector_norm(result.detach().double() - exact)
    return float(distance / torch.linalg.vector_norm(exact))


def measure(inputs: Inputs, repeats: int) -> dict[tuple[str, str], Measurement]:
    """All variants, forward and backward, in turns.

    Raises:
        RuntimeError: a variant's result is wrong.
    """
    exact = exact_results(inputs)
    seconds: dict[tuple[str, str], list[float]] = {}
    extra: dict[tuple[str, str], int] = {}
    errors: dict[tuple[str, str], float] = {}
    for name, func in VARIANTS.items():
        results, _, _ = one_pass(inputs, func, measure_memory=False)
        found = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
        errors[name, "forward"], errors[name, "backward"] = found[0], max(found[1:])
        limits = LARGEST_ERROR if name == "flash_moe" else LARGEST_PEER_ERROR
        if not max(found) <= limits[inputs.grad.dtype]:
            raise RuntimeError(f"{name} is wrong: relative error {max(found):.1e}")
    del exact, results
    for name, func in VARIANTS.items():
        _, _, memory = one_pass(inputs, func, measure_memory=True)
        extra |= {(name, direction): count for direction, count in memory.items()}
    for _ in range(repeats):
        for name, func in VARIANTS.items():
            _, times, _ = one_pass(inputs, func, measure_memory=False)
            for direction in ("forward", "backward"):
                seconds.setdefault((name, direction), []).append(times[direction])
    return {key: Measurement(seconds[key], extra[key], errors[key]) for key in seconds}


def one_pass(
    inputs: Inputs, func: Func, measure_memory: bool
) -> tuple[list[Tensor], dict[str, float], dict[str, int]]:
    """Output and gradients; seconds, and extra bytes (measuring them takes time), by direction."""
    device = inputs.grad.device
    times: dict[str, float] = {}
    memory: dict[str, int] = {}
    results: list[Tensor] = []
    gc.collect()
    before = start_of_peak(device) if measure_memory else 0

    def timed(direction: str, work: Callable[[], list[Tensor]]) -> None:
        begin = time.perf_counter()
        results.extend(work())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[direction] = time.perf_counter() - begin
        if measure_memory:
            result_bytes = sum(result.nbytes for result in results)
            memory[direction] = max(0, peak(device) - before - result_bytes)

    timed("forward", lambda: [inputs.call(func)])
    timed(
        "backward",
        lambda: list(torch.autograd.grad(results[0], inputs.leaves, inputs.grad)),
    )
    return results, times, memory


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


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def report(measurements: dict[tuple[str, str], Measurement]) -> None:
    print(
        f"{'':28}{'median ms':>10}{'20%':>10}{'80%':>10}{'ratio':>8}{'extra MB':>10}{'error':>10}"
    )
    for direction in ("forward", "backward"):
        peer = statistics.median(measurements["gather and matmul", direction].seconds)
        for name in VARIANTS:
            one = measurements[name, direction]
            median = statistics.median(one.seconds)
            low, *_, high = statistics.quantiles(one.seconds, n=5)
            print(
                f"{direction + ', ' + name:28}{median * 1e3:10.2f}{low * 1e3:10.2f}"
                f"{high * 1e3:10.2f}{peer / median:7.2f}x{one.extra_bytes / 1e6:10.1f}"
                f"{one.error:10.1e}"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flash_moe.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-experts", type=int, default=65536)
    parser.add_argument("--num-experts-per-tok", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    for name in ("tokens", "hidden_size", "num_experts", "num_experts_per_tok"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (args.tokens, args.hidden_size, args.num_experts, args.num_experts_per_tok)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"
    print(
        f"T, H, E, K = {shape}, {args.dtype}, {device} ({where}), torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    report(measure(make_inputs(*shape, getattr(torch, args.dtype), device), args.repeats))


if __name__ == "__main__":
    main()
