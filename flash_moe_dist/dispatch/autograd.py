"""The autograd function of a sharded layer: dispatch, experts, combine, and the same in backward.

T local tokens, K experts per token, H hidden size, e local experts; R rows and M pairs received.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import choose_backend
from flash_moe.ops.backends import accumulator_dtype
from flash_moe.ops.expert_math import Backward, forward, slots_of
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
                partial_RH, *kept = forward(
                    rows_RH,
                    down_eH,
                    up_eH,
                    received.expert_ids_M,
                    received.row_offsets,
                    received.weights_M,
                    backend,
                    sum_dtype,
                    checked=True,
                    mean_pairs=received.mean_pairs,
                    rows_in=received.rows_in,
                    rows_out=sums.parts,
                )
            with phase("combine"):
                sums.start(partial_RH)
                out_TH = sums.collect()
            metadata = layer_dispatch.settle(given, dispatched)
        num_pairs = sum(metadata.pairs_received)
        ids_M, weights_M = received.expert_ids_M[:num_pairs], received.weights_M[:num_pairs]
        for count in counters:
            count(ids_M)
        scores_M, _, *others = kept
        kept_M = (scores_M[:num_pairs], ids_M, *others)
        ctx.save_for_backward(rows_RH, down_eH, up_eH, weights_M, *kept_M, *metadata.tensors())
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
        kept, metadata = tuple(rest[:5]), ctx.dispatched.with_tensors(*rest[5:])
        dispatcher: TokenDispatcher = ctx.dispatcher
        hidden_needed, down_needed, up_needed, _, weights_needed, *_ = ctx.needs_input_grad
        sum_dtype = accumulator_dtype(ctx.hidden_dtype, down_eH.dtype)
        sums = None
        with phase("dispatch_backward"):
            arriving = dispatcher.start_rows(grad_TH, metadata)
            arriving.fetch()
        with phase("experts_backward"):
            backward = Backward(
                arriving.rows_RH,
                rows_RH,
                down_eH,
                up_eH,
                weights_M,
                kept,
                slots_of(kept[1]),
                (hidden_needed, down_needed, up_needed, weights_needed),
                ctx.backend,
                ctx.mean_pairs,
                arriving.parts,
            )
        with phase("combine_backward"):
            # Before the sums, so that these travel while those are computed.
            if backward.weights_grad is not None:
                weights_returned = dispatcher.start_return(backward.weights_grad, metadata)
        with phase("experts_backward"):
            if hidden_needed:
                sums = dispatcher.sums(metadata, rows_RH.shape[1], sum_dtype, ctx.hidden_dtype)
                partial_RH = backward.for_tokens(sum_dtype, sums.parts)
        with phase("combine_backward"):
            if sums is not None:
                assert partial_RH is not None
                sums.start(partial_RH)
            if backward.weights_grad is not None:
                weights_returned.arrange()
        with phase("experts_backward"):
            # The loss is averaged over the ranks.
            down_grad, up_grad = backward.for_tables(1 / dispatcher.ep_size)
        with phase("combine_backward"):
            hidden_grad = None if sums is None else sums.collect()
            weights_grad = None
            if backward.weights_grad is not None:
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
