"""The expert op: public functions, and custom ops with their fakes and autograd.

T tokens, H hidden size, E experts, K experts per token, N (token, expert) pairs. The mathematics
is in `flash_moe.ops.expert_math`.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from flash_moe.ops.backend_choice import choose_backend, ragged_backend
from flash_moe.ops.expert_math import (
    ExpertTables,
    NeedsGrad,
    TableCollections,
    backward_scores,
    collect_table_grads,
    expert_forward,
    token_grads,
)
from flash_moe.ops.indices import poll_index_errors
from flash_moe.ops.input_checks import check_expert_inputs, check_ragged_inputs
from flash_moe.ops.overlap import WholeOutput
from flash_moe.ops.pair_grads import pair_grads_of, reaches_table
from flash_moe.ops.pairs import Pairs, SavedPairs


def triton_flash_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute a mixture of experts, each of which is one row of two tables.

    For token t: sum over k of silu(<x_t, d_e>) * g_tk * u_e, with e = indices[t, k]. Sums are
    computed in float32 and rounded once. Results are bitwise repeatable. An index of -1 marks an
    empty slot, which contributes nothing and gets zero gradient.

    Args:
        hidden_states: (T, H) float16, bfloat16, float32 (or float64).
        down_weights: (E, H), a float dtype.
        up_weights: (E, H), a float dtype.
        indices: (T, K) int64 or int32, each in [-1, E).
        routing_weights: (T, K), a float dtype.
        backend: "gather" (CUDA tensors; Triton kernels), "hot_cold" or "dense" (CUDA tensors;
            hidden states and tables of the same 16-bit dtype; matrix products for experts that many
            tokens use, or for all, before which values of pairs are rounded to 16 bits),
            "torch_sparse" (CPU tensors) or "reference" (any device). If None, chosen by device, and
            on CUDA by cost from the shapes (`flash_moe.ops.backend_choice`); the environment
            variable FLASH_MOE_BACKEND overrides that choice.

    Returns:
        (T, H) in the dtype of `hidden_states`. Gradients flow to all arguments but `indices`,
        each in its argument's dtype.

    Peak memory on CUDA in bytes, with N = T K pairs and b bytes for an element of the tables, by
    the backend "gather": the forward pass takes max(16 N + output, 12 N + 4 N S), the output
    included, where S = 1 for rows of up to 2 KB (of up to 1 KB if K <= 128), else
    ceil(b H / 1024); and up to 4 MB more where tokens are few. Of that, 12 N stay for the backward
    pass. (Ids, their order, scores and activations take 4 N each; all but the activations stay.
    Scores of longer rows are sums of S parts. This holds for contiguous arguments of at most 32
    bits, K <= 4096 and N < 2^31; each primitive copies a tensor whose rows are not contiguous.)
    "hot_cold" takes up to 256 MB and 64 T H more, for a matrix of hot pairs and sums over it, and
    saves 4 (E + M + 3 T) + 8 T (M / 32 + 1) more, where M = min(E, N / max(1, floor(0.019 T)))
    bounds the number of hot experts. "dense" takes up to 512 MB and 8 T H more.

    Raises:
        TypeError: an argument has a dtype that is not listed above.
        RuntimeError: a second or a forward-mode derivative was requested.
        ValueError: a shape or device does not fit, or an index is out of range. On CUDA, an index
            out of range never reads memory out of range, and the error is raised without waiting
            for the device: at the next call or backward pass, by
            `flash_moe.raise_index_errors` (call it now and then where only CUDA graphs
            are replayed), or at once if FLASH_MOE_STRICT_INDICES=1.
    """
    collections = TableCollections(pair_grads_of(down_weights), pair_grads_of(up_weights))
    tensors = (hidden_states, down_weights, up_weights, indices, routing_weights)
    return collecting_expert_func(*tensors, collections, backend=backend)


def collecting_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    collections: TableCollections,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute `triton_flash_expert_func` with these collections, whatever the tables have."""
    check_expert_inputs(hidden_states, down_weights, up_weights, indices, routing_weights)
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = choose_backend(backend, hidden_states, down_weights, up_weights, indices.shape[1])
    tensors = (hidden_states, down_weights, up_weights, indices, None, routing_weights)
    return _experts(tensors, 1.0, name, collections)


def _fail(error: Exception) -> NoReturn:
    raise error


# As the function that replaces this one where the tables are sharded: a module's own errors are
# raised by it on all ranks.
triton_flash_expert_func.fail = _fail  # type: ignore[attr-defined]


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
    """Compute `triton_flash_expert_func` with a different number of experts for each token.

    Fastest on a GPU when the ids of each token are sorted: all tokens then sweep the tables
    in the same order and find rows in cache.

    Args:
        hidden_states: (T, H), down_weights: (E, H), up_weights: (E, H), as in that function.
        row_offsets: (T + 1,) int64 or int32, ascending from 0 to N: the pairs of token t are
            row_offsets[t]:row_offsets[t + 1]. Wrong offsets are reported like wrong ids.
        expert_ids: (N,) int64 or int32, each in [-1, E).
        routing_weights: (N,), a float dtype.
        weight_grad_scale: factor on the gradients of the two tables, applied before they are
            rounded. Expert parallelism averages over ranks with it.
        backend: name of a backend, or None; "hot_cold" and "dense" stand for "gather".

    Returns and raises: as `triton_flash_expert_func`.
    """
    check_ragged_inputs(
        hidden_states, down_weights, up_weights, row_offsets, expert_ids, routing_weights
    )
    _refuse_forward_mode(hidden_states, down_weights, up_weights, routing_weights)
    name = choose_backend(backend, hidden_states, down_weights, up_weights, None)
    tensors = (hidden_states, down_weights, up_weights, expert_ids, row_offsets, routing_weights)
    collections = TableCollections(pair_grads_of(down_weights), pair_grads_of(up_weights))
    return _experts(tensors, weight_grad_scale, name, collections)


def _experts(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor],
    weight_grad_scale: float,
    backend: str,
    collections: TableCollections,
) -> Tensor:
    """Call the op, or, where a table's gradient is collected as pairs, its autograd function."""
    if collections == (None, None):
        return ForwardOutputs(*_forward_op(*tensors, weight_grad_scale, backend)).out
    # Other backends code the ids of some pairs.
    return _collecting_experts(*tensors, weight_grad_scale, ragged_backend(backend), collections)


@torch.compiler.disable
def _collecting_experts(*inputs: Any) -> Tensor:
    out: Tensor = _ExpertsWithPairGrads.apply(*inputs)
    return out


def _refuse_forward_mode(*tensors: Tensor) -> None:
    # PyTorch would take the tangent of a custom op to be zero.
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("triton_flash_expert_func has no forward-mode derivative (jvp)")


class ForwardOutputs(NamedTuple):
    """What the forward op returns, in this order: the output (T, H), and `SavedPairs`."""

    out: Tensor
    scores: Tensor
    expert_ids: Tensor
    slot_order: Tensor
    row_offsets: Tensor
    hot_workspace: Tensor

    @property
    def saved(self) -> SavedPairs:
        """What the backward pass needs."""
        return SavedPairs(*self[1:])

    @classmethod
    def fake(
        cls,
        hidden_TH: Tensor,
        down_EH: Tensor,
        ids: Tensor,
        row_offsets: Tensor | None,
        backend: str,
    ) -> "ForwardOutputs":
        """Build tensors of the shapes and dtypes that the op returns for these arguments."""
        saved = SavedPairs.fake(hidden_TH, down_EH, ids, row_offsets, backend)
        return cls(hidden_TH.new_empty(hidden_TH.shape), *saved)


class ExpertGrads(NamedTuple):
    """What the backward op returns, in this order: a gradient for each field of `NeedsGrad`.

    A gradient that is not needed is an empty tensor.
    """

    hidden: Tensor
    down: Tensor
    up: Tensor
    weights: Tensor

    @classmethod
    def from_optional(cls, hidden_TH: Tensor, *grads: Tensor | None) -> "ExpertGrads":
        """Replace None by an empty tensor: a new one each, as outputs of an op may not alias."""
        return cls(*(hidden_TH.new_empty(0) if grad is None else grad for grad in grads))

    @classmethod
    def fake(cls, needs_grad: NeedsGrad, *inputs: Tensor) -> "ExpertGrads":
        """Build tensors of the shapes and dtypes that the op returns for these inputs."""
        return cls(
            *(
                one.new_empty(one.shape if needed else 0)
                for one, needed in zip(inputs, needs_grad, strict=True)
            )
        )


@torch.library.custom_op("flash_moe::expert_forward", mutates_args=())
def _forward_op(
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    ids: Tensor,
    row_offsets: Tensor | None,
    weights: Tensor,
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `ForwardOutputs`.

    Args:
        ids, weights: (T, K); with row_offsets (T + 1,): (N,).
        weight_grad_scale: not used here; the backward pass reads it from the arguments of this op.
    """
    num_experts = down_EH.shape[0]
    if row_offsets is None:
        pairs = Pairs.from_indices(ids, num_experts, backend)
    else:
        pairs = Pairs.from_offsets(row_offsets, ids, num_experts, backend)
    tables = ExpertTables(down_EH, up_EH)
    output = WholeOutput(hidden_TH.shape, hidden_TH.dtype, hidden_TH.device)
    scores_N = expert_forward(hidden_TH, tables, pairs, weights, backend, outputs=output.chunks)
    return ForwardOutputs(output.value, *pairs.saved(scores_N))


@_forward_op.register_fake
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
    return ForwardOutputs.fake(hidden_TH, down_EH, ids, row_offsets, backend)


@torch.library.custom_op("flash_moe::expert_backward", mutates_args=())
def _backward_op(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    weights: Tensor,
    scores: Tensor,
    expert_ids: Tensor,
    slot_order: Tensor,
    row_offsets: Tensor,
    hot_workspace: Tensor,
    top_k: int | None,
    needs_grad: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `ExpertGrads`.

    Args:
        scores, expert_ids, slot_order, row_offsets, hot_workspace: the fields of `SavedPairs`.
        top_k: K; None for ragged rows.
        needs_grad: the fields of `NeedsGrad`.
    """
    saved = SavedPairs(scores, expert_ids, slot_order, row_offsets, hot_workspace)
    grads = _input_grads(
        grad_TH,
        hidden_TH,
        ExpertTables(down_EH, up_EH),
        weights,
        saved,
        top_k,
        NeedsGrad(*needs_grad),
        weight_grad_scale,
        backend,
        TableCollections(None, None),
    )
    return ExpertGrads.from_optional(hidden_TH, *grads)


def _input_grads(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    tables: ExpertTables,
    weights: Tensor,
    saved: SavedPairs,
    top_k: int | None,
    needed: NeedsGrad,
    weight_grad_scale: float,
    backend: str,
    collections: TableCollections,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of hidden states, tables and weights; None if collected or not needed.

    Args: see `_backward_op`.
    """
    poll_index_errors(hidden_TH.device)
    pairs = Pairs.from_saved(saved, tables.down.shape[0], top_k)
    score_grads = backward_scores(grad_TH, tables, pairs, saved.scores, weights, needed, backend)
    hidden_grad = None
    if needed.hidden:
        output = WholeOutput(hidden_TH.shape, hidden_TH.dtype, hidden_TH.device)
        token_grads(score_grads, tables, pairs, backend, output.chunks)
        hidden_grad = output.value
    # Copies, as user code and autograd may change both in place after this pass.
    of_tables = collect_table_grads(
        collections,
        score_grads,
        hidden_TH.clone() if needed.down and collections.down is not None else hidden_TH,
        grad_TH.clone() if needed.up and collections.up is not None else grad_TH,
        tables,
        pairs,
        needed,
        backend,
        weight_grad_scale,
    )
    return hidden_grad, *of_tables, score_grads.weights


@_backward_op.register_fake
def _(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    down_EH: Tensor,
    up_EH: Tensor,
    weights: Tensor,
    scores: Tensor,
    expert_ids: Tensor,
    slot_order: Tensor,
    row_offsets: Tensor,
    hot_workspace: Tensor,
    top_k: int | None,
    needs_grad: list[bool],
    weight_grad_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ExpertGrads.fake(NeedsGrad(*needs_grad), hidden_TH, down_EH, up_EH, weights)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_TH, down_EH, up_EH, ids, row_offsets, weights, weight_grad_scale, backend = inputs
    saved = ForwardOutputs(*output).saved
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TH, down_EH, up_EH, weights, *saved)
    ctx.top_k = ids.shape[1] if row_offsets is None else None
    ctx.weight_grad_scale, ctx.backend = weight_grad_scale, backend


def _backward(ctx: Any, grad_TH: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, down, up, _, _, weights, _, _ = ctx.needs_input_grad
    needed = NeedsGrad(hidden, down, up, weights)
    grads: list[Tensor | None] = [None] * len(needed)
    if grad_TH is not None:
        computed = _backward_op(
            grad_TH, *ctx.saved_tensors, ctx.top_k, list(needed), ctx.weight_grad_scale, ctx.backend
        )
        grads = [grad if wanted else None for grad, wanted in zip(computed, needed, strict=True)]
    hidden_grad, down_grad, up_grad, weights_grad = grads
    return hidden_grad, down_grad, up_grad, None, None, weights_grad, None, None


class _ExpertsWithPairGrads(torch.autograd.Function):
    """The op, with gradients of tables given to `PairGrads` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        down_EH: Tensor,
        up_EH: Tensor,
        ids: Tensor,
        row_offsets: Tensor | None,
        weights: Tensor,
        weight_grad_scale: float,
        backend: str,
        collections: TableCollections,
    ) -> Tensor:
        inputs = (hidden_TH, down_EH, up_EH, ids, row_offsets, weights, weight_grad_scale, backend)
        outputs = ForwardOutputs(*_forward_op(*inputs))
        ctx.save_for_backward(hidden_TH, down_EH, up_EH, weights, *outputs.saved)
        ctx.top_k = ids.shape[1] if row_offsets is None else None
        ctx.scale, ctx.backend, ctx.collections = weight_grad_scale, backend, collections
        return outputs.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, down_EH, up_EH, weights, *saved_tensors = ctx.saved_tensors
        hidden, down, up, _, _, needs_weights, *_ = ctx.needs_input_grad
        _, down_node, up_node, *_ = (node for node, _ in ctx.next_functions)
        down = down and (ctx.collections.down is None or reaches_table(down_node))
        up = up and (ctx.collections.up is None or reaches_table(up_node))
        hidden_grad, down_grad, up_grad, weights_grad = _input_grads(
            grad_TH,
            hidden_TH,
            ExpertTables(down_EH, up_EH),
            weights,
            SavedPairs(*saved_tensors),
            ctx.top_k,
            NeedsGrad(hidden, down, up, needs_weights),
            ctx.scale,
            ctx.backend,
            ctx.collections,
        )
        return hidden_grad, down_grad, up_grad, None, None, weights_grad, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "triton_flash_expert_func has no second derivative: its gradient was differentiated "
        "(create_graph=True, then backward again)"
    )


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)
_backward_op.register_autograd(_refuse)
