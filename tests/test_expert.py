"""Timings of the expert op: gather-and-matmul reference, CPU backend, Triton kernels.

    pytest tests/test_expert.py -s

prints a table for the device at hand. A time is printed only for a result that agrees with
float64. Without a GPU the Triton kernels are interpreted: their time says nothing of their speed.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from cases import RESULTS, TOLERANCES, Case, assert_close, make_case, oracle
from torch import Tensor

from flash_moe import triton_flash_expert_func
from flash_moe.ops.naive import naive_expert_func

Func = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# T, H, E, K; the interpreter takes seconds for what a GPU does in microseconds.
GPU_SHAPES = [(1024, 1024, 102_400, 64), (4096, 1024, 102_400, 64)]
CPU_SHAPES = [(32, 64, 1024, 8)]
SHAPES = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES
REPEATS = 20 if torch.cuda.is_available() else 3


def variants(
    shape: tuple[int, int, int, int], device: torch.device
) -> dict[str, tuple[Func, Case]]:
    def on_cpu(*args: Tensor) -> Tensor:
        return triton_flash_expert_func(*args, backend="torch_sparse")

    def triton(*args: Tensor) -> Tensor:
        return triton_flash_expert_func(*args, backend="gather")

    here = make_case(*shape, device=device)
    cpu = make_case(*shape, device="cpu")
    kernels = "triton" if device.type == "cuda" else "triton (interpreted)"
    return {
        f"reference, {device.type}": (naive_expert_func, here),
        "torch.sparse, cpu": (on_cpu, cpu),
        f"{kernels}, {device.type}": (triton, here),
    }


def verify(func: Func, case: Case, expected: tuple[Tensor, ...], what: str) -> None:
    out = func(*case.args())
    results = (out, *torch.autograd.grad(out, case.differentiable(), case.grad))
    for name, result, one in zip(RESULTS, results, expected, strict=True):
        assert_close(result, one.to(result.device), TOLERANCES[torch.float32], f"{what}: {name}")


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    timed()
    return statistics.median(timed() for _ in range(REPEATS))


def report(
    title: str, shape: tuple[int, int, int, int], times: dict[str, float], device: torch.device
) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"\n{title}, T, H, E, K = {shape}, float32, {name}, torch {torch.__version__}")
    reference = times[next(iter(times))]
    for variant, milliseconds in times.items():
        print(f"  {variant:28} {milliseconds:10.3f} ms {reference / milliseconds:8.2f}x reference")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expert_forward_throughput(shape: tuple[int, int, int, int], device: torch.device) -> None:
    times: dict[str, float] = {}
    expected = oracle(make_case(*shape, device=device))
    for name, (func, case) in variants(shape, device).items():
        verify(func, case, expected, name)
        with torch.no_grad():
            times[name] = median_ms(lambda f=func, c=case: f(*c.args()), device)  # type: ignore[misc]
    report("forward", shape, times, device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expert_backward_throughput(shape: tuple[int, int, int, int], device: torch.device) -> None:
    times: dict[str, float] = {}
    expected = oracle(make_case(*shape, device=device))
    for name, (func, case) in variants(shape, device).items():
        verify(func, case, expected, name)
        out = func(*case.args())

        def backward(out: Tensor = out, case: Case = case) -> object:
            return torch.autograd.grad(out, case.differentiable(), case.grad, retain_graph=True)

        times[name] = median_ms(backward, device)
    report("backward", shape, times, device)
