"""The op is no less precise than gather and matrix product, at sizes that matter.

The judge is the op itself in float64, which other tests hold against autograd: a gathered
float64 tensor of these sizes fits no GPU.
"""

import pytest
import torch
from cases import RESULTS, needs_gib, relative_error
from torch import Tensor

from flash_moe import ProductKeyRouter, triton_flash_expert_func
from flash_moe.ops.naive import naive_expert_func

# T, H, E, K
SHAPES = [
    (1024, 1024, 102_400, 512),
    (1024, 1024, 102_400, 1024),
    (1024, 1024, 102_400, 2048),
    (1024, 1024, 102_400, 4096),
    (2048, 1024, 102_400, 512),
    (4096, 1024, 102_400, 512),
    (8192, 1024, 102_400, 512),
    (16384, 1024, 102_400, 512),
    (8192, 1024, 102_400, 64),
    (8192, 2048, 1_048_576, 64),
]
# Each with uniform routing (None), and one with product keys of that bias.
MIDDLE = (4096, 1024, 102_400, 512)
CASES = [
    *((shape, None, torch.bfloat16) for shape in SHAPES),
    (MIDDLE, 2.0, torch.bfloat16),
    (MIDDLE, None, torch.float16),
    (MIDDLE, None, torch.float32),
]
# Elements of one gathered tensor of the naive op.
GATHERED = 2**31


def product_key_indices(num_tokens: int, num_experts: int, slots: int, bias: float) -> Tensor:
    """Ids of product keys with scores N(0, 1) for each token plus bias * N(0, 1) for each key."""
    router = ProductKeyRouter(1, num_experts, slots, device="cuda")
    keys = sum(router.key_grid)
    scores = torch.randn(num_tokens, keys, device="cuda") + bias * torch.randn(keys, device="cuda")
    # The scores are given, in place of a product of hidden states with keys.
    router.keys, router.hidden_size = torch.nn.Identity(), keys  # type: ignore[assignment]
    indices: Tensor = router(scores)[0]
    return indices


def naive_results(leaves: list[Tensor], indices: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of the naive op, some tokens at a time."""
    hidden_states, down, up, weights = leaves
    for leaf in leaves:
        leaf.grad = None
    step = max(1, GATHERED // (indices.shape[1] * hidden_states.shape[1]))
    outs = []
    for begin in range(0, len(indices), step):
        part = slice(begin, begin + step)
        out = naive_expert_func(hidden_states[part], down, up, indices[part], weights[part])
        out.backward(grad[part])
        outs.append(out.detach())
    return [torch.cat(outs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "bias", "dtype"), CASES, ids=str)
def test_no_less_precise_than_gather_and_matmul(
    shape: tuple[int, int, int, int], bias: float | None, dtype: torch.dtype
) -> None:
    num_tokens, hidden_size, num_experts, slots = shape
    # Tables and their gradients, twice in 16 bits and once in 64; gathered rows and the rest.
    needs_gib(24 * num_experts * hidden_size // 2**30 + 30)
    torch.manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda", dtype=dtype) * std).requires_grad_()

    leaves = [
        normal(num_tokens, hidden_size),
        normal(num_experts, hidden_size, std=hidden_size**-0.5),
        normal(num_experts, hidden_size),
        normal(num_tokens, slots),
    ]
    grad = normal(num_tokens, hidden_size).detach()
    if bias is None:
        indices = torch.randint(num_experts, (num_tokens, slots), device="cuda")
    else:
        indices = product_key_indices(num_tokens, num_experts, slots, bias)

    naive = naive_results(leaves, indices, grad)
    out = triton_flash_expert_func(leaves[0], leaves[1], leaves[2], indices, leaves[3])
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    exact = triton_flash_expert_func(wide[0], wide[1], wide[2], indices, wide[3])
    exacts = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
    for name, mine, theirs, truth in zip(RESULTS, ours, naive, exacts, strict=True):
        error, peer_error = relative_error(mine, truth), relative_error(theirs, truth)
        print(f"{name}: {error:.2e}, gather and matmul {peer_error:.2e}")
        assert error <= peer_error * 1.001, name
