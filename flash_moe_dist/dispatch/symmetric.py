"""The dispatcher that gathers all rows, for ranks that read and write each other's memory.

W ranks, X tokens of each, H hidden size, L words of a message. Each rank has three regions of
memory that the others read or write. Between writing and reading one, all meet at its barrier:

    region                written                         read
    rows      2 (X, H)    aside: of its tokens            aside: copied by the others, beside what
                                                          is computed of their own
    words     (W, L)      messages, as they are packed    by the others where they are, when they
                                                          unpack pairs
    sums      (W, X, H)   by the others, partial sums     when sums for its own tokens are computed,
                          for its tokens, as they are     to which these are added
                          computed

"Aside" is one stream of a rank, the rest is done on the layer's. A region may be written again when
it has been read, which follows from the barriers that ranks came to since:

    rows      one half and the other by turns: whoever comes to the barrier of a pass's rows has
              read those of the pass before, as both are read aside. The halves begin where they do
              whatever the sizes of a pass are.
    words     whoever comes to the barrier of a forward pass's sums has unpacked its words. A pass
              on another stream than the one before waits for that.
    sums      whoever comes to the barrier of the next rows has read these, for which that barrier
              waits. Nobody writes sums before all rows have come.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.overlap import InputChunk, OutputChunk
from flash_moe_dist.dispatch.base import (
    AllGatherDispatcher,
    ArrivingRows,
    DispatchMetadata,
    ReturningValues,
    Sums,
    filled_up,
)
from flash_moe_dist.dispatch.collectives import Pending
from flash_moe_dist.dispatch.message import Room
from flash_moe_dist.dispatch.symmetric_memory import SymmetricBuffers
from flash_moe_dist.phases import communication

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


class SymmetricDispatcher(AllGatherDispatcher):
    """Every row goes to every rank, by a copy; sums are written where they are to be added."""

    def __init__(self, group: dist.ProcessGroup, memory: SymmetricBuffers) -> None:
        super().__init__(group)
        self.memory, self.rank = memory, dist.get_rank(group)
        # The next one first, so that not all read from the same rank.
        self.others = [(self.rank + step) % self.ep_size for step in range(1, self.ep_size)]

    def start_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        given_XH = filled_up(rows_TH, metadata.most_tokens)
        num_rows, hidden_size = given_XH.shape
        fetched = _FetchedRows(self, given_XH)
        own = InputChunk(self.rows_of(self.rank, num_rows), source=given_XH)
        others = [InputChunk(rows, fetched.wait) for rows in self.rows_of_others(num_rows)]
        rows_RH = fetched.received_WXH.view(-1, hidden_size)
        return ArrivingRows(rows_RH, [own, *others], fetched.start)

    def words_to_fill(self, room: Room, device: torch.device) -> Tensor:
        self.memory.wait_until_sums_are_read()
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

    def rows_of(self, rank: int, num_rows: int) -> slice:
        """Among the rows of all."""
        return slice(rank * num_rows, (rank + 1) * num_rows)

    def rows_of_others(self, num_rows: int) -> list[slice]:
        own = self.rows_of(self.rank, num_rows)
        around = (slice(0, own.start), slice(own.stop, self.ep_size * num_rows))
        return [rows for rows in around if rows.stop > rows.start]


class _FetchedRows:
    """Rows (W, X, H) of all ranks, copied aside once it is started."""

    def __init__(self, dispatcher: SymmetricDispatcher, given_XH: Tensor) -> None:
        self.dispatcher, self.given_XH = dispatcher, given_XH
        self.received_WXH = given_XH.new_empty(dispatcher.ep_size, *given_XH.shape)

    def start(self) -> None:
        memory, rank = self.dispatcher.memory, self.dispatcher.rank
        skipped_bytes = memory.next_half(ROWS)

        def offered_by(peer: int) -> Tensor:
            shape, dtype = self.given_XH.shape, self.given_XH.dtype
            return memory.view(peer, ROWS, shape, dtype, skipped_bytes)

        with memory.aside():
            offered_by(rank).copy_(self.given_XH)
            memory.wait_until_sums_are_read()
            memory.barrier(ROWS)
            for other in self.dispatcher.others:
                self.received_WXH[other].copy_(offered_by(other))
            # No hurry, as scores of own rows are computed from where they were given.
            self.received_WXH[rank].copy_(self.given_XH)
            self.fetched = memory.reached()

    def wait(self) -> None:
        with communication():
            self.fetched.wait()


class _SumsOfPeers(Sums):
    """Those for other ranks come first; this rank's own are computed and added in one."""

    def __init__(
        self,
        dispatcher: SymmetricDispatcher,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> None:
        self.memory, self.num_tokens = dispatcher.memory, metadata.num_tokens
        num_rows, rank = metadata.most_tokens, dispatcher.rank
        shape_XH = (num_rows, hidden_size)
        received_WXH = self.memory.view(rank, SUMS, (dispatcher.ep_size, *shape_XH), sum_dtype)
        self.total_XH = received_WXH.new_empty(shape_XH, dtype=out_dtype)
        skipped_bytes = rank * num_rows * hidden_size * sum_dtype.itemsize
        *others, last = (
            OutputChunk(
                dispatcher.rows_of(other, num_rows),
                self.memory.view(other, SUMS, shape_XH, sum_dtype, skipped_bytes),
            )
            for other in dispatcher.others
        )
        own_rows = dispatcher.rows_of(rank, num_rows)
        self.parts = [
            *others,
            replace(last, on_written=self._meet_others),
            OutputChunk(own_rows, self.total_XH, accumulate_with=received_WXH, own_index=rank),
        ]

    def _meet_others(self) -> None:
        with communication():
            self.memory.barrier(SUMS)

    def start(self, partial_RH: Tensor) -> None:
        self.memory.sums_read = self.memory.reached()

    def collect(self) -> Tensor:
        return self.total_XH[: self.num_tokens]


class _ReturningAside(ReturningValues):
    def __init__(
        self, pending: Pending, metadata: DispatchMetadata, memory: SymmetricBuffers
    ) -> None:
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
