"""The autograd function of a sharded layer: dispatch, experts, combine, and the same in backward.

T local tokens, K experts per token, H hidden size, e local experts; R rows and M pairs received.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import choose_backend
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.expert_math import (
    ExpertTables,
    NeedsGrad,
    backward_scores,
    expert_forward,
    table_grads,
    token_grads,
)
from flash_moe.ops.overlap import WholeOutput
from flash_moe.ops.pairs import Pairs, SavedPairs
from flash_moe_dist.dispatch.base import TokenDispatcher
from flash_moe_dist.dispatch.capacity import LayerDispatch
from flash_moe_dist.dispatch.handshake import Input, Settings
from flash_moe_dist.phases import phase


class ShardedExperts(torch.autograd.Function):
    """Dispatch, experts, combine; backward the same with gradients, tables last.

    As one function, because gradients then travel in the dtype they have, and not in that of the
    partial sums, and those of hidden states can be sent before those of the tables are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        down_eH: Tensor,
        up_eH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        layer_dispatch: LayerDispatch,
        dispatcher: TokenDispatcher,
        settings: Settings,
        counters: tuple[Callable[[Tensor], None], ...],
    ) -> Tensor:
        given = Input.of(hidden_TH, indices_TK, weights_TK, settings)
        metadata = None
        while metadata is None:
            with phase("dispatch"):
                dispatched = layer_dispatch.dispatch(given, dispatcher)
                received = dispatched.received
            with phase("experts"):
                rows_RH = received.hidden_RH
                backend = choose_backend(None, rows_RH, down_eH, up_eH, None)
                sum_dtype = accumulator_dtype(rows_RH.dtype, down_eH.dtype)
                sums = dispatched.sums(sum_dtype)
                pairs = Pairs.from_checked_offsets(
                    received.row_offsets,
                    received.expert_ids_M,
                    down_eH.shape[0],
                    received.mean_pairs,
                )
                partial_RH = WholeOutput(rows_RH.shape, sum_dtype, rows_RH.device)
                scores_M = expert_forward(
                    rows_RH,
                    ExpertTables(down_eH, up_eH),
                    pairs,
                    received.weights_M,
                    backend,
                    received.rows_in,
                    outputs=sums.parts or partial_RH,
                )
            with phase("combine"):
                sums.start(rows_RH if sums.parts else partial_RH.value)
                out_TH = sums.collect()
            metadata = layer_dispatch.settle(given, dispatched)
        num_pairs = sum(metadata.pairs_received)
        saved, weights_M = pairs.saved(scores_M).first(num_pairs), received.weights_M[:num_pairs]
        for count in counters:
            count(saved.expert_ids)
        ctx.save_for_backward(rows_RH, down_eH, up_eH, weights_M, *saved, *metadata.tensors())
        ctx.dispatched = metadata.with_tensors()
        ctx.dispatcher, ctx.backend = dispatched.dispatcher, backend
        ctx.hidden_dtype, ctx.mean_pairs = hidden_TH.dtype, received.mean_pairs
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            computed = ShardedExperts._backward(ctx, grads[0])
        if torch.is_grad_enabled():
            return tuple(grad if grad is None else _Final.of(grad) for grad in computed)
        return computed

    @staticmethod
    def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        rows_RH, down_eH, up_eH, weights_M, *rest = ctx.saved_tensors
        num_saved = len(SavedPairs._fields)
        saved = SavedPairs(*rest[:num_saved])
        metadata = ctx.dispatched.with_tensors(*rest[num_saved:])
        dispatcher: TokenDispatcher = ctx.dispatcher
        tables, backend = ExpertTables(down_eH, up_eH), ctx.backend
        hidden, down, up, _, weights, *_ = ctx.needs_input_grad
        needs_grad = NeedsGrad(hidden, down, up, weights)
        sum_dtype = accumulator_dtype(ctx.hidden_dtype, down_eH.dtype)
        sums = None
        with phase("dispatch_backward"):
            arriving = dispatcher.start_rows(grad_TH, metadata)
            arriving.fetch()
        with phase("experts_backward"):
            pairs = Pairs.from_saved(saved, down_eH.shape[0], tile_pairs=ctx.mean_pairs)
            score_grads = backward_scores(
                arriving.rows_RH,
                tables,
                pairs,
                saved.scores,
                weights_M,
                needs_grad,
                backend,
                arriving.parts,
            )
        with phase("combine_backward"):
            # Before the sums, so that these travel while those are computed.
            if score_grads.weights is not None:
                weights_returned = dispatcher.start_return(score_grads.weights, metadata)
        with phase("experts_backward"):
            if needs_grad.hidden:
                sums = dispatcher.sums(metadata, rows_RH.shape[1], sum_dtype, ctx.hidden_dtype)
                partial_RH = WholeOutput(rows_RH.shape, sum_dtype, rows_RH.device)
                token_grads(score_grads, tables, pairs, backend, sums.parts or partial_RH)
        with phase("combine_backward"):
            if sums is not None:
                sums.start(rows_RH if sums.parts else partial_RH.value)
            if score_grads.weights is not None:
                weights_returned.arrange()
        with phase("experts_backward"):
            # The loss is averaged over the ranks.
            down_grad, up_grad = table_grads(
                score_grads,
                rows_RH,
                arriving.rows_RH,
                tables,
                pairs,
                needs_grad,
                backend,
                scale=1 / dispatcher.ep_size,
            )
        with phase("combine_backward"):
            hidden_grad = None if sums is None else sums.collect()
            weights_grad = None
            if score_grads.weights is not None:
                weights_grad = weights_returned.collect()
        return hidden_grad, down_grad, up_grad, None, weights_grad, None, None, None, None


class _Final(torch.autograd.Function):
    """The identity, of which no derivative may be taken: PyTorch would go on as if it were 0."""

    @classmethod
    def of(cls, grad: Tensor) -> Tensor:
        # Anything that requires a gradient, or nobody would ask for a derivative.
        final: Tensor = cls.apply(grad, torch.zeros((), requires_grad=True))
        return final

    @staticmethod
    def forward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "experts under ExpertParallel have no second derivative: their gradient was "
            "differentiated (create_graph=True, then backward again)"
        )
