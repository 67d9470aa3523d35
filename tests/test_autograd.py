"""The op inside autograd: second derivatives, NaN, autocast, activation checkpointing."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import RESULTS, TOLERANCES, assert_close, make_case, oracle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_moe import triton_flash_expert_func
from flash_moe.ops.backends import reference
from flash_moe.ops.backends.defaults import spmm_t_in_turn

BACKENDS = ("reference", "torch_sparse", "gather")


def place(backend: str, device: torch.device) -> torch.device:
    return device if backend == "gather" else torch.device("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str, device: torch.device) -> None:
    case = make_case(4, 8, 9, 2, device=place(backend, device))
    out = triton_flash_expert_func(*case.args(), backend=backend)
    grads = torch.autograd.grad(out.square().sum(), case.differentiable(), create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grads[0].sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_token_stays_there(backend: str, device: torch.device) -> None:
    indices = torch.arange(24).view(6, 4) % 20
    case = make_case(6, 8, 20, 4, device=place(backend, device), indices=indices)
    expected = triton_flash_expert_func(*case.args(), backend=backend).detach()
    with torch.no_grad():
        case.hidden_states[2] = float("nan")
    out = triton_flash_expert_func(*case.args(), backend=backend)
    assert out[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(out[others], expected[others])
    hidden_grad, down_grad, up_grad, weights_grad = torch.autograd.grad(
        out, case.differentiable(), case.grad
    )
    assert hidden_grad[others].isfinite().all()
    assert weights_grad[others].isfinite().all()
    # No other token uses the experts of token 2.
    touched = torch.zeros(20, dtype=torch.bool)
    touched[indices[2]] = True
    assert down_grad[~touched].isfinite().all()
    assert up_grad[~touched].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slot_of_a_token_that_is_infinite(backend: str, device: torch.device) -> None:
    indices = torch.tensor([[0, -1, 2], [-1, -1, 1]])
    case = make_case(2, 8, 4, 3, device=place(backend, device), indices=indices)
    with torch.no_grad():
        case.hidden_states[0], case.grad[1, 0] = float("inf"), float("nan")
    out = triton_flash_expert_func(*case.args(), backend=backend)
    (weights_grad,) = torch.autograd.grad(out, [case.routing_weights], case.grad)
    assert weights_grad[case.indices < 0].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str, device: torch.device) -> None:
    """silu' is 1 or 0 where the score is large, and no terms cancel on the way."""
    case = make_case(5, 8, 9, 3, device=place(backend, device))
    with torch.no_grad():
        case.hidden_states.mul_(1e8)
    out = triton_flash_expert_func(*case.args(), backend=backend)
    grads = torch.autograd.grad(out, case.differentiable(), case.grad)
    for name, result, expected in zip(RESULTS, (out, *grads), oracle(case), strict=True):
        assert_close(result, expected, TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend: str, device: torch.device) -> None:
    case = make_case(4, 8, 9, 2, device=place(backend, device))

    def op(hidden_states: Tensor) -> Tensor:
        return triton_flash_expert_func(hidden_states, *case.args()[1:], backend=backend)

    x = case.hidden_states.detach()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(op, (x,), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    where = place(backend, device)
    case = make_case(6, 40, 30, 4, dtype, where)

    def results(enabled: bool) -> list[Tensor]:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=enabled):
            out = triton_flash_expert_func(*case.args(), backend=backend)
            return [out, *torch.autograd.grad(out, case.differentiable(), case.grad)]

    for name, with_it, without in zip(RESULTS, results(True), results(False), strict=True):
        assert with_it.dtype == without.dtype, name
        assert torch.equal(with_it, without), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_changes_nothing(backend: str, device: torch.device) -> None:
    case = make_case(6, 16, 30, 4, device=place(backend, device))

    def op(*args: Tensor) -> Tensor:
        return triton_flash_expert_func(*args, backend=backend)

    plain = op(*case.args())
    recomputed = checkpoint(op, *case.args(), use_reentrant=False)
    assert torch.equal(plain, recomputed)
    for name, one, other in zip(
        RESULTS[1:],
        torch.autograd.grad(plain, case.differentiable(), case.grad),
        torch.autograd.grad(recomputed, case.differentiable(), case.grad),
        strict=True,
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(4), ids=RESULTS[1:])
def test_each_gradient_alone(backend: str, wanted: int, device: torch.device) -> None:
    case = make_case(7, 12, 30, 5, device=place(backend, device))
    expected = oracle(case)[1 + wanted]
    for position, leaf in enumerate(case.differentiable()):
        leaf.requires_grad_(position == wanted)
    triton_flash_expert_func(*case.args(), backend=backend).backward(case.grad)
    for position, leaf in enumerate(case.differentiable()):
        if position == wanted:
            assert leaf.grad is not None
            assert_close(leaf.grad, expected, TOLERANCES[torch.float32], RESULTS[1 + wanted])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_needed_is_computed(
    wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        primitive: Callable[..., object] = getattr(reference, name)

        def call(*args: object) -> object:
            calls.append(name)
            return primitive(*args)

        return call

    for name in ("sddmm", "spmm", "spmm_t"):
        monkeypatch.setattr(reference, name, counted(name))
    monkeypatch.setattr(reference, "spmm_t_both", partial(spmm_t_in_turn, reference.spmm_t))
    case = make_case(4, 8, 9, 2)
    for leaf, required in zip(case.differentiable(), wanted, strict=True):
        leaf.requires_grad_(required)
    out = triton_flash_expert_func(*case.args(), backend="reference")
    if any(wanted):
        out.backward(case.grad)
    hidden, down, up, weights = wanted
    assert calls.count("sddmm") == 1 + (hidden or down or weights)
    assert calls.count("spmm") == 1 + hidden
    assert calls.count("spmm_t") == down + up


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_wanted(backend: str, device: torch.device) -> None:
    case = make_case(3, 8, 9, 2, device=place(backend, device))
    with torch.inference_mode():
        out = triton_flash_expert_func(*case.args(), backend=backend)
    assert not out.requires_grad
    assert_close(out, oracle(case)[0], TOLERANCES[torch.float32], "output")
