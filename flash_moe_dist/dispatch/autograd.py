"""Autograd function of a sharded layer: dispatch, experts, combine, and the same backward.

T local tokens, K experts per token, H hidden size, e local experts; R rows and M pairs received.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from flash_moe.ops.overlap import Outputs
from flash_moe.ops.pairs import Pairs, SavedPairs
from flash_moe_dist.dispatch.base import (
    Dispatcher,
    DispatchMetadata,
    MetadataTensors,
    ReceivedTokens,
)
from flash_moe_dist.dispatch.capacity import LayerDispatch
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.handshake import LayerSettings, RankInput
from flash_moe_dist.phases import phase


class _SavedTensors(NamedTuple):
    """Tensors of a forward pass that its backward pass needs, in the order autograd saves them."""

    rows_RH: Tensor
    down_eH: Tensor
    up_eH: Tensor
    weights_M: Tensor
    scores: Tensor
    expert_ids: Tensor
    slot_order: Tensor
    row_offsets: Tensor
    hot_workspace: Tensor
    slots_P: Tensor | None
    tokens_S: Tensor | None
    sent_TW: Tensor | None

    @property
    def pairs(self) -> SavedPairs:
        return SavedPairs(
            self.scores, self.expert_ids, self.slot_order, self.row_offsets, self.hot_workspace
        )


class ShardedExperts(torch.autograd.Function):
    """Dispatch, experts, combine; in the backward pass the same with gradients, tables last.

    One function, because gradients then travel in their own dtype, not in that of the partial
    sums, and gradients of hidden states are sent before those of the tables are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        down_eH: Tensor,
        up_eH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        layer: LayerDispatch,
        dispatcher: DispatcherName,
        settings: LayerSettings,
        counters: tuple[Callable[[Tensor], None], ...],
    ) -> Tensor:
        backend = choose_backend(None, down_eH, down_eH, up_eH, None)

        tables = ExpertTables(down_eH, up_eH)

        def experts(received: ReceivedTokens, outputs: Outputs) -> SavedPairs:
            pairs = Pairs.from_checked_offsets(
                received.row_offsets, received.expert_ids_M, len(down_eH), received.tile_pairs
            )
            scores_M = expert_forward(
                received.hidden_RH,
                tables,
                pairs,
                received.weights_M,
                backend,
                received.inputs,
                outputs=outputs,
            )
            return pairs.saved(scores_M)

        inp = RankInput.check(hidden_TH, indices_TK, weights_TK, settings)
        completed = layer.run(inp, dispatcher, experts)
        received, metadata = completed.received, completed.metadata
        assert metadata.pairs is not None
        num_pairs = sum(metadata.pairs.received)
        pairs: SavedPairs = completed.saved.first(num_pairs)
        for count in counters:
            count(pairs.expert_ids)
        saved = _SavedTensors(
            received.hidden_RH,
            down_eH,
            up_eH,
            received.weights_M[:num_pairs],
            *pairs,
            *metadata.tensors,
        )
        ctx.save_for_backward(*saved)
        ctx.dispatch_metadata = metadata.with_tensors(MetadataTensors())
        ctx.dispatcher, ctx.backend = completed.dispatcher, backend
        ctx.hidden_dtype, ctx.tile_pairs = hidden_TH.dtype, received.tile_pairs
        return completed.out_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            computed = ShardedExperts._backward(ctx, grads[0])
        if torch.is_grad_enabled():
            return tuple(grad if grad is None else _Final.of(grad) for grad in computed)
        return computed

    @staticmethod
    def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        saved = _SavedTensors(*ctx.saved_tensors)
        dispatcher: Dispatcher = ctx.dispatcher
        metadata: DispatchMetadata = ctx.dispatch_metadata.with_tensors(
            MetadataTensors(saved.slots_P, saved.tokens_S, saved.sent_TW)
        )
        hidden, down, up, _, weights, *_ = ctx.needs_input_grad
        needs_grad = NeedsGrad(hidden, down, up, weights)
        tables, backend = ExpertTables(saved.down_eH, saved.up_eH), ctx.backend
        sum_dtype = accumulator_dtype(ctx.hidden_dtype, saved.down_eH.dtype)
        combine = weights_returned = None
        with phase("dispatch_backward"):
            arriving = dispatcher.send_rows(grad_TH, metadata)
            arriving.start_transfer()
        with phase("experts_backward"):
            pairs = Pairs.from_saved(saved.pairs, len(saved.down_eH), tile_pairs=ctx.tile_pairs)
            score_grads = backward_scores(
                arriving.rows_RH,
                tables,
                pairs,
                saved.scores,
                saved.weights_M,
                needs_grad,
                backend,
                arriving.chunks,
            )
        with phase("combine_backward"):
            # Before the partial sums, so that these values travel while those are computed.
            if score_grads.weights is not None:
                weights_returned = dispatcher.return_values(score_grads.weights, metadata)
        with phase("experts_backward"):
            if needs_grad.hidden:
                hidden_size = saved.rows_RH.shape[1]
                combine = dispatcher.combine(metadata, hidden_size, sum_dtype, ctx.hidden_dtype)
                token_grads(score_grads, tables, pairs, backend, combine.outputs)
        with phase("combine_backward"):
            if weights_returned is not None:
                weights_returned.scatter_on_side_stream()
        with phase("experts_backward"):
            # The loss is averaged over the ranks.
            down_grad, up_grad = table_grads(
                score_grads,
                saved.rows_RH,
                arriving.rows_RH,
                tables,
                pairs,
                needs_grad,
                backend,
                scale=1 / dispatcher.ep_size,
            )
        with phase("combine_backward"):
            hidden_grad = None if combine is None else combine.result()
            weights_grad = None if weights_returned is None else weights_returned.result()
        return hidden_grad, down_grad, up_grad, None, weights_grad, None, None, None, None


class _Final(torch.autograd.Function):
    """Identity whose derivative may not be taken; PyTorch would otherwise take it as 0."""

    @classmethod
    def of(cls, grad: Tensor) -> Tensor:
        # Some input must require a gradient for a derivative to be asked for at all.
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
