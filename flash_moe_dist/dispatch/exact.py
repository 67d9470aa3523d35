"""Dispatch with exact counts: ranks exchange counts, the host reads them, then everything is sent.

T local tokens, K experts per token, H hidden size, W ranks; R rows and M pairs received, S rows
and P pairs sent by this rank; X most tokens of any rank.

Pairs travel by all-to-all, as messages (`message.py`). Two ways for the rows:

    AllToAllDispatcher    a row goes to the ranks that own some of its experts, and only there
    AllGatherDispatcher   every row goes to every rank, and a sum comes back from every rank; ranks
                          with fewer tokens than X are padded with rows that have no pairs
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, ragged_backend, uses_triton
from flash_moe.ops.backends import load_backend
from flash_moe.ops.backends.gather import add_partial_sums
from flash_moe.ops.overlap import OutputChunk, WholeOutput
from flash_moe.ops.pairs import Pairs
from flash_moe_dist.dispatch.base import (
    ArrivingRows,
    Combine,
    Dispatched,
    Dispatcher,
    DispatchMetadata,
    ReceivedTokens,
    ReturningValues,
    expected_pairs_per_row,
)
from flash_moe_dist.dispatch.collectives import Pending, start_all_gather, start_all_to_all
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.handshake import PassCounts, RankInput, Splits, exchange_counts
from flash_moe_dist.dispatch.message import CapacityLayout, ExactLayout, pack, unpack


class ExactDispatch(NamedTuple):
    """A dispatch with exact counts, and the counts."""

    dispatched: Dispatched
    counts: PassCounts


class ExactDispatcher(Dispatcher):
    """Dispatcher that learns from an exchange of counts how much it sends and receives."""

    def dispatch(self, inp: RankInput) -> ExactDispatch:
        """Exchange counts, then send each token to the owners of its experts. One host sync.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or the ranks'
                settings differ.
        """
        routing, counts, header_WF = exchange_counts(
            inp, self.ep_size, self.group, count_rows=not self.sends_all_rows
        )
        weights_TK = inp.weights_TK
        metadata = DispatchMetadata(
            rows=counts.rows,
            pairs=counts.pairs,
            num_tokens=inp.hidden_TH.shape[0],
            max_tokens=counts.max_tokens,
            shape_TK=inp.indices_TK.shape,
        )
        # Where every rank gets all rows, these travel while pairs are packed.
        rows = self.send_rows(inp.hidden_TH, metadata) if self.sends_all_rows else None
        rows_sent, rows_received = counts.rows
        if self.sends_all_rows:
            rows_sent = rows_received = [counts.max_tokens] * self.ep_size
        sent = ExactLayout(
            rows_W=rows_sent,
            pairs_W=counts.pairs.sent,
            weight_dtype=weights_TK.dtype,
            all_rows=self.sends_all_rows,
        )
        received = replace(sent, rows_W=rows_received, pairs_W=counts.pairs.received)
        packed = pack(routing, weights_TK, sent)
        metadata = metadata.with_tensors(packed.tensors)
        arriving = start_all_to_all(packed.message, sent.splits, received.splits, self.group)
        rows = rows or self.send_rows(inp.hidden_TH, metadata)
        unpacked = unpack(arriving.wait(), header_WF, received, routing.in_kernels)
        rows.start_transfer()
        tile_pairs = None
        if self.sends_all_rows:
            tile_pairs = expected_pairs_per_row(inp.indices_TK.shape[1], self.ep_size)
        tokens = ReceivedTokens.from_unpacked(rows, unpacked, tile_pairs)
        return ExactDispatch(Dispatched(tokens, metadata, self), counts)

    def return_values(self, values_M: Tensor, metadata: DispatchMetadata) -> ReturningValues:
        return ReturningValues(self.send_back(values_M, metadata), metadata)

    def send_back(self, values_M: Tensor, metadata: DispatchMetadata) -> Pending:
        """Start to send values of the pairs received to the ranks that sent the pairs."""
        assert metadata.pairs is not None
        sent, received = metadata.pairs
        return start_all_to_all(values_M, received, sent, self.group)


class AllToAllDispatcher(ExactDispatcher):
    """A row goes once to each rank that owns some of its experts."""

    name = "all_to_all"
    sends_all_rows = False

    def send_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        assert metadata.tensors.tokens_S is not None
        rows_SH = rows_TH.index_select(0, metadata.tensors.tokens_S)
        return ArrivingRows.from_pending(start_all_to_all(rows_SH, *metadata.rows, self.group))

    def combine(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Combine:
        # Partial sums go back to where rows came from.
        rows = Splits(sent=metadata.rows.received, received=metadata.rows.sent)
        return _AllToAllCombine(self.group, metadata, rows, hidden_size, sum_dtype, out_dtype)


class AllGatherDispatcher(ExactDispatcher):
    """Every row goes to every rank: static shapes, nothing packed."""

    name = "all_gather"
    sends_all_rows = True

    def send_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        padded_XH = pad_rows(rows_TH, metadata.max_tokens)
        return ArrivingRows.from_pending(start_all_gather(padded_XH, self.group))

    def combine(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Combine:
        padded = [metadata.max_tokens] * self.ep_size
        rows = Splits(sent=padded, received=padded)
        return _AllGatherCombine(self.group, metadata, rows, hidden_size, sum_dtype, out_dtype)

    def message_buffer(self, layout: CapacityLayout, device: torch.device) -> Tensor:
        """(W, L) int32, in which messages with static capacity to all ranks are packed."""
        return torch.empty(self.ep_size, layout.message_stride, device=device, dtype=torch.int32)

    def exchange_messages(self, message_WL: Tensor) -> Tensor:
        """Messages from all ranks, as `unpack_from` takes them, for those to all ranks."""
        splits = [message_WL.shape[1]] * self.ep_size
        pending = start_all_to_all(message_WL.view(-1), splits, splits, self.group)
        return pending.wait().view_as(message_WL)


class _CollectiveCombine(Combine):
    """Partial sums written into one buffer, which an all-to-all sends when it is written.

    rows: partial sums that this rank sends to and receives from each rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        metadata: DispatchMetadata,
        rows: Splits,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> None:
        self.group, self.metadata, self.rows = group, metadata, rows
        self.hidden_size, self.sum_dtype, self.out_dtype = hidden_size, sum_dtype, out_dtype

    def outputs(self) -> list[OutputChunk]:
        shape = (sum(self.rows.sent), self.hidden_size)
        partial_RH = torch.empty(shape, device=self.metadata.device, dtype=self.sum_dtype)

        def send() -> None:
            self.pending = start_all_to_all(partial_RH, *self.rows, self.group)

        return [OutputChunk(slice(0, shape[0]), partial_RH, send)]


class _AllToAllCombine(_CollectiveCombine):
    def result(self) -> Tensor:
        sent_TW = self.metadata.tensors.sent_TW
        assert sent_TW is not None
        return sum_row_copies(self.pending.wait(), sent_TW, self.out_dtype)


class _AllGatherCombine(_CollectiveCombine):
    """Adds up here and not by reduce-scatter: NCCL's is slower, and its order is not fixed."""

    def result(self) -> Tensor:
        received_RH = self.pending.wait()
        shape_WXH = (len(self.rows.received), self.metadata.max_tokens, self.hidden_size)
        total_XH = received_RH.new_empty(shape_WXH[1:], dtype=self.out_dtype)
        sum_over_ranks(received_RH.view(shape_WXH), total_XH)
        return total_XH[: self.metadata.num_tokens]


DISPATCHERS: dict[DispatcherName, type[ExactDispatcher]] = {
    one.name: one for one in (AllToAllDispatcher, AllGatherDispatcher)
}


def sum_row_copies(rows_SH: Tensor, sent_TW: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum, for each token, its rows among (S, H), in the order of the ranks: (T, H)."""
    pattern = Pairs.from_checked_indices(sent_TW, rows_SH.shape[0])
    ones_N = torch.ones(pattern.num_pairs, device=rows_SH.device)
    primitives = load_backend(ragged_backend(default_backend(rows_SH.device)))
    sums_TH = WholeOutput((len(sent_TW), rows_SH.shape[1]), dtype, rows_SH.device)
    primitives.spmm(ones_N, rows_SH, pattern, sums_TH.chunks)
    return sums_TH.value


def sum_over_ranks(partial_WXH: Tensor, total_XH: Tensor) -> None:
    """Write the sum over the first dimension, in its order, rounded once."""
    if uses_triton(default_backend(partial_WXH.device)):
        add_partial_sums(partial_WXH, total_XH.dtype, total_XH)
        return
    sum_XH = partial_WXH[0].clone()
    for partial_XH in partial_WXH[1:]:
        sum_XH += partial_XH
    total_XH.copy_(sum_XH)


def pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """Append rows of zeros up to `num_rows`."""
    missing = num_rows - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
