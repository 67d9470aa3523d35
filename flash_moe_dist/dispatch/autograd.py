"""Autograd function of a sharded layer: dispatch, experts, combine, and the same backward.

T local tokens, K experts per token, H hidden size, e local experts; R rows and M pairs received.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, ragged_backend
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.expert_math import (
    ExpertTables,
    NeedsGrad,
    TableCollections,
    backward_scores,
    collect_table_grads,
    expert_forward,
    token_grads,
)
from flash_moe.ops.overlap import Outputs
from flash_moe.ops.pair_grads import reaches_table
from flash_moe.ops.pairs import Pairs, SavedPairs
from flash_moe_dist.dispatch.base import (
    Dispatcher,
    DispatchMetadata,
    ReceivedTokens,
)
from flash_moe_dist.dispatch.capacity import LayerDispatch
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.handshake import LayerSettings, RankInput
from flash_moe_dist.dispatch.message import NO_TENSORS, MetadataTensors
from flash_moe_dist.phases import phase


class _SavedTensors(NamedTuple):
    """Tensors of a forward pass that its backward pass needs, in the order autograd saves them."""

    rows_RH: Tensor
    down_eH: Tensor
    up_eH: Tensor
    weights_M: Tensor
    scores_M: Tensor
    expert_ids_M: Tensor
    row_offsets: Tensor
    slots_P: Tensor | None
    tokens_S: Tensor | None
    sent_TW: Tensor | None


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
        counters: tuple[Callable[[Tensor, Tensor], None], ...],
        collections: TableCollections,
    ) -> Tensor:
        tables = ExpertTables(down_eH, up_eH)
        backend = ragged_backend(default_backend(down_eH.device))

        def experts(received: ReceivedTokens, outputs: Outputs) -> SavedPairs:
            pairs = Pairs.from_checked_offsets(
                received.row_offsets, received.expert_ids_M, down_eH.shape[0], received.tile_pairs
            )
            rows_RH, weights_M = received.hidden_RH, received.weights_M
            scores_M = expert_forward(
                rows_RH, tables, pairs, weights_M, backend, received.inputs, outputs=outputs
            )
            return pairs.saved(scores_M)

        identity = layer.next_pass()
        inp = RankInput.check(hidden_TH, indices_TK, weights_TK, settings, identity)
        completed = layer.run(inp, dispatcher, experts)
        received, metadata = completed.received, completed.metadata
        assert metadata.pairs is not None
        num_pairs = sum(metadata.pairs.received)
        assert completed.saved is not None
        pairs = completed.saved.first(num_pairs)
        weights_M = received.weights_M[:num_pairs]
        for count in counters:
            count(pairs.expert_ids, weights_M)
        saved = _SavedTensors(
            rows_RH=received.hidden_RH,
            down_eH=down_eH,
            up_eH=up_eH,
            weights_M=weights_M,
            scores_M=pairs.scores,
            expert_ids_M=pairs.expert_ids,
            row_offsets=pairs.row_offsets,
            slots_P=metadata.tensors.slots_P,
            tokens_S=metadata.tensors.tokens_S,
            sent_TW=metadata.tensors.sent_TW,
        )
        ctx.save_for_backward(*saved)
        ctx.dispatch_metadata = metadata.with_tensors(NO_TENSORS)
        ctx.dispatcher, ctx.backend = completed.dispatcher, backend
        ctx.group_passes, ctx.name = layer.group_passes, identity.name
        ctx.hidden_dtype, ctx.tile_pairs = hidden_TH.dtype, received.tile_pairs
        ctx.collections = collections
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
        # Agreed in the header of the next forward pass, as the host never waits in this one.
        ctx.group_passes.begin_backward(ctx.name)
        dispatcher: Dispatcher = ctx.dispatcher
        metadata: DispatchMetadata = ctx.dispatch_metadata.with_tensors(
            MetadataTensors(slots_P=saved.slots_P, tokens_S=saved.tokens_S, sent_TW=saved.sent_TW)
        )
        hidden, down, up, _, weights, *_ = ctx.needs_input_grad
        _, down_node, up_node, *_ = (node for node, _ in ctx.next_functions)
        down = down and (ctx.collections.down is None or reaches_table(down_node))
        up = up and (ctx.collections.up is None or reaches_table(up_node))
        needs_grad = NeedsGrad(hidden, down, up, weights)
        tables = ExpertTables(saved.down_eH, saved.up_eH)
        num_local_experts, hidden_size = saved.down_eH.shape
        pairs = Pairs.from_checked_offsets(
            saved.row_offsets, saved.expert_ids_M, num_local_experts, ctx.tile_pairs
        )
        combine = weights_returned = None
        with phase("dispatch_backward"):
            arriving = dispatcher.send_rows(grad_TH, metadata)
            arriving.start_transfer()
        with phase("experts_backward"):
            score_grads = backward_scores(
                arriving.rows_RH,
                tables,
                pairs,
                saved.scores_M,
                saved.weights_M,
                needs_grad,
                ctx.backend,
                arriving.chunks,
            )
        with phase("combine_backward"):
            # Before the partial sums, so that these values travel while those are computed.
            if score_grads.weights is not None:
                weights_returned = dispatcher.return_values(score_grads.weights, metadata)
        with phase("experts_backward"):
            if needs_grad.hidden:
                sum_dtype = accumulator_dtype(ctx.hidden_dtype, saved.down_eH.dtype)
                combine = dispatcher.combine(metadata, hidden_size, sum_dtype, ctx.hidden_dtype)
                token_grads(score_grads, tables, pairs, ctx.backend, combine.outputs)
        with phase("combine_backward"):
            if weights_returned is not None:
                weights_returned.scatter_on_side_stream()
        with phase("experts_backward"):
            # The loss is averaged over the ranks.
            of_tables = collect_table_grads(
                ctx.collections,
                score_grads,
                saved.rows_RH,
                arriving.rows_RH,
                tables,
                pairs,
                needs_grad,
                ctx.backend,
                scale=1 / dispatcher.ep_size,
            )
        with phase("combine_backward"):
            hidden_grad = None if combine is None else combine.result()
            weights_grad = None if weights_returned is None else weights_returned.result()
        grads = (hidden_grad, of_tables.down, of_tables.up, None, weights_grad)
        return *grads, None, None, None, None, None


class _Final(torch.autograd.Function):
    """Identity whose derivative may not be taken; PyTorch would otherwise take it as 0."""

    @classmethod
    def of(cls, grad: Tensor) -> Tensor:
        # Some input must require a gradient for a derivative to be asked for at all.
        final: Tensor = cls.apply(grad, torch.zeros((), device=grad.device, requires_grad=True))
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
