"""Tokens to the ranks that own their experts, and partial sums back.

T local tokens, K experts per token, H hidden size, W ranks of the ep group, E experts in all;
R rows received, M pairs received, and S rows sent, by this rank.

Routing is by rank, not by expert. A token's hidden row crosses to a rank once, however many
of that rank's experts it uses, with a list of (local expert id, routing weight); the owner
returns one partial sum for it. Rows and pairs are sent rank by rank, within a rank token by
token, within a token by ascending expert id. An index of -1 is sent nowhere.

Example: 2 ranks of 2 experts, this rank's tokens choose [3, 0], [1, 0], [2, -1]. Rank 0 gets
the rows of tokens 0 and 1 with experts [0], [0, 1]; rank 1 those of tokens 0 and 2 with its
local experts [1], [0].
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.arrange import poll_index_errors, raise_ids_out_of_range
from flash_moe.ops.backends import (
    check_backend,
    default_backend,
    load_backend,
    ragged_backend,
)
from flash_moe.ops.checks import check_routing
from flash_moe.ops.pairs import Pairs
from flash_moe_dist.agreement import raise_same_error
from flash_moe_dist.collectives import all_to_all_rows
from flash_moe_dist.sharding import experts_per_rank


@dataclass(frozen=True)
class DispatchMetadata:
    """What `combine` needs to know of a `dispatch`.

    input_splits, output_splits (W,): rows sent to and received from each rank.
    """

    input_splits: list[int]
    output_splits: list[int]
    sent: "SentRows"


@dataclass(frozen=True)
class SentRows:
    """Which token each sent row came from, and the other way round.

    tokens (S,) token of each sent row; pattern: T tokens by S rows sent.
    """

    tokens: Tensor
    pattern: Pairs


@dataclass(frozen=True)
class ReceivedTokens:
    """Tokens at the owner of their experts, in the form `ragged_flash_expert_func` takes.

    hidden_RH (R, H); row_offsets (R+1,); expert_ids_M (M,) int32, local; weights_M (M,).
    """

    hidden_RH: Tensor
    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor


class AllToAllDispatcher:
    """Dispatch and combine over the ranks of `group`.

    Forward: one exchange of counts (read on the host: the only host sync), rows to their
    owners, pairs to their owners; partial sums back. Backward: gradients of the output to the
    owners, gradients of rows and routing weights back; no host sync.

    Args:
        group: the expert-parallel ranks. Every rank calls `dispatch` and `combine` equally
            often, with any number of tokens, zero included.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ep_size = dist.get_world_size(group)

    def dispatch(
        self,
        hidden_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        hidden_size: int,
        device: torch.device,
    ) -> tuple[ReceivedTokens, DispatchMetadata]:
        """Send each token to the owners of its experts.

        Args:
            hidden_TH, indices_TK, weights_TK: as `triton_flash_expert_func` takes them.
            num_experts: E, over all ranks; hidden_size, device: of the tables.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or the
                ranks' inputs do not fit together.
        """
        error = _input_error(hidden_TH, indices_TK, weights_TK, hidden_size, device)
        routing = None
        settings: tuple[Any, ...] = ()
        counts_3W = torch.zeros(3, self.ep_size, dtype=torch.int64, device=device)
        if error is None:
            routing = _Routing.of(indices_TK, num_experts, self.ep_size)
            counts_3W = routing.counts_3W
            settings = (
                num_experts,
                hidden_size,
                str(hidden_TH.dtype),
                str(weights_TK.dtype),
                hidden_TH.requires_grad,
                weights_TK.requires_grad,
                torch.is_grad_enabled(),
            )
        counts = self._exchange_counts(counts_3W, settings)
        if routing is None or not counts.sound:
            self._raise_together(error, indices_TK, num_experts, settings)
            raise AssertionError("bad counts without an error on any rank")

        to_send = routing.to_send(sum(counts.rows_sent), sum(counts.pairs_sent))
        rows = (counts.rows_sent, counts.rows_received, self.group)
        pairs = (counts.pairs_sent, counts.pairs_received, self.group)
        pairs_per_row_R = all_to_all_rows(to_send.pairs_per_row, *rows)
        expert_ids_M = all_to_all_rows(to_send.local_ids, *pairs)
        hidden_RH = all_to_all_rows(_GatherRows.apply(hidden_TH, to_send.rows), *rows)
        weights_M = all_to_all_rows(weights_TK.reshape(-1).index_select(0, to_send.slots), *pairs)
        row_offsets = torch.nn.functional.pad(pairs_per_row_R.cumsum(0), (1, 0))
        return (
            ReceivedTokens(hidden_RH, row_offsets, expert_ids_M, weights_M),
            DispatchMetadata(counts.rows_sent, counts.rows_received, to_send.rows),
        )

    def combine(self, partial_RH: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Return the partial sums (R, H) to their tokens' ranks; add them up to (T, H)."""
        returned_SH = all_to_all_rows(
            partial_RH, metadata.output_splits, metadata.input_splits, self.group
        )
        combined: Tensor = _SumRows.apply(returned_SH, metadata.sent)
        return combined

    def _exchange_counts(self, counts_3W: Tensor, settings: tuple[Any, ...]) -> "_Counts":
        # A rank with bad input has no settings and so differs from all others.
        fingerprint = counts_3W.new_full((1, self.ep_size), zlib.crc32(repr(settings).encode()))
        sent_W4 = torch.cat([counts_3W, fingerprint]).t().contiguous()
        received_W4 = torch.empty_like(sent_W4)
        dist.all_to_all_single(received_W4, sent_W4, group=self.group)
        sent, received = torch.stack([sent_W4.t(), received_W4.t()]).tolist()
        sound = not any(received[2]) and len(set(received[3])) == 1
        return _Counts(sent[0], received[0], sent[1], received[1], sound)

    def _raise_together(
        self,
        error: Exception | None,
        indices_TK: Tensor,
        num_experts: int,
        settings: tuple[Any, ...],
    ) -> None:
        if error is None:
            try:
                raise_ids_out_of_range(indices_TK, num_experts)
            except ValueError as out_of_range:
                error = out_of_range
        raise_same_error(error, self.group)
        everyone: list[Any] = [None] * self.ep_size
        dist.all_gather_object(everyone, settings, group=self.group)
        raise ValueError(
            "ranks must agree on (num_experts, hidden_size, dtype of hidden_states, dtype of "
            "routing_weights, whether each requires grad, grad mode), got "
            + ", ".join(f"rank {rank}: {one}" for rank, one in enumerate(everyone))
        )


def _input_error(
    hidden_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    hidden_size: int,
    device: torch.device,
) -> Exception | None:
    try:
        check_backend(default_backend(device), device)
        # Reported here, where all ranks hear of it, and not in the middle of an exchange.
        poll_index_errors(device)
        check_routing(hidden_TH, indices_TK, weights_TK)
        if hidden_TH.shape[1] != hidden_size:
            raise ValueError(
                f"hidden_states must have rows of hidden_size = {hidden_size} as the tables "
                f"have, got shape {tuple(hidden_TH.shape)}"
            )
        named = {"hidden_states": hidden_TH, "indices": indices_TK, "routing_weights": weights_TK}
        for name, tensor in named.items():
            if tensor.device != device:
                raise ValueError(
                    f"{name} must be on {device}, where the tables are, got {tensor.device}"
                )
    except (TypeError, ValueError) as error:
        return error
    return None


@dataclass(frozen=True)
class _Counts:
    """Rows and pairs sent to and received from each rank; sound unless some input is bad."""

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    sound: bool


@dataclass(frozen=True)
class _Routing:
    """This rank's pairs by owner, on the device.

    ids_N, slots_N   ids sorted within each token, and the place in (T, K) each came from
    begin_WT         where the pairs of token t with rank w begin in ids_N
    pairs_WT         how many there are
    counts_3W        rows for each rank, pairs for each rank, ids out of range (in each column)
    local_size       experts of each rank but the last ones
    """

    ids_N: Tensor
    slots_N: Tensor
    begin_WT: Tensor
    pairs_WT: Tensor
    counts_3W: Tensor
    local_size: int

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, ep_size: int) -> "_Routing":
        device = indices_TK.device
        num_tokens, slots = indices_TK.shape
        ids_TK, slot_TK = indices_TK.sort(dim=1)
        local_size = experts_per_rank(num_experts, ep_size)
        # The last rank's range ends with the last expert: ids beyond it go nowhere.
        bounds = (torch.arange(ep_size + 1, device=device) * local_size).clamp(max=num_experts)
        bounds_TW1 = bounds.to(ids_TK.dtype).repeat(num_tokens, 1)
        begin_TW1 = torch.searchsorted(ids_TK, bounds_TW1)
        pairs_WT = begin_TW1.diff(dim=1).t().contiguous()
        first_slot_T = torch.arange(num_tokens, device=device) * slots
        out_of_range = ((indices_TK < -1) | (indices_TK >= num_experts)).sum()
        counts_3W = torch.stack(
            [(pairs_WT > 0).sum(1), pairs_WT.sum(1), out_of_range.expand(ep_size)]
        )
        return cls(
            ids_TK.flatten(),
            (slot_TK + first_slot_T.unsqueeze(1)).flatten(),
            begin_TW1[:, :-1].t() + first_slot_T,
            pairs_WT,
            counts_3W,
            local_size,
        )

    def to_send(self, num_rows: int, num_pairs: int) -> "_ToSend":
        """What goes out, in order; the two sizes spare a wait for the device."""
        sent_WT = self.pairs_WT > 0
        num_tokens = sent_WT.shape[1]
        places_S = torch.nonzero_static(sent_WT.flatten(), size=num_rows).squeeze(1)
        row_of_token_WT = sent_WT.flatten().cumsum(0).view_as(sent_WT) - 1
        rows = SentRows(
            places_S % max(1, num_tokens),
            Pairs.from_slots(row_of_token_WT.masked_fill(~sent_WT, -1).t(), num_rows),
        )
        pairs_per_row = self.pairs_WT.flatten()[places_S]
        first_pair_S = pairs_per_row.cumsum(0) - pairs_per_row
        shift_S = self.begin_WT.flatten()[places_S] - first_pair_S
        first_expert_S = (places_S // max(1, num_tokens)) * self.local_size
        shift_and_expert = torch.stack([shift_S, first_expert_S], dim=1).repeat_interleave(
            pairs_per_row, dim=0, output_size=num_pairs
        )
        positions = torch.arange(num_pairs, device=places_S.device) + shift_and_expert[:, 0]
        local_ids = (self.ids_N[positions] - shift_and_expert[:, 1]).to(torch.int32)
        return _ToSend(rows, pairs_per_row.to(torch.int32), local_ids, self.slots_N[positions])


@dataclass(frozen=True)
class _ToSend:
    """Rows with their pairs_per_row (S,); local_ids and slots of the pairs, one after another."""

    rows: SentRows
    pairs_per_row: Tensor
    local_ids: Tensor
    slots: Tensor


class _GatherRows(torch.autograd.Function):
    """(T, H) to the rows (S, H) that are sent."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, sent: SentRows) -> Tensor:
        ctx.sent = sent
        return hidden_TH.index_select(0, sent.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_rows(grads[0], ctx.sent), None


class _SumRows(torch.autograd.Function):
    """Rows (S, H) that came back, summed for each token to (T, H)."""

    @staticmethod
    def forward(ctx: Any, returned_SH: Tensor, sent: SentRows) -> Tensor:
        ctx.sent = sent
        return _sum_rows(returned_SH, sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.sent.tokens), None


def _sum_rows(rows_SH: Tensor, sent: SentRows) -> Tensor:
    # In float32 and in the order of the ranks, so that the sum is repeatable.
    ones_N = torch.ones(sent.pattern.num_pairs, device=rows_SH.device)
    primitives = load_backend(ragged_backend(default_backend(rows_SH.device)))
    return primitives.spmm(ones_N, rows_SH, sent.pattern, rows_SH.dtype)
