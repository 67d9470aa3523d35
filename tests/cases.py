"""Inputs of the expert op, its float64 oracle, and how far a result may be from it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flash_moe.ops.naive import naive_expert_func

# The largest error of one rounding in 16 bits; sums of thousands in float32 and float64.
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}
# Triton's interpreter cuts digits off where a GPU rounds.
INTERPRETED_TOLERANCES = TOLERANCES | {torch.bfloat16: 2**-7}


@dataclass
class Case:
    """Arguments of `triton_flash_expert_func`, and a gradient of its result."""

    hidden_states: Tensor
    down_weights: Tensor
    up_weights: Tensor
    indices: Tensor
    routing_weights: Tensor
    grad: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.hidden_states,
            self.down_weights,
            self.up_weights,
            self.indices,
            self.routing_weights,
        )

    def differentiable(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden_states, self.down_weights, self.up_weights, self.routing_weights


def make_case(
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    slots: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    indices: Tensor | None = None,
) -> Case:
    """Random inputs drawn on the CPU; ids are uniform and may repeat, unless given."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype)

    scale = max(1, hidden_size) ** -0.5
    if indices is None:
        indices = torch.randint(num_experts, (num_tokens, slots), generator=draw)
    return Case(
        normal(num_tokens, hidden_size).requires_grad_(),
        (normal(num_experts, hidden_size) * scale).requires_grad_(),
        normal(num_experts, hidden_size).requires_grad_(),
        indices.to(device),
        normal(num_tokens, slots).requires_grad_(),
        normal(num_tokens, hidden_size),
    )


def oracle(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients (hidden states, down, up, routing weights) in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in case.differentiable()]
    hidden_states, down_weights, up_weights, routing_weights = leaves
    out = naive_expert_func(hidden_states, down_weights, up_weights, case.indices, routing_weights)
    return out.detach(), *torch.autograd.grad(out, leaves, case.grad.double())


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||, and not a number if any element is not."""
    distance = torch.linalg.vector_norm(result.detach().double() - expected.double())
    return float(distance / torch.linalg.vector_norm(expected.double()).clamp(min=1e-300))


def assert_close(
    result: Tensor,
    expected: Tensor,
    tolerance: float,
    what: str,
    magnitude: Tensor | None = None,
) -> None:
    """Hold the error under `tolerance` times the norm of `magnitude` (by default `expected`)."""
    assert result.shape == expected.shape, what
    if expected.count_nonzero() == 0:
        assert result.count_nonzero() == 0, what
        return
    error = relative_error(result, expected)
    if magnitude is not None:
        error *= float(expected.norm() / magnitude.norm())
    assert error <= tolerance, f"{what}: relative error {error:.2e} over {tolerance:.2e}"


def magnitudes(case: Case) -> tuple[Tensor, ...]:
    """The oracle's results with every term positive: what cancels in them is no error."""
    leaves = (tensor.detach().abs() for tensor in case.differentiable())
    hidden_states, down_weights, up_weights, routing_weights = leaves
    return oracle(
        Case(
            hidden_states,
            down_weights,
            up_weights,
            case.indices,
            routing_weights,
            case.grad.abs(),
        )
    )


def needs_gib(gib: int) -> None:
    """Skip the test, with the reason, on a GPU with less free memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} GiB are free")


RESULTS = ("output", "hidden_states", "down_weights", "up_weights", "routing_weights")
