"""The dispatcher that gathers all rows, for ranks that read each other's memory.

W ranks, X tokens of each, H hidden size, L words of a message. Each rank puts into its own memory
what others shall read, all meet at a barrier, and each copies what it needs:

    rows      (2, X, H)   of its tokens, by turns: a rank may write the next while others still read
    words     (W, L)      messages to all ranks
    sums      (W, X, H)   partial sums for all ranks' tokens

Messages are read where they are, the others are copied: rows beside the routing of tokens, sums
while others are computed. Which memory may be
written again follows from the order of barriers on each rank: whoever comes to the barrier of a
pass's rows has read the sums of the pass before, and whoever comes to that of its sums has read its
words.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.parts import RowsIn, RowsOut
from flash_moe_dist.collectives import Pending
from flash_moe_dist.dispatch import (
    AllGatherDispatcher,
    ArrivingRows,
    DispatchMetadata,
    ReturningValues,
    Sums,
    filled_up,
    sum_over_ranks,
)
from flash_moe_dist.peer_memory import PeerMemory
from flash_moe_dist.routing import Room
from flash_moe_dist.steps import communication

ROWS, WORDS, SUMS = 0, 1, 2


def bytes_of_regions(
    room: Room, ep_size: int, row_bytes: int, sum_bytes: int
) -> tuple[int, int, int]:
    """Of rows, words and sums; `row_bytes` and `sum_bytes` of one row of each."""
    return (
        2 * room.rows * row_bytes,
        4 * ep_size * room.message_words,
        ep_size * room.rows * sum_bytes,
    )


class PeerDispatcher(AllGatherDispatcher):
    """Every row goes to every rank, by copies that need no multiprocessor."""

    def __init__(self, group: dist.ProcessGroup, memory: PeerMemory) -> None:
        super().__init__(group)
        self.memory, self.rank = memory, dist.get_rank(group)
        # The next one first, so that not all read from the same rank.
        self.others = [(self.rank + step) % self.ep_size for step in range(1, self.ep_size)]

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        memory = self.memory
        given_XH = filled_up(rows_TH, metadata.most_tokens)
        num_rows, hidden_size = given_XH.shape
        skipped = memory.next_turn() * num_rows * hidden_size
        received_WXH = given_XH.new_empty(self.ep_size, num_rows, hidden_size)

        def read(rank: int) -> Tensor:
            return memory.view(rank, ROWS, given_XH.shape, given_XH.dtype, skipped)

        with memory.aside():
            read(self.rank).copy_(given_XH)
            memory.barrier(ROWS)

        def fetch() -> None:
            with memory.aside():
                received_WXH[self.rank].copy_(given_XH)
                for rank in self.others:
                    received_WXH[rank].copy_(read(rank))
                fetched.append(memory.reached())

        def wait() -> None:
            with communication():
                fetched[0].wait()

        fetched: list[Any] = []
        own = RowsIn(self._rows_of(self.rank, num_rows), _nothing, given_XH)
        others = [RowsIn(rows, wait) for rows in self._rows_of_others(num_rows)]
        return ArrivingRows(received_WXH.view(-1, hidden_size), [own, *others], fetch)

    def words_to_fill(self, room: Room, device: torch.device) -> Tensor:
        return self.memory.view(self.rank, WORDS, (self.ep_size, room.message_words), torch.int32)

    def exchange_words(self, words_WL: Tensor) -> Tensor:
        with communication():
            self.memory.barrier(WORDS)
        return self.exchanged_at(words_WL.shape[1])

    def exchanged_at(self, message_words: int) -> Tensor:
        """(W,) addresses of all ranks' messages to this one."""
        return self.memory.addresses(WORDS, 4 * self.rank * message_words)

    def start_return(self, values_M: Tensor, metadata: DispatchMetadata) -> ReturningValues:
        return _ReturningAside(self._send_back(values_M, metadata), metadata, self.memory)

    def sums(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Sums:
        return _SumsOfPeers(self, metadata, hidden_size, sum_dtype, out_dtype)

    def _rows_of(self, rank: int, num_rows: int) -> slice:
        return slice(rank * num_rows, (rank + 1) * num_rows)

    def _rows_of_others(self, num_rows: int) -> list[slice]:
        own = self._rows_of(self.rank, num_rows)
        around = (slice(0, own.start), slice(own.stop, self.ep_size * num_rows))
        return [rows for rows in around if rows.stop > rows.start]


class _SumsOfPeers(Sums):
    """Those for other ranks come first, and are fetched while this rank's own are computed."""

    def __init__(
        self,
        dispatcher: PeerDispatcher,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> None:
        self.dispatcher, self.num_tokens = dispatcher, metadata.num_tokens
        memory, num_rows, rank = dispatcher.memory, metadata.most_tokens, dispatcher.rank
        shape = (dispatcher.ep_size * num_rows, hidden_size)
        sent_RH = memory.view(rank, SUMS, shape, sum_dtype)
        self.pieces_WXH = sent_RH.new_empty(dispatcher.ep_size, num_rows, hidden_size)
        self.total_XH = sent_RH.new_empty(num_rows, hidden_size, dtype=out_dtype)
        others = dispatcher._rows_of_others(num_rows)
        self.parts = [
            *(RowsOut(rows, sent_RH[rows], _nothing) for rows in others[:-1]),
            RowsOut(others[-1], sent_RH[others[-1]], self._fetch),
            RowsOut(dispatcher._rows_of(rank, num_rows), self.pieces_WXH[rank], _nothing),
        ]

    def _fetch(self) -> None:
        dispatcher, pieces_WXH = self.dispatcher, self.pieces_WXH
        memory, shape = dispatcher.memory, pieces_WXH.shape[1:]
        skipped = dispatcher.rank * shape.numel()
        with memory.aside():
            memory.barrier(SUMS)
            for rank in dispatcher.others:
                pieces_WXH[rank].copy_(memory.view(rank, SUMS, shape, pieces_WXH.dtype, skipped))

    def start(self, partial_RH: Tensor) -> None:
        memory = self.dispatcher.memory
        with memory.aside():
            sum_over_ranks(self.pieces_WXH, self.total_XH)
            self.added = memory.reached()

    def collect(self) -> Tensor:
        with communication():
            self.added.wait()
        return self.total_XH[: self.num_tokens]


class _ReturningAside(ReturningValues):
    def __init__(self, pending: Pending, metadata: DispatchMetadata, memory: PeerMemory) -> None:
        super().__init__(pending, metadata)
        self.memory = memory

    def arrange(self) -> None:
        with self.memory.aside():
            self.pending.join()
            self.values_TK = self.in_places()
            self.arranged = self.memory.reached()

    def collect(self) -> Tensor:
        with communication():
            self.arranged.wait()
        return self.memory.used_here(self.values_TK)


def _nothing() -> None: ...
