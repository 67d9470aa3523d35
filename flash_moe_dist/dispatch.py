"""Tokens to the ranks that own their experts, and partial sums back.

T local tokens, K experts per token, H hidden size, W ranks of the ep group, E experts in all;
R rows and M pairs received, S rows and P pairs sent, by this rank.

Routing is by rank, not by expert. A token's hidden row crosses to a rank once, however many
of that rank's experts it uses, with a list of (local expert id, routing weight); the owner
returns one partial sum for it, and the token's rank adds these up.

Pairs travel by all-to-all, in words as `flash_moe_dist.routing` says. Two ways for the rows:

    AllToAllDispatcher    a row goes to the ranks that own some of its experts, and only there
    AllGatherDispatcher   every row goes to every rank, and a sum comes back from every rank; rows
                          of no pairs fill up where ranks have fewer tokens than others
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backends import (
    TRITON_BACKENDS,
    default_backend,
    load_backend,
    ragged_backend,
)
from flash_moe.ops.backends.gather import sum_pieces
from flash_moe.ops.pairs import Pairs
from flash_moe_dist.collectives import Pending, start_all_gather, start_all_to_all
from flash_moe_dist.counts import Counts, Input, agree_on_counts
from flash_moe_dist.routing import unpack, words_of_pair
from flash_moe_dist.volume import DispatcherName


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back, and the backward pass, need to know of a `dispatch`.

    rows_sent, rows_received, pairs_sent, pairs_received (W,): to and from each rank.
    num_tokens, most_tokens: T here, and on the rank that has most.
    shape_TK: of the indices.
    slots_P (P,), tokens_S (S,), sent_TW (T, W): as `flash_moe_dist.routing.SentPairs`.
    """

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    num_tokens: int
    most_tokens: int
    shape_TK: torch.Size
    slots_P: Tensor | None = None
    tokens_S: Tensor | None = None
    sent_TW: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.slots_P, self.tokens_S, self.sent_TW

    def with_tensors(self, *tensors: Tensor | None) -> "DispatchMetadata":
        """The same with these in place of `tensors()`, so that autograd can keep them."""
        slots_P, tokens_S, sent_TW = tensors or (None, None, None)
        return replace(self, slots_P=slots_P, tokens_S=tokens_S, sent_TW=sent_TW)


@dataclass(frozen=True)
class ReceivedTokens:
    """Tokens at the owner of their experts, in the form `ragged_flash_expert_func` takes.

    hidden_RH (R, H); row_offsets (R+1,); expert_ids_M (M,) int32, local; weights_M (M,). Ids and
    weights may go on after the last row's, with anything.
    mean_pairs: of a row, as far as kernels are shaped by it; None: M / R. Given where that would
    depend on what is in the rows, or after them.
    """

    hidden_RH: Tensor
    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor
    mean_pairs: int | None = None


def pairs_per_row(slots: int, ep_size: int) -> int:
    """Pairs of a token with one of the ranks, if it uses experts of all alike."""
    return max(1, -(-slots // ep_size))


class TokenDispatcher(ABC):
    """Dispatch and combine over the ranks of `group`, without autograd.

    A forward pass is `dispatch`, the experts, `combine`. A backward pass is the mirror image:
    `dispatch_rows` of the output's gradient, the experts, `start_combine` of the hidden states'
    gradient and `start_return` of the routing weights', which travel while the gradients of the
    tables are computed. The forward pass reads the counts of an exchange on the host, its only
    host sync; the backward pass has none.

    Args:
        group: the expert-parallel ranks. Every rank calls every method equally often, with any
            number of tokens, zero included.
    """

    name: DispatcherName
    sends_all_rows: bool

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ep_size = dist.get_world_size(group)

    def dispatch(self, given: Input) -> tuple[ReceivedTokens, DispatchMetadata, Counts]:
        """Send each token to the owners of its experts, after an exchange of counts.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or the
                ranks' settings differ.
        """
        weights_TK = given.weights_TK
        routing, counts, received_WC = agree_on_counts(
            given, self.ep_size, self.group, count_rows=not self.sends_all_rows
        )
        most_tokens = max(counts.tokens)
        metadata = DispatchMetadata(
            counts.rows_sent,
            counts.rows_received,
            counts.pairs_sent,
            counts.pairs_received,
            given.hidden_TH.shape[0],
            most_tokens,
            given.indices_TK.shape,
        )
        # Where every rank gets all rows, these travel while pairs are packed.
        rows = self.start_rows(given.hidden_TH, metadata) if self.sends_all_rows else None
        rows_of_all = most_tokens if self.sends_all_rows else 0
        sent = routing.pack(weights_TK, counts.rows_sent, counts.pairs_sent, rows_of_all)
        metadata = metadata.with_tensors(sent.slots_P, sent.tokens_S, sent.sent_TW)
        rows_received = [rows_of_all] * self.ep_size if rows_of_all else counts.rows_received
        width = words_of_pair(weights_TK.dtype)
        received_splits = [
            num_rows + width * num_pairs
            for num_rows, num_pairs in zip(rows_received, counts.pairs_received, strict=True)
        ]
        words = start_all_to_all(sent.words, sent.splits, received_splits, self.group)
        rows = rows or self.start_rows(given.hidden_TH, metadata)
        pairs = unpack(
            words.wait(),
            received_WC,
            counts.rows_received,
            counts.pairs_received,
            weights_TK.dtype,
            rows_of_all,
        )
        mean_pairs = None
        if self.sends_all_rows:
            mean_pairs = pairs_per_row(given.indices_TK.shape[1], self.ep_size)
        return ReceivedTokens(rows.wait(), *pairs, mean_pairs), metadata, counts

    def dispatch_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Rows (T, H) of the tokens to the owners of their experts, as (R, H)."""
        return self.start_rows(rows_TH, metadata).wait()

    def combine(self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype) -> Tensor:
        """Return partial sums (R, H) to their tokens' ranks; add them up to (T, H) in `dtype`.

        Added in the dtype of the partial sums, in the order of the ranks, and rounded once.
        """
        return self.start_combine(partial_RH, metadata, dtype)()

    def start_return(self, values_M: Tensor, metadata: DispatchMetadata) -> Callable[[], Tensor]:
        """Values of the pairs received back to the ranks that sent them.

        The call of what is returned waits for this rank's: (T, K), 0 in empty slots.
        """
        pending = start_all_to_all(
            values_M, metadata.pairs_received, metadata.pairs_sent, self.group
        )

        def returned() -> Tensor:
            assert metadata.slots_P is not None
            values_P = pending.wait()
            values_TK = values_P.new_zeros(metadata.shape_TK)
            values_TK.view(-1).index_copy_(0, metadata.slots_P, values_P)
            return values_TK

        return returned

    @abstractmethod
    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Pending:
        """As `dispatch_rows`, without waiting."""

    @abstractmethod
    def start_combine(
        self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """As `combine`, in two: the call of what is returned waits, and adds up."""


class AllToAllDispatcher(TokenDispatcher):
    """A row goes once to each rank that owns some of its experts."""

    name = "all_to_all"
    sends_all_rows = False

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Pending:
        assert metadata.tokens_S is not None
        rows_SH = rows_TH.index_select(0, metadata.tokens_S)
        return start_all_to_all(rows_SH, metadata.rows_sent, metadata.rows_received, self.group)

    def start_combine(
        self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        splits = (metadata.rows_received, metadata.rows_sent)
        pending = start_all_to_all(partial_RH, *splits, self.group)

        def combined() -> Tensor:
            assert metadata.sent_TW is not None
            return sum_copies(pending.wait(), metadata.sent_TW, dtype)

        return combined


class AllGatherDispatcher(TokenDispatcher):
    """Every row goes to every rank: static shapes, nothing packed."""

    name = "all_gather"
    sends_all_rows = True

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Pending:
        return start_all_gather(_filled_up(rows_TH, metadata.most_tokens), self.group)

    def start_combine(
        self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        # Not a reduce-scatter: NCCL's takes longer for as many bytes, and its order is its own.
        most_tokens, hidden_size = metadata.most_tokens, partial_RH.shape[1]
        splits = [most_tokens] * self.ep_size
        pending = start_all_to_all(partial_RH, splits, splits, self.group)

        def combined() -> Tensor:
            pieces_WXH = pending.wait().view(self.ep_size, most_tokens, hidden_size)
            return sum_over_ranks(pieces_WXH, dtype)[: metadata.num_tokens]

        return combined


DISPATCHERS: dict[DispatcherName, type[TokenDispatcher]] = {
    one.name: one for one in (AllToAllDispatcher, AllGatherDispatcher)
}


def sum_copies(rows_SH: Tensor, sent_TW: Tensor, dtype: torch.dtype) -> Tensor:
    """For each token the sum of its rows among (S, H), in the order of the ranks, as (T, H)."""
    pattern = Pairs.from_slots(sent_TW, rows_SH.shape[0])
    ones_N = torch.ones(pattern.num_pairs, device=rows_SH.device)
    primitives = load_backend(ragged_backend(default_backend(rows_SH.device)))
    return primitives.spmm(ones_N, rows_SH, pattern, dtype)


def sum_over_ranks(pieces_WXH: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, in its order, rounded once."""
    if default_backend(pieces_WXH.device) in TRITON_BACKENDS:
        return sum_pieces(pieces_WXH, dtype)
    total_XH = pieces_WXH[0].clone()
    for piece_XH in pieces_WXH[1:]:
        total_XH += piece_XH
    return total_XH.to(dtype)


def _filled_up(rows: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros at the end, up to `num_rows`."""
    missing = num_rows - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
