"""Dispatch with static capacity between ranks that read and write each other's memory.

W ranks, X rows of each, H hidden size, L words of a message. Each rank has three buffers that the
others read or write. Between writing and reading one, all ranks meet at its barrier:

    buffer                  written                       read
    ROWS      2 (X, H)      side stream: own tokens       side stream: copied by the others, while
                                                          they compute with their own rows
    MESSAGES  (W, L)        main stream: packed pairs     main stream: unpacked by the others, in
                                                          place
    SUMS      (W, X, H)     main stream: partial sums     main stream: when partial sums for own
                            by the others, as they are    tokens are computed, to which these are
                            computed                      added

The side stream is one per rank, shared by all layers of a group; the main stream is the layer's.
A buffer may be written again once it has been read, which follows from barriers passed since:

    ROWS      double buffer: a rank that reaches the barrier of one pass has read the rows of the
              pass before, as both are read on its side stream. The halves begin at the same bytes
              whatever the sizes of a pass.
    MESSAGES  a rank that reaches the barrier of the sums of a forward pass has unpacked its
              messages. A pass on another stream than the one before waits for that explicitly.
    SUMS      a rank that reaches the barrier of the next rows has read these sums, as that barrier
              waits for it; and no rank writes sums before all rows have arrived.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.overlap import InputChunk, OutputChunk
from flash_moe_dist.dispatch.base import (
    ArrivingRows,
    Combine,
    DispatchMetadata,
    ReturningValues,
)
from flash_moe_dist.dispatch.collectives import Pending
from flash_moe_dist.dispatch.exact import AllGatherDispatcher, pad_rows
from flash_moe_dist.dispatch.message import WORD_BYTES, CapacityLayout
from flash_moe_dist.dispatch.symmetric_memory import SymmetricBuffers
from flash_moe_dist.phases import communication


class BufferBytes(NamedTuple):
    """Bytes of each buffer, in the order of their numbers."""

    rows: int
    messages: int
    sums: int


ROWS, MESSAGES, SUMS = range(len(BufferBytes._fields))


def buffer_bytes(
    layout: CapacityLayout, ep_size: int, row_bytes: int, sum_bytes: int
) -> BufferBytes:
    """Compute the bytes of the buffers.

    Args:
        layout: layout of the messages.
        ep_size: W.
        row_bytes, sum_bytes: bytes of one hidden row, and of one partial sum.
    """
    return BufferBytes(
        rows=2 * layout.padded_tokens * row_bytes,
        messages=ep_size * layout.message_stride * WORD_BYTES,
        sums=ep_size * layout.padded_tokens * sum_bytes,
    )


class SymmetricDispatcher(AllGatherDispatcher):
    """Every row goes to every rank by the copy engines; partial sums are written where they go."""

    def __init__(self, group: dist.ProcessGroup, buffers: SymmetricBuffers) -> None:
        super().__init__(group)
        self.buffers, self.rank = buffers, dist.get_rank(group)
        # Starts with the next rank, so that not all read from the same one.
        self.others = [(self.rank + step) % self.ep_size for step in range(1, self.ep_size)]

    @property
    def transport(self) -> str:
        return "symmetric_memory"

    def send_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        own_XH = pad_rows(rows_TH, metadata.max_tokens)
        num_rows, hidden_size = own_XH.shape
        copies = _CopiedRows(self, own_XH)
        own = InputChunk(self.rows_of(self.rank, num_rows), source=own_XH)
        others = [InputChunk(rows, copies.wait) for rows in self.rows_of_others(num_rows)]
        rows_RH = copies.received_WXH.view(-1, hidden_size)
        return ArrivingRows(rows_RH, [own, *others], copies.start)

    def message_buffer(self, layout: CapacityLayout, device: torch.device) -> Tensor:
        self.buffers.wait_until_sums_are_consumed()
        shape = (self.ep_size, layout.message_stride)
        return self.buffers.view(self.rank, MESSAGES, shape, torch.int32)

    def exchange_messages(self, message_WL: Tensor) -> Tensor:
        with communication():
            self.buffers.barrier(MESSAGES)
        return self.message_pointers(message_WL.shape[1])

    def message_pointers(self, message_stride: int) -> Tensor:
        """(W,) int64: pointers to the messages of all ranks to this one."""
        return self.buffers.pointers(MESSAGES, WORD_BYTES * self.rank * message_stride)

    def return_values(self, values_M: Tensor, metadata: DispatchMetadata) -> ReturningValues:
        pending = self.send_back(values_M, metadata)
        return _ReturningOnSideStream(pending, metadata, self.buffers)

    def combine(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Combine:
        return _SymmetricCombine(self, metadata, hidden_size, sum_dtype, out_dtype)

    def rows_of(self, rank: int, num_rows: int) -> slice:
        """Range of a rank's rows among the rows of all ranks, with `num_rows` of each."""
        return slice(rank * num_rows, (rank + 1) * num_rows)

    def rows_of_others(self, num_rows: int) -> list[slice]:
        """Ranges of rows before and after this rank's, without empty ones."""
        own = self.rows_of(self.rank, num_rows)
        around = (slice(0, own.start), slice(own.stop, self.ep_size * num_rows))
        return [rows for rows in around if rows.stop > rows.start]


class _CopiedRows:
    """Rows (W, X, H) of all ranks, copied on the side stream once `start` is called."""

    def __init__(self, dispatcher: SymmetricDispatcher, own_XH: Tensor) -> None:
        self.dispatcher, self.own_XH = dispatcher, own_XH
        self.received_WXH = own_XH.new_empty(dispatcher.ep_size, *own_XH.shape)

    def start(self) -> None:
        buffers, rank = self.dispatcher.buffers, self.dispatcher.rank
        offset_bytes = buffers.next_buffer_offset(ROWS)

        def offered_by(other: int) -> Tensor:
            shape, dtype = self.own_XH.shape, self.own_XH.dtype
            return buffers.view(other, ROWS, shape, dtype, offset_bytes)

        with buffers.side_stream():
            offered_by(rank).copy_(self.own_XH)
            buffers.wait_until_sums_are_consumed()
            buffers.barrier(ROWS)
            for other in self.dispatcher.others:
                self.received_WXH[other].copy_(offered_by(other))
            # Last, as scores of own rows are computed from `own_XH`.
            self.received_WXH[rank].copy_(self.own_XH)
            self.copied = buffers.record_event()

    def wait(self) -> None:
        with communication():
            self.copied.wait()


class _SymmetricCombine(Combine):
    """Partial sums for other ranks first, written into their memory; own sums computed and added.

    Partial sums of other ranks are in this rank's memory by then: its own, the last to be
    computed, are added to them by the same kernel.
    """

    def __init__(
        self,
        dispatcher: SymmetricDispatcher,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> None:
        self.dispatcher, self.metadata = dispatcher, metadata
        self.hidden_size, self.sum_dtype, self.out_dtype = hidden_size, sum_dtype, out_dtype

    def outputs(self) -> list[OutputChunk]:
        dispatcher, buffers, rank = self.dispatcher, self.dispatcher.buffers, self.dispatcher.rank
        num_rows, dtype = self.metadata.max_tokens, self.sum_dtype
        shape_XH = (num_rows, self.hidden_size)
        received_WXH = buffers.view(rank, SUMS, (dispatcher.ep_size, *shape_XH), dtype)
        self.total_XH = received_WXH.new_empty(shape_XH, dtype=self.out_dtype)
        offset_bytes = rank * num_rows * self.hidden_size * dtype.itemsize
        *others, last = (
            OutputChunk(
                dispatcher.rows_of(other, num_rows),
                buffers.view(other, SUMS, shape_XH, dtype, offset_bytes),
            )
            for other in dispatcher.others
        )
        own = OutputChunk(
            dispatcher.rows_of(rank, num_rows),
            self.total_XH,
            on_written=buffers.record_sums_consumed,
            accumulate_with=received_WXH,
            own_index=rank,
        )
        return [*others, replace(last, on_written=self._wait_for_partial_sums), own]

    def _wait_for_partial_sums(self) -> None:
        with communication():
            self.dispatcher.buffers.barrier(SUMS)

    def result(self) -> Tensor:
        return self.total_XH[: self.metadata.num_tokens]


class _ReturningOnSideStream(ReturningValues):
    """Values that are scattered on the side stream while the main stream goes on."""

    def __init__(
        self, pending: Pending, metadata: DispatchMetadata, buffers: SymmetricBuffers
    ) -> None:
        super().__init__(pending, metadata)
        self.buffers = buffers

    def scatter_on_side_stream(self) -> None:
        with self.buffers.side_stream():
            self.pending.wait_uncounted()
            self.values_TK = self.scattered()
            self.scattering = self.buffers.record_event()

    def result(self) -> Tensor:
        with communication():
            self.scattering.wait()
        return self.buffers.record_stream(self.values_TK)
