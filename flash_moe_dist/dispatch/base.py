"""Tokens to the ranks that own their experts, and partial sums back.

T local tokens, K experts per token, H hidden size, W ranks of the ep group, E experts in all;
R rows and M pairs received, S rows and P pairs sent, by this rank.

Routing is by rank, not by expert. A token's hidden row crosses to a rank once, however many
of that rank's experts it uses, with a list of (local expert id, routing weight); the owner
returns one partial sum for it, and the token's rank adds these up.

Pairs travel by all-to-all, as messages (`flash_moe_dist.dispatch.message`). Two ways for the rows:

    AllToAllDispatcher    a row goes to the ranks that own some of its experts, and only there
    AllGatherDispatcher   every row goes to every rank, and a sum comes back from every rank; rows
                          of no pairs fill up where ranks have fewer tokens than others
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, ragged_backend, uses_triton
from flash_moe.ops.backends import load_backend
from flash_moe.ops.backends.gather import add_partial_sums
from flash_moe.ops.overlap import InputChunk, OutputChunk, WholeOutput
from flash_moe.ops.pairs import Pairs
from flash_moe_dist.dispatch.collectives import Pending, start_all_gather, start_all_to_all
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.handshake import Counts, Input, exchange_counts
from flash_moe_dist.dispatch.message import Room, unpack, words_of_pair


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back, and the backward pass, need to know of a `dispatch`.

    rows_sent, rows_received, pairs_sent, pairs_received (W,): to and from each rank.
    num_tokens, most_tokens: T here, and on the rank that has most.
    shape_TK: of the indices.
    slots_P (P,), tokens_S (S,), sent_TW (T, W): as `flash_moe_dist.dispatch.message.SentPairs`.
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

    hidden_RH (R, H), of which `rows_in` come one after the other; row_offsets (R+1,);
    expert_ids_M (M,) int32, local; weights_M (M,). Ids and weights may go on after the last row's,
    with anything.
    mean_pairs: of a row, as far as kernels are shaped by it; None: M / R. Given where that would
    depend on what is in the rows, or after them.
    """

    hidden_RH: Tensor
    rows_in: Sequence[InputChunk]
    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor
    mean_pairs: int | None = None


@dataclass(frozen=True)
class ArrivingRows:
    """Rows (R, H) at the owners of their tokens' experts, as they come.

    fetch: to be called once, before any is waited for, when nothing more urgent is to be sent.
    """

    rows_RH: Tensor
    parts: Sequence[InputChunk]
    fetch: Callable[[], object] = lambda: None

    @classmethod
    def all_at_once(cls, pending: Pending) -> "ArrivingRows":
        rows_RH = pending.received
        return cls(rows_RH, [InputChunk(slice(0, rows_RH.shape[0]), pending.wait)])

    def wait(self) -> Tensor:
        self.fetch()
        for part in self.parts:
            part.wait()
        return self.rows_RH


class ReturningValues:
    """Values of pairs on their way to the ranks that sent those: (T, K), 0 in empty slots."""

    def __init__(self, pending: Pending, metadata: DispatchMetadata) -> None:
        self.pending, self.metadata = pending, metadata

    def arrange(self) -> None:
        """Put them into their places beside other work, where that can be."""

    def collect(self) -> Tensor:
        self.pending.wait()
        return self.in_places()

    def in_places(self) -> Tensor:
        assert self.metadata.slots_P is not None
        values_P = self.pending.received
        values_TK = values_P.new_zeros(self.metadata.shape_TK)
        values_TK.view(-1).index_copy_(0, self.metadata.slots_P, values_P)
        return values_TK


class Sums(ABC):
    """Partial sums (R, H) on their way to the ranks of their tokens, where they are added up.

    parts: where to write which of them, in the order in which they should be known; none: they
        are given to `start`, all at once.
    """

    parts: Sequence[OutputChunk] = ()

    @abstractmethod
    def start(self, partial_RH: Tensor) -> None:
        """All are known."""

    @abstractmethod
    def collect(self) -> Tensor:
        """Wait, and add up to (T, H).

        Added in the dtype of the partial sums, in the order of the ranks, and rounded once.
        """


def pairs_per_row(slots: int, ep_size: int) -> int:
    """Pairs of a token with one of the ranks, if it uses experts of all alike."""
    return max(1, -(-slots // ep_size))


class TokenDispatcher(ABC):
    """Dispatch and combine over the ranks of `group`, without autograd.

    A forward pass is `dispatch`, the experts, `sums`. A backward pass is the mirror image:
    `start_rows` of the output's gradient, the experts, `start_return` of the routing weights'
    gradient and `sums` of the hidden states', which may travel while the gradients of the tables
    are computed. The forward pass reads the counts of an exchange on the host, its only host sync;
    the backward pass has none.

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
        routing, counts, received_WC = exchange_counts(
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
        rows.fetch()
        mean_pairs = None
        if self.sends_all_rows:
            mean_pairs = pairs_per_row(given.indices_TK.shape[1], self.ep_size)
        received = ReceivedTokens(rows.rows_RH, rows.parts, *pairs, mean_pairs)
        return received, metadata, counts

    def start_return(self, values_M: Tensor, metadata: DispatchMetadata) -> ReturningValues:
        """Values of the pairs received, back to the ranks that sent them."""
        return ReturningValues(self._send_back(values_M, metadata), metadata)

    def _send_back(self, values_M: Tensor, metadata: DispatchMetadata) -> Pending:
        splits = (metadata.pairs_received, metadata.pairs_sent)
        return start_all_to_all(values_M, *splits, self.group)

    @abstractmethod
    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        """Rows (T, H) of the tokens to the owners of their experts."""

    @abstractmethod
    def sums(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Sums:
        """For partial sums (R, H) of the tokens received, and what they add up to."""


class AllToAllDispatcher(TokenDispatcher):
    """A row goes once to each rank that owns some of its experts."""

    name = "all_to_all"
    sends_all_rows = False

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        assert metadata.tokens_S is not None
        rows_SH = rows_TH.index_select(0, metadata.tokens_S)
        splits = (metadata.rows_sent, metadata.rows_received)
        return ArrivingRows.all_at_once(start_all_to_all(rows_SH, *splits, self.group))

    def sums(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Sums:
        return _SumsOfSomeRanks(self, metadata, out_dtype)


class AllGatherDispatcher(TokenDispatcher):
    """Every row goes to every rank: static shapes, nothing packed."""

    name = "all_gather"
    sends_all_rows = True

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        filled_XH = filled_up(rows_TH, metadata.most_tokens)
        return ArrivingRows.all_at_once(start_all_gather(filled_XH, self.group))

    def sums(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Sums:
        return _SumsOfAllRanks(self, metadata, out_dtype)

    def words_to_fill(self, room: Room, device: torch.device) -> Tensor:
        """(W, L) int32: messages to all ranks, before they are packed."""
        return torch.empty(self.ep_size, room.message_words, device=device, dtype=torch.int32)

    def exchange_words(self, words_WL: Tensor) -> Tensor:
        """Messages to all ranks into those from all ranks, as `unpack_in_room` takes them."""
        splits = [words_WL.shape[1]] * self.ep_size
        pending = start_all_to_all(words_WL.view(-1), splits, splits, self.group)
        return pending.wait().view_as(words_WL)


class _SumsOfSomeRanks(Sums):
    def __init__(
        self, dispatcher: TokenDispatcher, metadata: DispatchMetadata, out_dtype: torch.dtype
    ) -> None:
        self.group, self.metadata, self.out_dtype = dispatcher.group, metadata, out_dtype

    def start(self, partial_RH: Tensor) -> None:
        splits = (self.metadata.rows_received, self.metadata.rows_sent)
        self.pending = start_all_to_all(partial_RH, *splits, self.group)

    def collect(self) -> Tensor:
        assert self.metadata.sent_TW is not None
        return sum_copies(self.pending.wait(), self.metadata.sent_TW, self.out_dtype)


class _SumsOfAllRanks(Sums):
    """Not by reduce-scatter: NCCL's takes longer for as many bytes, and its order is its own."""

    def __init__(
        self, dispatcher: TokenDispatcher, metadata: DispatchMetadata, out_dtype: torch.dtype
    ) -> None:
        self.group, self.metadata, self.out_dtype = dispatcher.group, metadata, out_dtype
        self.splits = [metadata.most_tokens] * dispatcher.ep_size

    def start(self, partial_RH: Tensor) -> None:
        self.pending = start_all_to_all(partial_RH, self.splits, self.splits, self.group)

    def collect(self) -> Tensor:
        received_RH = self.pending.wait()
        pieces_WXH = received_RH.view(len(self.splits), self.splits[0], received_RH.shape[1])
        total_XH = received_RH.new_empty(pieces_WXH.shape[1:], dtype=self.out_dtype)
        sum_over_ranks(pieces_WXH, total_XH)
        return total_XH[: self.metadata.num_tokens]


DISPATCHERS: dict[DispatcherName, type[TokenDispatcher]] = {
    one.name: one for one in (AllToAllDispatcher, AllGatherDispatcher)
}


def sum_copies(rows_SH: Tensor, sent_TW: Tensor, dtype: torch.dtype) -> Tensor:
    """For each token the sum of its rows among (S, H), in the order of the ranks, as (T, H)."""
    pattern = Pairs.from_checked_indices(sent_TW, rows_SH.shape[0])
    ones_N = torch.ones(pattern.num_pairs, device=rows_SH.device)
    primitives = load_backend(ragged_backend(default_backend(rows_SH.device)))
    sums_TH = WholeOutput((len(sent_TW), rows_SH.shape[1]), dtype, rows_SH.device)
    primitives.spmm(ones_N, rows_SH, pattern, sums_TH)
    return sums_TH.value


def sum_over_ranks(pieces_WXH: Tensor, total_XH: Tensor) -> None:
    """The sum over the first dimension, in its order, rounded once."""
    if uses_triton(default_backend(pieces_WXH.device)):
        add_partial_sums(pieces_WXH, total_XH.dtype, total_XH)
        return
    sum_XH = pieces_WXH[0].clone()
    for piece_XH in pieces_WXH[1:]:
        sum_XH += piece_XH
    total_XH.copy_(sum_XH)


def filled_up(rows: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros at the end, up to `num_rows`."""
    missing = num_rows - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
