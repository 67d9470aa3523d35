"""The expert op: public functions and custom ops with their autograd.

T tokens, H hidden size, E experts, K experts per token, N (token, expert) pairs. The mathematics
is in `flash_moe.ops.expert_math`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from flash_moe.ops.backend_choice import TRITON_BACKENDS, choose_backend
from flash_moe.ops.backends import accumulator_dtype
from flash_moe.ops.expert_math import Backward, forward, size_of_workspace, slots_of
from flash_moe.ops.indices import order_dtype, poll_index_errors
from flash_moe.ops.input_checks import check_expert_inputs, check_ragged_inputs


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
        backend: "gather" (Triton; CUDA tensors), "hot_cold" and "dense" (CUDA tensors too, for
            hidden states and tables of one 16-bit dtype: experts that many tokens use, or all of
            them, by matrix products, with values of pairs rounded to 16 bits before a product),
            "torch_sparse" (CPU tensors) or "reference" (any). If None, chosen by device, and on
            CUDA by cost from the shapes (`flash_moe.ops.backend_choice`); the environment variable
            FLASH_MOE_BACKEND overrides that choice.

    Returns:
        (T, H) in the dtype of `hidden_states`. Gradients flow to all arguments but `indices`,
        each in its argument's dtype.

    Memory on CUDA in bytes, with N = T K pairs and b for an element of the tables, by the
    backend "gather": forward at its peak max(16 N + output, 12 N + 4 N S) more than before, the
    output included, where S = 1 for rows of up to 2 KB (of 1 KB if K <= 128), else
    ceil(b H / 1024); and up to 4 MB where tokens are few. 12 N stay for the backward pass. (Ids,
    their order, scores and activations take 4 N each, all but the last stay; scores of longer rows
    are summed from S parts. This is for contiguous arguments of at most 32 bits, K <= 4096 and
    N < 2^31; a tensor whose rows are not contiguous is copied by each primitive that reads it.)
    "hot_cold" takes up to 256 MB and 64 T H more for a matrix of hot pairs and sums over it, and
    keeps 4 (E + M + 3 T) + 8 T (M / 32 + 1), where M = min(E, N / max(1, floor(0.019 T)))
    bounds the number of hot experts; "dense" takes up to 512 MB and 8 T H more.

    Raises:
        TypeError: an argument has a dtype that is not listed above.
        RuntimeError: a second or a forward-mode derivative is asked for.
        ValueError: a shape or device does not fit, or an index is out of range. On CUDA the
            ids are never followed out of range, and the error comes without waiting for the
            device: at the next call or backward pass, from
            `flash_moe.ops.indices.raise_index_errors` (call it now and then where CUDA graphs
            alone are replayed), or at once when FLASH_MOE_STRICT_INDICES=1.
    """
    check_expert_inputs(hidden_states, down_weights, up_weights, indices, routing_weights)
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = choose_backend(backend, hidden_states, down_weights, up_weights, indices.shape[1])
    tensors = (hidden_states, down_weights, up_weights, indices, None, routing_weights)
    return _expert_forward(*tensors, 1.0, name)[0]


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
        backend: as there; "hot_cold" and "dense" gather here too.

    Returns and raises: as there.
    """
    check_ragged_inputs(
        hidden_states, down_weights, up_weights, row_offsets, expert_ids, routing_weights
    )
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = choose_backend(backend, hidden_states, down_weights, up_weights, None)
    tensors = (hidden_states, down_weights, up_weights, expert_ids, row_offsets, routing_weights)
    return _expert_forward(*tensors, weight_grad_scale, name)[0]


def _refuse_forward_mode(*tensors: Tensor) -> None:
    # PyTorch would go on with a tangent of zero.
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("triton_flash_expert_func has no forward-mode derivative (jvp)")


@torch.library.custom_op("flash_moe::expert_forward", mutates_args=())
def _expert_forward(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    ids: Tensor,
    row_offsets: Tensor | None,
    weights: Tensor,
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (T, H), scores (N,), and what `formulas.Backward` keeps.

    Args:
        ids, weights: (T, K); with row_offsets (T + 1,): (N,).
    """
    return forward(hidden_TH, down_EH, up_EH, ids, row_offsets, weights, backend, hidden_TH.dtype)


@_expert_forward.register_fake
def _(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    ids: Tensor,
    row_offsets: Tensor | None,
    weights: Tensor,
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_pairs = ids.numel()
    is_sorted = backend in TRITON_BACKENDS and row_offsets is None
    return (
        hidden_TH.new_empty(hidden_TH.shape),
        hidden_TH.new_empty(num_pairs, dtype=accumulator_dtype(hidden_TH.dtype, down_EH.dtype)),
        ids.new_empty(num_pairs, dtype=torch.int32),
        ids.new_empty(num_pairs if is_sorted else 0, dtype=order_dtype(num_pairs)),
        ids.new_empty(0 if row_offsets is None else row_offsets.shape[0], dtype=torch.int64),
        ids.new_empty(
            size_of_workspace(hidden_TH.shape[0], slots_of(ids), down_EH.shape[0], backend),
            dtype=torch.int32,
        ),
    )


@torch.library.custom_op("flash_moe::expert_backward", mutates_args=())
def _expert_backward(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    weights: Tensor,
    scores_N: Tensor,
    ids_N: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    workspace: Tensor,
    slots: int,
    needed: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, down table, up table, routing weights; empty if not needed."""
    poll_index_errors(hidden_TH.device)
    kept = (scores_N, ids_N, order_N, offsets, workspace)
    backward = Backward(grad_TH, hidden_TH, down_EH, up_EH, weights, kept, slots, needed, backend)
    hidden_grad = backward.for_tokens(hidden_TH.dtype)
    grads = (hidden_grad, *backward.for_tables(weight_grad_scale), backward.weights_grad)
    # One tensor each: the outputs of a custom op may not alias.
    hidden, down, up, of_weights = (
        hidden_TH.new_empty(0) if grad is None else grad for grad in grads
    )
    return hidden, down, up, of_weights


@_expert_backward.register_fake
def _(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    weights: Tensor,
    scores_N: Tensor,
    ids_N: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    workspace: Tensor,
    slots: int,
    needed: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, down, up, weights_grad = (
        like.new_empty(like.shape if wanted else 0)
        for like, wanted in zip((hidden_TH, down_EH, up_EH, weights), needed, strict=True)
    )
    return hidden, down, up, weights_grad


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TH, down_EH, up_EH, ids, _, weights, weight_grad_scale, backend = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TH, down_EH, up_EH, weights, *kept)
    ctx.slots, ctx.weight_grad_scale, ctx.backend = slots_of(ids), weight_grad_scale, backend


def _backward(ctx: Any, grad_TH: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, down, up, _, _, weights, _, _ = ctx.needs_input_grad
    needed = [hidden, down, up, weights]
    grads: list[Tensor | None] = [None] * 4
    if grad_TH is not None:
        computed = _expert_backward(
            grad_TH, *ctx.saved_tensors, ctx.slots, needed, ctx.weight_grad_scale, ctx.backend
        )
        grads = [grad if wanted else None for grad, wanted in zip(computed, needed, strict=True)]
    hidden_grad, down_grad, up_grad, weights_grad = grads
    return hidden_grad, down_grad, up_grad, None, None, weights_grad, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "triton_flash_expert_func has no second derivative: its gradient was differentiated "
        "(create_graph=True, then backward again)"
    )


_expert_forward.register_autograd(_backward, setup_context=_save_for_backward)
_expert_backward.register_autograd(_refuse)
