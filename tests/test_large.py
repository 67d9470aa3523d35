"""Values on both sides of the 2^31st element of the tables, of the tokens and of the pairs."""

import pytest
import torch
from cases import RESULTS, TOLERANCES, assert_close, needs_gib
from torch import Tensor

from flash_moe import triton_flash_expert_func
from flash_moe.ops.backends import load_backend
from flash_moe.ops.backends.gather import add_partial_sums
from flash_moe.ops.naive import naive_expert_func
from flash_moe.ops.pairs import Pairs

BOUNDARY = 2**31
HIDDEN_SIZE = 1024
ROW = BOUNDARY // HIDDEN_SIZE


def normal(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16)


def expected_results(
    hidden_states: Tensor, down: Tensor, up: Tensor, indices: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    leaves = [one.detach().double().requires_grad_() for one in (hidden_states, down, up, weights)]
    out = naive_expert_func(leaves[0], leaves[1], leaves[2], indices, leaves[3])
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.gpu
def test_tables() -> None:
    needs_gib(30)
    num_experts = ROW + 64
    down = (normal(num_experts, HIDDEN_SIZE, seed=0) / 32).requires_grad_()
    up = normal(num_experts, HIDDEN_SIZE, seed=1).requires_grad_()
    hidden_states = normal(40, HIDDEN_SIZE, seed=2).requires_grad_()
    weights, grad = normal(40, 6, seed=3).requires_grad_(), normal(40, HIDDEN_SIZE, seed=4)
    rows = torch.tensor([0, 1, ROW - 1, ROW, ROW + 1, num_experts - 1], device="cuda")
    picks = torch.randint(len(rows), (40, 6), device="cuda")
    out = triton_flash_expert_func(hidden_states, down, up, rows[picks], weights)
    grads = torch.autograd.grad(out, (hidden_states, down, up, weights), grad)
    assert grads[1].count_nonzero() == grads[1][rows].count_nonzero()
    results = (out, grads[0], grads[1][rows], grads[2][rows], grads[3])
    wanted = expected_results(hidden_states, down[rows], up[rows], picks, weights, grad)
    for name, result, expected in zip(RESULTS, results, wanted, strict=True):
        assert_close(result, expected, TOLERANCES[torch.bfloat16], name)


@pytest.mark.gpu
def test_tokens() -> None:
    needs_gib(60)
    num_tokens, num_experts = ROW + 64, 512
    hidden_states = normal(num_tokens, HIDDEN_SIZE, seed=0).requires_grad_()
    down = (normal(num_experts, HIDDEN_SIZE, seed=1) / 32).requires_grad_()
    up = normal(num_experts, HIDDEN_SIZE, seed=2).requires_grad_()
    indices = torch.randint(num_experts, (num_tokens, 1), device="cuda")
    weights = normal(num_tokens, 1, seed=3).requires_grad_()
    tokens = torch.tensor([0, 1, ROW - 1, ROW, ROW + 1, num_tokens - 1], device="cuda")
    # Gradient on these tokens alone, so that the tables' gradients come from them.
    grad = torch.zeros_like(hidden_states)
    grad[tokens] = normal(len(tokens), HIDDEN_SIZE, seed=4)
    out = triton_flash_expert_func(hidden_states, down, up, indices, weights)
    grads = torch.autograd.grad(out, (hidden_states, down, up, weights), grad)
    results = (out[tokens], grads[0][tokens], grads[1], grads[2], grads[3][tokens])
    wanted = expected_results(
        hidden_states[tokens], down, up, indices[tokens], weights[tokens], grad[tokens]
    )
    for name, result, expected in zip(RESULTS, results, wanted, strict=True):
        assert_close(result, expected, TOLERANCES[torch.bfloat16], name)


@pytest.mark.gpu
def test_partial_sums() -> None:
    needs_gib(12)
    partial_sums = torch.zeros(3, 2**30 + 8, device="cuda", dtype=torch.bfloat16)
    for element in (0, 5, 2**30 + 7):
        partial_sums[:, element] = torch.tensor([1.0, 2.0, 4.0])
    total = add_partial_sums(partial_sums, torch.bfloat16)
    assert total.nonzero().squeeze(1).tolist() == [0, 5, 2**30 + 7]
    assert total[[0, 5, 2**30 + 7]].tolist() == [7.0] * 3


@pytest.mark.gpu
def test_pairs() -> None:
    needs_gib(120)
    slots, num_experts, hidden_size = 1024, 2**20, 8
    num_tokens = BOUNDARY // slots + 4
    middle = BOUNDARY // slots
    tokens = torch.tensor([0, 1, middle - 1, middle, middle + 1, num_tokens - 1], device="cuda")
    hidden_states = normal(num_tokens, hidden_size, seed=0).requires_grad_()
    down, up = normal(num_experts, hidden_size, seed=1), normal(num_experts, hidden_size, seed=2)
    indices = torch.randint(num_experts, (num_tokens, slots), device="cuda", dtype=torch.int32)
    weights = torch.rand(num_tokens, slots, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.zeros_like(hidden_states)
    grad[tokens] = normal(len(tokens), hidden_size, seed=3)
    out = triton_flash_expert_func(hidden_states, down, up, indices, weights)
    hidden_grad, weights_grad = torch.autograd.grad(out, (hidden_states, weights), grad)
    results = (out[tokens], hidden_grad[tokens], weights_grad[tokens])
    wanted = expected_results(
        hidden_states[tokens], down, up, indices[tokens], weights[tokens], grad[tokens]
    )
    for name, result, expected in zip(
        ("output", "hidden_states", "routing_weights"),
        results,
        (wanted[0], wanted[1], wanted[4]),
        strict=True,
    ):
        assert_close(result, expected, TOLERANCES[torch.bfloat16], name)
    del out, results, hidden_grad, weights_grad, weights
    torch.cuda.empty_cache()

    pairs = Pairs.from_checked_indices(indices, num_experts)
    values_TK = torch.zeros(num_tokens, slots, device="cuda")
    values_TK[tokens] = torch.rand(len(tokens), slots, device="cuda")
    sums_EH = load_backend("gather").spmm_t(
        values_TK.view(-1), hidden_states.detach(), pairs, torch.float32
    )
    rows = hidden_states.detach()[tokens].double().repeat_interleave(slots, dim=0)
    expected_EH = torch.zeros(num_experts, hidden_size, device="cuda", dtype=torch.float64)
    weighted = rows * values_TK[tokens].view(-1, 1)
    expected_EH.index_add_(0, indices[tokens].view(-1), weighted)
    assert_close(sums_EH, expected_EH, TOLERANCES[torch.float32], "spmm_t")
