"""The mathematics of the expert op over three primitives, forward and backward, without autograd.

T tokens, H hidden size, E experts, N (token, expert) pairs. An expert is one row d of the down
table and one row u of the up table; g is its routing weight for a token x.

    forward    s = <x, d>       a = silu(s) g      y = sum over the token's experts of a u
    backward   da = <dy, u>     dg = da silu(s)    ds = da g silu'(s)
               dx = sum of ds d over the token's experts
               dd = sum of ds x and du = sum of a dy over the expert's tokens

Every dot product is an `sddmm`, every sum for tokens an `spmm`, every sum for experts an `spmm_t`
(see `flash_moe.ops.backends`). The scores s are saved for the backward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from flash_moe.ops.activation import ScoreGrads, activate, activate_backward
from flash_moe.ops.backend_choice import MIN_PAIRS_FOR_SIDE_STREAM, uses_triton
from flash_moe.ops.backends import load_backend
from flash_moe.ops.overlap import InputChunk, Outputs, wait_for_rows
from flash_moe.ops.pair_grads import PairGrad, PairGrads
from flash_moe.ops.pairs import Pairs


class ExpertTables(NamedTuple):
    """The two tables (E, H), one row of each per expert."""

    down: Tensor
    up: Tensor


class NeedsGrad(NamedTuple):
    """Which gradients are needed: of hidden states, tables, and routing weights."""

    hidden: bool
    down: bool
    up: bool
    weights: bool


class TableGrads(NamedTuple):
    """Gradients (E, H) of the tables, each in its table's dtype; None if not needed."""

    down: Tensor | None
    up: Tensor | None


def expert_forward(
    hidden_TH: Tensor,
    tables: ExpertTables,
    pairs: Pairs,
    weights: Tensor,
    backend: str,
    inputs: Sequence[InputChunk] = (),
    *,
    outputs: Outputs,
) -> Tensor:
    """Write the output and return the scores (N,).

    Args:
        hidden_TH: (T, H).
        tables: see `ExpertTables`.
        pairs: the pattern, built for `backend`.
        weights: routing weights, (T, K) or (N,) in the caller's order.
        backend: name of the backend.
        inputs: chunks of hidden_TH, see `Backend.sddmm`.
        outputs: returns the chunks of the output (T, H), see `Backend.spmm`.
    """
    primitives = load_backend(backend)
    scores_N = primitives.sddmm(hidden_TH, tables.down, pairs, inputs)
    activations_N = activate(scores_N, weights, pairs.slot_order, uses_triton(backend))
    primitives.spmm(activations_N, tables.up, pairs, outputs)
    return scores_N


def backward_scores(
    grad_TH: Tensor,
    tables: ExpertTables,
    pairs: Pairs,
    scores_N: Tensor,
    weights: Tensor,
    needs_grad: NeedsGrad,
    backend: str,
    inputs: Sequence[InputChunk] = (),
) -> ScoreGrads:
    """Compute what the gradients need of each pair. First of the three steps of the backward pass.

    Starts sorting the pairs by expert on the side stream where `table_grads` will gather by it.

    Args:
        grad_TH: gradient (T, H) of the output, in any float dtype.
        tables, weights, backend: arguments of `expert_forward`.
        pairs, scores_N: the pattern and the scores of the forward pass.
        needs_grad: which gradients are needed.
        inputs: chunks of grad_TH.
    """
    primitives = load_backend(backend)
    scores_needed = needs_grad.hidden or needs_grad.down
    # These kernels wait for memory, so that the sort runs concurrently almost for free.
    if (
        (needs_grad.down or needs_grad.up)
        and pairs.num_pairs >= MIN_PAIRS_FOR_SIDE_STREAM
        and primitives.prepare_table_grads is not None
    ):
        pairs.start_expert_sort(primitives.prepare_table_grads)
    activation_grads_N = None
    if scores_needed or needs_grad.weights:
        activation_grads_N = primitives.sddmm(grad_TH, tables.up, pairs, inputs)
    else:
        wait_for_rows(inputs)
    return activate_backward(
        activation_grads_N,
        scores_N,
        weights,
        pairs.slot_order,
        uses_triton(backend),
        scores_needed=scores_needed,
        activations_needed=needs_grad.up,
        weights_needed=needs_grad.weights,
    )


def token_grads(
    score_grads: ScoreGrads,
    tables: ExpertTables,
    pairs: Pairs,
    backend: str,
    outputs: Outputs,
) -> None:
    """Write the gradient of the hidden states. Second step, if that gradient is needed.

    Separate from `table_grads`, so that it can travel between ranks while that one computes.

    Args:
        score_grads: result of `backward_scores`.
        tables, pairs, backend: arguments of `backward_scores`.
        outputs: returns the chunks of the gradient (T, H).
    """
    assert score_grads.scores is not None
    load_backend(backend).spmm(score_grads.scores, tables.down, pairs, outputs)


def table_grads(
    score_grads: ScoreGrads,
    hidden_TH: Tensor,
    grad_TH: Tensor,
    tables: ExpertTables,
    pairs: Pairs,
    needs_grad: NeedsGrad,
    backend: str,
    scale: float = 1.0,
) -> TableGrads:
    """Compute the gradients of the tables, times `scale`. Third step.

    Args:
        score_grads: result of `backward_scores`.
        hidden_TH: (T, H), input of `expert_forward`.
        grad_TH, tables, pairs, needs_grad, backend: arguments of `backward_scores`.
        scale: factor applied before the gradients are rounded.
    """
    pairs.wait_expert_sort()
    primitives = load_backend(backend)
    down_values_N = score_grads.scores if needs_grad.down else None
    up_values_N = score_grads.activations if needs_grad.up else None
    down, up = tables
    if down_values_N is not None and up_values_N is not None:
        values, rows = (down_values_N, up_values_N), (hidden_TH, grad_TH)
        return TableGrads(
            *primitives.spmm_t_both(values, rows, pairs, (down.dtype, up.dtype), scale)
        )
    down_grad = up_grad = None
    if down_values_N is not None:
        down_grad = primitives.spmm_t(down_values_N, hidden_TH, pairs, down.dtype, scale)
    if up_values_N is not None:
        up_grad = primitives.spmm_t(up_values_N, grad_TH, pairs, up.dtype, scale)
    return TableGrads(down_grad, up_grad)


class TableCollections(NamedTuple):
    """Where gradients of the tables are collected as pairs; None: they are dense."""

    down: PairGrads | None
    up: PairGrads | None


def collect_table_grads(
    collections: TableCollections,
    score_grads: ScoreGrads,
    hidden_TH: Tensor,
    grad_TH: Tensor,
    tables: ExpertTables,
    pairs: Pairs,
    needs_grad: NeedsGrad,
    backend: str,
    scale: float = 1.0,
) -> TableGrads:
    """Give gradients to `collections`; return, as `table_grads` does, those of other tables.

    The collections keep hidden_TH and grad_TH, which nothing else may change.
    """
    pairs.wait_expert_sort()
    terms = (
        (collections.down, needs_grad.down, score_grads.scores, hidden_TH),
        (collections.up, needs_grad.up, score_grads.activations, grad_TH),
    )
    for collection, is_needed, values_N, rows_TH in terms:
        if collection is not None and is_needed:
            assert values_N is not None
            scaled_N = values_N if scale == 1 else values_N * scale
            collection.add(PairGrad(pairs, scaled_N, rows_TH.detach()))
    dense = needs_grad._replace(
        down=needs_grad.down and collections.down is None,
        up=needs_grad.up and collections.up is None,
    )
    if not (dense.down or dense.up):
        return TableGrads(None, None)
    return table_grads(score_grads, hidden_TH, grad_TH, tables, pairs, dense, backend, scale)
