"""Triton kernels for the elementwise step between the primitives.

N pairs, token by token; the i-th pair is in slot order[i] of the caller's (T, K) arrays, or in
slot i where HAS_ORDER is False. Grid (blocks of pairs,).
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import store_rounded


@triton.jit
def _slots(pairs, order, in_block, HAS_ORDER: tl.constexpr):
    if HAS_ORDER:
        return tl.load(order + pairs, mask=in_block, other=0).to(tl.int64)
    return pairs


@triton.jit
def activate_kernel(
    scores, weights, order, activations, num_pairs, HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute activations = silu(scores) * weights[order]."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = pairs < num_pairs
    slots = _slots(pairs, order, in_block, HAS_ORDER)
    scored = tl.load(scores + pairs, mask=in_block, other=0.0)
    weighted = tl.load(weights + slots, mask=in_block, other=0.0).to(scored.dtype)
    tl.store(activations + pairs, scored * tl.sigmoid(scored) * weighted, mask=in_block)


@triton.jit
def activate_backward_kernel(
    activation_grads,
    scores,
    weights,
    order,
    score_grads,
    activations,
    weight_grads,
    num_pairs,
    HAS_ORDER: tl.constexpr,
    SCORES_NEEDED: tl.constexpr,
    ACTIVATIONS_NEEDED: tl.constexpr,
    WEIGHTS_NEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store score_grads (N,), activations (N,) and weight_grads (by slot) as far as needed."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = pairs < num_pairs
    slots = _slots(pairs, order, in_block, HAS_ORDER)
    scored = tl.load(scores + pairs, mask=in_block, other=0.0)
    sigmoid = tl.sigmoid(scored)
    if SCORES_NEEDED or ACTIVATIONS_NEEDED:
        weighted = tl.load(weights + slots, mask=in_block, other=0.0).to(scored.dtype)
    if ACTIVATIONS_NEEDED:
        tl.store(activations + pairs, scored * sigmoid * weighted, mask=in_block)
    if SCORES_NEEDED or WEIGHTS_NEEDED:
        grads = tl.load(activation_grads + pairs, mask=in_block, other=0.0)
    if SCORES_NEEDED:
        # silu'(s) = sigma (1 + s (1 - sigma)): other forms cancel for large s.
        slope = sigmoid * (1 + scored * (1 - sigmoid))
        tl.store(score_grads + pairs, grads * weighted * slope, mask=in_block)
    if WEIGHTS_NEEDED:
        store_rounded(weight_grads + slots, grads * scored * sigmoid, in_block)
