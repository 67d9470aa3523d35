"""The op against float64 for inputs that hypothesis makes up."""

import torch
from cases import (
    INTERPRETED_TOLERANCES,
    RESULTS,
    TOLERANCES,
    Case,
    assert_close,
    magnitudes,
    make_case,
    oracle,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_moe import triton_flash_expert_func

LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "strided": lambda tensor: tensor.repeat(1, 2)[:, : tensor.shape[1]],
    "offset": lambda tensor: torch.cat([tensor[:1], tensor])[1:],
}


@st.composite
def cases(draw: st.DrawFn, max_size: int) -> Case:
    size = st.integers(0, max_size)
    num_experts = draw(st.integers(1, 4 * max_size))
    indices = make_indices(
        draw(size), draw(size), num_experts, draw(st.sampled_from([0.0, 1.0, 4.0])), draw(size)
    )
    case = make_case(
        indices.shape[0],
        draw(st.integers(1, 5 * max_size)),
        num_experts,
        indices.shape[1],
        draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        seed=draw(st.integers(0, 100)),
        indices=indices.to(draw(st.sampled_from([torch.int32, torch.int64]))),
    )
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    for name in ("hidden_states", "down_weights", "up_weights", "indices", "routing_weights"):
        tensor = layout(getattr(case, name).detach())
        setattr(case, name, tensor.requires_grad_(tensor.is_floating_point()))
    return case


def make_indices(tokens: int, slots: int, num_experts: int, skew: float, seed: int) -> Tensor:
    """Ids in [-1, num_experts); the larger the skew, the more of them are small."""
    draw = torch.Generator().manual_seed(seed)
    shares = torch.rand(tokens, slots, generator=draw) ** (1 + skew)
    return (shares * (num_experts + 1)).long() - 1


def check(case: Case, backend: str) -> None:
    out = triton_flash_expert_func(*case.args(), backend=backend)
    results = (out, *torch.autograd.grad(out, case.differentiable(), case.grad))
    interpreted = backend == "gather" and not case.grad.is_cuda
    tolerances = INTERPRETED_TOLERANCES if interpreted else TOLERANCES
    for name, result, expected, magnitude in zip(
        RESULTS, results, oracle(case), magnitudes(case), strict=True
    ):
        # A little more for float32 sums on the way.
        assert_close(result, expected, 1.01 * tolerances[result.dtype], name, magnitude)


@given(cases(max_size=20))
@settings(max_examples=150, deadline=None)
def test_sparse(case: Case) -> None:
    check(case, "torch_sparse")


@given(cases(max_size=20))
@settings(max_examples=150, deadline=None)
def test_reference(case: Case) -> None:
    check(case, "reference")


@given(cases(max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_gather(case: Case) -> None:
    if torch.cuda.is_available():
        for name in ("hidden_states", "down_weights", "up_weights", "routing_weights"):
            setattr(case, name, getattr(case, name).detach().cuda().requires_grad_())
        case.indices, case.grad = case.indices.cuda(), case.grad.cuda()
    check(case, "gather")
