"""Autograd function of a sharded layer: dispatch, experts, combine, and the same backward.

T local tokens, K experts per token, H hidden size, e local experts; R rows and M pairs received.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import choose_backend
from flash_moe.ops.backends import accumulator_dtype
from flash_moe.ops.expert_math import Backward, forward
from flash_moe.ops.overlap import OutputChunk
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
    scores_M: Tensor
    expert_ids_M: Tensor
    slot_order: Tensor
    row_offsets: Tensor
    hot_workspace: Tensor
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
        counters: tuple[Callable[[Tensor], None], ...],
    ) -> Tensor:
        backend = choose_backend(None, down_eH, down_eH, up_eH, None)

        def experts(
            received: ReceivedTokens, outputs: Callable[[], Sequence[OutputChunk]]
        ) -> tuple[Tensor, ...]:
            chunks = outputs()
            partial_RH, *saved = forward(
                received.hidden_RH,
                down_eH,
                up_eH,
                received.expert_ids_M,
                received.row_offsets,
                received.weights_M,
                backend,
                accumulator_dtype(received.hidden_RH.dtype, down_eH.dtype),
                checked=True,
                mean_pairs=received.tile_pairs,
                rows_in=received.inputs,
                rows_out=chunks if backend == "gather" else (),
            )
            if backend != "gather":
                (chunk,) = chunks
                chunk.out.copy_(partial_RH)
                chunk.on_written()
            return tuple(saved)

        inp = RankInput.check(hidden_TH, indices_TK, weights_TK, settings)
        completed = layer.run(inp, dispatcher, experts)
        received, metadata = completed.received, completed.metadata
        assert metadata.pairs is not None
        num_pairs = sum(metadata.pairs.received)
        scores_M, expert_ids_M, *others = completed.saved
        expert_ids_M = expert_ids_M[:num_pairs]
        for count in counters:
            count(expert_ids_M)
        saved = _SavedTensors(
            received.hidden_RH,
            down_eH,
            up_eH,
            received.weights_M[:num_pairs],
            scores_M[:num_pairs],
            expert_ids_M,
            *others,  # type: ignore[arg-type]
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
        hidden_needed, down_needed, up_needed, _, weights_needed, *_ = ctx.needs_input_grad
        sum_dtype = accumulator_dtype(ctx.hidden_dtype, saved.down_eH.dtype)
        combine = weights_returned = None
        with phase("dispatch_backward"):
            arriving = dispatcher.send_rows(grad_TH, metadata)
            arriving.start_transfer()
        with phase("experts_backward"):
            backward = Backward(
                arriving.rows_RH,
                saved.rows_RH,
                saved.down_eH,
                saved.up_eH,
                saved.weights_M,
                (
                    saved.scores_M,
                    saved.expert_ids_M,
                    saved.slot_order,
                    saved.row_offsets,
                    saved.hot_workspace,
                ),
                -1,
                (hidden_needed, down_needed, up_needed, weights_needed),
                ctx.backend,
                ctx.tile_pairs,
                arriving.chunks,
            )
        with phase("combine_backward"):
            # Before the partial sums, so that these values travel while those are computed.
            if backward.weights_grad is not None:
                weights_returned = dispatcher.return_values(backward.weights_grad, metadata)
        with phase("experts_backward"):
            if hidden_needed:
                hidden_size = saved.rows_RH.shape[1]
                combine = dispatcher.combine(metadata, hidden_size, sum_dtype, ctx.hidden_dtype)
                chunks = combine.outputs()
                partial_RH = backward.for_tokens(
                    sum_dtype, chunks if ctx.backend == "gather" else ()
                )
                if ctx.backend != "gather":
                    chunks[0].out.copy_(partial_RH)
                    chunks[0].on_written()
        with phase("combine_backward"):
            if weights_returned is not None:
                weights_returned.scatter_on_side_stream()
        with phase("experts_backward"):
            # The loss is averaged over the ranks.
            down_grad, up_grad = backward.for_tables(1 / dispatcher.ep_size)
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
