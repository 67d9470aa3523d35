"""The expert op: public functions, custom ops and autograd formulas over three primitives.

T tokens, H hidden size, E experts, K experts per token, N (token, expert) pairs; an expert is
one row d of `down_weights` and one row u of `up_weights`, g its routing weight for a token.

    forward    s = <x, d>       a = silu(s) g      y = sum over the token's experts of a u
    backward   da = <dy, u>     dg = da silu(s)    ds = da g silu'(s)
               dx = sum of ds d over the token's experts
               dd = sum of ds x and du = sum of a dy over the expert's tokens

Every dot product is an `sddmm`, every sum for tokens an `spmm`, every sum for experts an
`spmm_t` (see `flash_moe.ops.backends`). The scores s are kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from flash_moe.ops.arrange import arrange_ragged, arrange_slots, poll_index_errors
from flash_moe.ops.backends import (
    accumulator_dtype,
    check_backend,
    default_backend,
    load_backend,
)
from flash_moe.ops.checks import check_expert_inputs, check_ragged_inputs
from flash_moe.ops.pairs import Pairs, uniform_row_offsets


def triton_flash_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mixture of experts of which each is one row of two tables.

    For token t: sum over k of silu(<x_t, d_e>) * g_tk * u_e, with e = indices[t, k]. Sums are
    kept in float32 and rounded once. Results are bitwise repeatable. An index of -1 marks an
    empty slot, which contributes nothing and gets zero gradient.

    Args:
        hidden_states: (T, H) float16, bfloat16, float32 (or float64).
        down_weights: (E, H), a float dtype.
        up_weights: (E, H), a float dtype.
        indices: (T, K) int64 or int32, each in [-1, E).
        routing_weights: (T, K), a float dtype.
        backend: "gather" (Triton; CUDA tensors), "torch_sparse" (CPU tensors) or "reference"
            (any). Chosen by device if None; the environment variable FLASH_MOE_BACKEND
            overrides that choice.

    Returns:
        (T, H) in the dtype of `hidden_states`. Gradients flow to all arguments but `indices`,
        each in its argument's dtype.

    Memory on CUDA in bytes, with N = T K pairs, b for an element of `hidden_states` and g for
    one of `routing_weights`: forward at its peak 16 N + 8 (T + 1) + max(g N, b T H) more than
    before, the output included; of that, 12 N + 8 (T + 1) stay for the backward pass. (Ids,
    their order, scores and activations take 4 N each, all but the last stay. This is for
    contiguous arguments of at most 32 bits, K <= 4096 and N < 2^31; a tensor whose rows are not
    contiguous is copied by each primitive that reads it.)

    Raises:
        TypeError: an argument has a dtype that is not listed above.
        RuntimeError: a second or a forward-mode derivative is asked for.
        ValueError: a shape or device does not fit, or an index is out of range. On CUDA the
            ids are never followed out of range, and the error comes without waiting for the
            device: at the next call or backward pass, from
            `flash_moe.ops.arrange.raise_index_errors` (call it now and then where CUDA graphs
            alone are replayed), or at once when FLASH_MOE_STRICT_INDICES=1.
    """
    check_expert_inputs(hidden_states, down_weights, up_weights, indices, routing_weights)
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = _chosen_backend(backend, hidden_states.device)
    ids_N, order_N = _arrange_slots(indices, down_weights.shape[0], name == "gather")
    out_TH, _ = _expert_forward(
        hidden_states,
        down_weights,
        up_weights,
        uniform_row_offsets(indices.shape[0], indices.shape[1], indices.device),
        ids_N,
        order_N,
        routing_weights.reshape(-1),
        1.0,
        name,
    )
    return out_TH


def ragged_flash_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    row_offsets: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    *,
    weight_grad_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`triton_flash_expert_func` with a different number of experts for each token.

    Fastest on a GPU when the ids of each token are sorted: all tokens then sweep the tables
    in the same order and find rows in cache.

    Args:
        hidden_states: (T, H), down_weights: (E, H), up_weights: (E, H), as there.
        row_offsets: (T + 1,) int64 or int32, ascending from 0 to N: the pairs of token t are
            row_offsets[t]:row_offsets[t + 1]. Wrong offsets are reported as wrong ids are.
        expert_ids: (N,) int64 or int32, each in [-1, E).
        routing_weights: (N,), a float dtype.
        weight_grad_scale: factor on the gradients of the two tables, applied before their one
            rounding. Expert parallelism averages over ranks with it.
        backend: as there.

    Returns and raises: as there.
    """
    check_ragged_inputs(
        hidden_states, down_weights, up_weights, row_offsets, expert_ids, routing_weights
    )
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = _chosen_backend(backend, hidden_states.device)
    offsets, ids_N = _arrange_ragged(
        row_offsets, expert_ids, down_weights.shape[0], name == "gather"
    )
    out_TH, _ = _expert_forward(
        hidden_states,
        down_weights,
        up_weights,
        offsets,
        ids_N,
        torch.empty(0, device=ids_N.device, dtype=torch.int32),
        routing_weights,
        weight_grad_scale,
        name,
    )
    return out_TH


def _refuse_forward_mode(*tensors: Tensor) -> None:
    # PyTorch would go on with a tangent of zero.
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("triton_flash_expert_func has no forward-mode derivative (jvp)")


def _chosen_backend(backend: str | None, device: torch.device) -> str:
    name = backend or default_backend(device)
    check_backend(name, device)
    return name


@torch.library.custom_op("flash_moe::arrange_slots", mutates_args=())
def _arrange_slots(indices_TK: Tensor, num_experts: int, in_kernels: bool) -> tuple[Tensor, Tensor]:
    return arrange_slots(indices_TK, num_experts, in_kernels)


@_arrange_slots.register_fake
def _(indices_TK: Tensor, num_experts: int, in_kernels: bool) -> tuple[Tensor, Tensor]:
    num_pairs = indices_TK.numel()
    order_dtype = torch.int32 if num_pairs < 2**31 or not in_kernels else torch.int64
    return (
        indices_TK.new_empty(num_pairs, dtype=torch.int32),
        indices_TK.new_empty(num_pairs if in_kernels else 0, dtype=order_dtype),
    )


@torch.library.custom_op("flash_moe::arrange_ragged", mutates_args=())
def _arrange_ragged(
    row_offsets: Tensor, expert_ids_N: Tensor, num_experts: int, in_kernels: bool
) -> tuple[Tensor, Tensor]:
    return arrange_ragged(row_offsets, expert_ids_N, num_experts, in_kernels)


@_arrange_ragged.register_fake
def _(
    row_offsets: Tensor, expert_ids_N: Tensor, num_experts: int, in_kernels: bool
) -> tuple[Tensor, Tensor]:
    return (
        row_offsets.new_empty(row_offsets.shape, dtype=torch.int64),
        expert_ids_N.new_empty(expert_ids_N.shape, dtype=torch.int32),
    )


@torch.library.custom_op("flash_moe::expert_forward", mutates_args=())
def _expert_forward(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    row_offsets: Tensor,
    expert_ids_N: Tensor,
    order_N: Tensor,
    weights_N: Tensor,
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (T, H) and the scores (N,) in the order of `expert_ids_N`."""
    primitives = load_backend(backend)
    pairs = Pairs(row_offsets, expert_ids_N, down_EH.shape[0])
    scores_N = primitives.sddmm(hidden_TH, down_EH, pairs)
    activations_N = torch.nn.functional.silu(scores_N)
    activations_N.mul_(_in_pair_order(weights_N, order_N))
    return primitives.spmm(activations_N, up_EH, pairs, hidden_TH.dtype), scores_N


@_expert_forward.register_fake
def _(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    row_offsets: Tensor,
    expert_ids_N: Tensor,
    order_N: Tensor,
    weights_N: Tensor,
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(hidden_TH.dtype, down_EH.dtype)
    return (
        hidden_TH.new_empty(hidden_TH.shape),
        hidden_TH.new_empty(expert_ids_N.shape, dtype=dtype),
    )


@torch.library.custom_op("flash_moe::expert_backward", mutates_args=())
def _expert_backward(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    row_offsets: Tensor,
    expert_ids_N: Tensor,
    order_N: Tensor,
    weights_N: Tensor,
    scores_N: Tensor,
    needed: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, down table, up table, routing weights; empty if not needed."""
    poll_index_errors(hidden_TH.device)
    hidden_needed, down_needed, up_needed, weights_needed = needed
    # One tensor each: the outputs of a custom op may not alias.
    hidden_grad, down_grad, up_grad, weights_grad = (hidden_TH.new_empty(0) for _ in needed)
    primitives = load_backend(backend)
    pairs = Pairs(row_offsets, expert_ids_N, down_EH.shape[0])
    pair_weights_N = _in_pair_order(weights_N, order_N)
    sigmoid_N = torch.sigmoid(scores_N)
    silu_N = scores_N * sigmoid_N
    if hidden_needed or down_needed or weights_needed:
        activation_grad_N = primitives.sddmm(grad_TH, up_EH, pairs)
        if weights_needed:
            weights_grad = _in_slot_order(activation_grad_N * silu_N, order_N, weights_N.dtype)
        if hidden_needed or down_needed:
            # silu'(s) = sigma (1 + s (1 - sigma)): other forms cancel for large s.
            silu_slope_N = (1 - sigmoid_N).mul_(scores_N).add_(1).mul_(sigmoid_N)
            score_grad_N = activation_grad_N.mul_(pair_weights_N).mul_(silu_slope_N)
            if hidden_needed:
                hidden_grad = primitives.spmm(score_grad_N, down_EH, pairs, hidden_TH.dtype)
            if down_needed:
                down_grad = primitives.spmm_t(
                    score_grad_N * weight_grad_scale, hidden_TH, pairs, down_EH.dtype
                )
    if up_needed:
        activations_N = silu_N * pair_weights_N * weight_grad_scale
        up_grad = primitives.spmm_t(activations_N, grad_TH, pairs, up_EH.dtype)
    return hidden_grad, down_grad, up_grad, weights_grad


@_expert_backward.register_fake
def _(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    row_offsets: Tensor,
    expert_ids_N: Tensor,
    order_N: Tensor,
    weights_N: Tensor,
    scores_N: Tensor,
    needed: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, down, up, weights = (
        like.new_empty(like.shape if wanted else 0)
        for like, wanted in zip((hidden_TH, down_EH, up_EH, weights_N), needed, strict=True)
    )
    return hidden, down, up, weights


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, weight_grad_scale, backend = inputs
    scores_N = output[1]
    ctx.mark_non_differentiable(scores_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, scores_N)
    ctx.weight_grad_scale, ctx.backend = weight_grad_scale, backend


def _backward(ctx: Any, grad_TH: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    hidden, down, up, _, _, _, weights, _, _ = ctx.needs_input_grad
    needed = [hidden, down, up, weights]
    grads: list[Tensor | None] = [None] * 4
    if grad_TH is not None:
        computed = _expert_backward(
            grad_TH, *ctx.saved_tensors, needed, ctx.weight_grad_scale, ctx.backend
        )
        grads = [grad if wanted else None for grad, wanted in zip(computed, needed, strict=True)]
    hidden_grad, down_grad, up_grad, weights_grad = grads
    return hidden_grad, down_grad, up_grad, None, None, None, weights_grad, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "triton_flash_expert_func has no second derivative: its gradient was differentiated "
        "(create_graph=True, then backward again)"
    )


_expert_forward.register_autograd(_backward, setup_context=_save_for_backward)
_expert_backward.register_autograd(_refuse)


def _in_pair_order(values_N: Tensor, order_N: Tensor) -> Tensor:
    return values_N if order_N.shape[0] == 0 else values_N.index_select(0, order_N)


def _in_slot_order(values_N: Tensor, order_N: Tensor, dtype: torch.dtype) -> Tensor:
    values_N = values_N.to(dtype)
    if order_N.shape[0] == 0:
        return values_N
    return torch.empty_like(values_N).index_copy_(0, order_N.long(), values_N)
