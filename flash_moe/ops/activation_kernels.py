"""Triton kernels for what happens to each pair between the primitives.

N pairs, token by token; the i-th pair stands in slot order[i] of the caller's (T, K) arrays, or
in slot i where HAS_ORDER is False. Grid (blocks of pairs,).
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _slots(pairs, order, in_block, HAS_ORDER: tl.constexpr):
    if HAS_ORDER:
        return tl.load(order + pairs, mask=in_block, other=0).to(tl.int64)
    return pairs


@triton.jit
def activate_kernel(
    scores, weights, order, activations, num_pairs, HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """activations = silu(scores) * weights[order]."""
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
    """Those needed of score_grads (N,), activations (N,) and weight_grads, by slot."""
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
        weight_grad = grads * scored * sigmoid
        if weight_grads.dtype.element_ty.primitive_bitwidth < 32:
            # From 64 bits in two steps: Triton's interpreter cannot do it in one.
            weight_grad = weight_grad.to(tl.float32)
        tl.store(weight_grads + slots, weight_grad.to(weight_grads.dtype.element_ty), mask=in_block)
