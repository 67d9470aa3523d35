"""Dispatch of a layer's forward passes: counts first, or into room that was reserved for them.

W ranks, T local tokens, K experts per token, H hidden size, X tokens of the rank that has most.

A rank has to know how many pairs it gets before it can receive them. The first pass exchanges
counts, and the host waits for them before it launches anything else. Where every rank gets all rows
(`AllGatherDispatcher`), the next pass takes messages of the same sizes, with room to spare for
pairs. Counts then travel in front of the pairs, and the host reads them when it has launched all of
the pass. If they show that the room does not do, for more pairs or another X, the pass is done
again, with counts first. Another X would do as long as it is smaller, but kernels that sum in
another order where rows are few would not give the same bits.

All ranks have the same room, as it comes from counts that all have seen, and messages have its
sizes whatever is wrong with a rank's input: such a rank sends nothing in them but that.

What a pass in room keeps for the backward pass lies in memory of the room's size: for pairs an
eighth more than the busiest ranks need, MOST_ROOM times as much where load is uneven.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backend_choice import TRITON_BACKENDS, default_backend
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.side_stream import SideStream
from flash_moe_dist.agreement import raise_same_error
from flash_moe_dist.dispatch.base import (
    AllGatherDispatcher,
    DispatchMetadata,
    ReceivedTokens,
    Sums,
    TokenDispatcher,
    pairs_per_row,
)
from flash_moe_dist.dispatch.comm_volume import COUNTS
from flash_moe_dist.dispatch.handshake import Counts, Input, raise_on_all_ranks
from flash_moe_dist.dispatch.message import Room, unpack_in_room
from flash_moe_dist.dispatch.symmetric import SymmetricDispatcher, bytes_of_regions
from flash_moe_dist.dispatch.symmetric_memory import SymmetricBuffers, peer_memory, timeout_seconds

# Not where pairs are so uneven that messages would be mostly room.
MOST_ROOM = 2
# A pass that has to be done again takes as long as this many save.
HITS_OF_A_MISS = 4
MOST_PAUSE = 63
# Tokens of a rank that the room does not suit.
NO_NUMBER = -1


@dataclass(frozen=True)
class Reservation:
    """Room, and all that it depends on: a pass of other settings needs another.

    sizes: `Input.sizes` of that pass; slots: K; sum_dtype: of partial sums;
    timeout: of a collective, in seconds.
    memory: in which ranks read and write directly; None: all is sent.
    """

    room: Room
    sizes: dict[str, Any]
    slots: int
    hidden_size: int
    hidden_dtype: torch.dtype
    sum_dtype: torch.dtype
    memory: SymmetricBuffers | None
    timeout: float

    @classmethod
    def after(
        cls, given: Input, counts: Counts, group: dist.ProcessGroup, sum_dtype: torch.dtype
    ) -> "Reservation | None":
        """For passes like this one; None if there should be none. Collective."""
        ep_size = dist.get_world_size(group)
        hidden_size, slots = given.hidden_TH.shape[1], given.indices_TK.shape[1]
        most_tokens = max(counts.tokens)
        possible = most_tokens * slots
        room = min(possible, counts.most_pairs + counts.most_pairs // 8 + 16)
        in_kernels = default_backend(given.settings.device) in TRITON_BACKENDS
        if not in_kernels or possible == 0 or ep_size * room > MOST_ROOM * possible:
            return None
        reserved = Room(most_tokens, room, given.weights_TK.dtype)
        hidden_bytes = hidden_size * given.hidden_TH.dtype.itemsize
        sum_bytes = hidden_size * sum_dtype.itemsize
        memory = None
        if hidden_size > 0:
            sizes = bytes_of_regions(reserved, ep_size, hidden_bytes, sum_bytes)
            memory = peer_memory(group, given.settings.device, sizes)
        if memory is not None:
            # Makes what later passes would wait for the device to make.
            SymmetricDispatcher(group, memory).exchanged_at(reserved.message_words)
        return cls(
            reserved,
            given.sizes,
            slots,
            hidden_size,
            given.hidden_TH.dtype,
            sum_dtype,
            memory,
            timeout_seconds(group, given.settings.device),
        )

    def fits(self, given: Input) -> bool:
        """Whether this rank's part may be sent in it."""
        return given.sizes == self.sizes and given.hidden_TH.shape[0] <= self.room.rows

    def dispatcher(self, group: dist.ProcessGroup) -> AllGatherDispatcher:
        if self.memory is None:
            return AllGatherDispatcher(group)
        return SymmetricDispatcher(group, self.memory)

    def covers(self, counts: Counts) -> bool:
        """Whether all ranks' parts were sent in it, and have the sizes that it is for."""
        return (
            counts.most_pairs <= self.room.pairs
            and max(counts.tokens) == self.room.rows
            and NO_NUMBER not in counts.tokens
        )


@dataclass(frozen=True)
class Dispatched:
    """A dispatch that is under way; `in_room`: how it will be known whether it can stay."""

    received: ReceivedTokens
    metadata: DispatchMetadata
    dispatcher: TokenDispatcher
    in_room: "InRoom | None" = None

    def sums(self, dtype: torch.dtype) -> Sums:
        """For partial sums in that dtype."""
        rows_RH = self.received.hidden_RH
        return self.dispatcher.sums(self.metadata, rows_RH.shape[1], dtype, rows_RH.dtype)


@dataclass(frozen=True)
class InRoom:
    """Counts (2, W, COUNTS) sent and received, in host memory when `read` has been reached.

    counts_2WC: the same on the device, which must live until then.
    """

    reservation: Reservation
    counts_2WC: Tensor
    exchanged_2WC: Tensor
    read: torch.cuda.Event | None

    def counts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Waits for them."""
        if self.read is not None:
            _wait(self.read, self.reservation.timeout)
        sent, received = self.exchanged_2WC.tolist()
        return sent, received


class LayerDispatch:
    """Dispatches one layer's passes over the ranks of `group`.

    All ranks decide alike when to reserve room, from what all have seen. Where rooms are seldom
    used, because sizes change all the time, ever more passes are counted before the next.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.reservation: Reservation | None = None
        # Passes to count before room is reserved, those counted, and passes in the present room.
        self._pause = self._counted = self._hits = 0

    def dispatch(self, given: Input, dispatcher: TokenDispatcher) -> Dispatched:
        """By `dispatcher`; into room where there is some, to be done again if `settle` says so.

        Raises:
            TypeError, ValueError: as `TokenDispatcher.dispatch`.
            RuntimeError: as `settle`.
        """
        reservation = self.reservation
        if reservation is not None and reservation.fits(given):
            return _dispatch_into_room(reservation, given, reservation.dispatcher(self.group))
        if reservation is not None:
            # No number of tokens: everybody does the pass again, unless someone's input is wrong.
            tokens, checksum = (NO_NUMBER, given.checksum) if given.error is None else (0, 0)
            in_room = self._send_only(reservation, given.settings.device, tokens, checksum)
            self._agree(given, in_room)
        received, metadata, counts = dispatcher.dispatch(given)
        if dispatcher.sends_all_rows:
            if self._counted >= self._pause:
                sum_dtype = accumulator_dtype(given.hidden_TH.dtype, given.settings.table_dtypes[0])
                self.reservation = Reservation.after(given, counts, self.group, sum_dtype)
                self._hits = 0
            self._counted += 1
        return Dispatched(received, metadata, dispatcher)

    def settle(self, given: Input, dispatched: Dispatched) -> DispatchMetadata | None:
        """Wait for the counts; None if the pass has to be done again.

        Raises:
            TypeError, ValueError: as `TokenDispatcher.dispatch`.
            RuntimeError: the device failed, maybe as a rank did not come in time.
        """
        metadata = dispatched.metadata
        if dispatched.in_room is None:
            return metadata
        counts = self._agree(given, dispatched.in_room)
        if counts is None:
            return None
        assert metadata.slots_P is not None
        return replace(
            metadata,
            pairs_sent=counts.pairs_sent,
            pairs_received=counts.pairs_received,
            slots_P=metadata.slots_P[: sum(counts.pairs_sent)],
        )

    def _agree(self, given: Input, in_room: InRoom) -> Counts | None:
        """The counts if all ranks' parts are in the room, which is else given up."""
        # If this raises, all ranks lose it alike.
        self.reservation = None
        counts = given.counts(*in_room.counts(), self.group)
        if in_room.reservation.covers(counts):
            self.reservation = in_room.reservation
            self._hits += 1
            return counts
        seldom = self._hits < HITS_OF_A_MISS
        self._pause = min(2 * self._pause + 1, MOST_PAUSE) if seldom else 0
        self._counted = 0
        return None

    def fail(self, error: Exception, device: torch.device) -> NoReturn:
        """Raise `error` on every rank, in place of a pass that this rank cannot make."""
        if self.reservation is None:
            raise_on_all_ranks(error, device, self.group)
        reservation, self.reservation = self.reservation, None
        self._send_only(reservation, device, tokens=0, checksum=0)
        raise_same_error(error, self.group)
        raise AssertionError("an error of this rank was not raised")

    def _send_only(
        self, reservation: Reservation, device: torch.device, tokens: int, checksum: int
    ) -> InRoom:
        """A rank's part in a forward pass of others: no pairs, and no experts of its own."""
        dispatcher, room = reservation.dispatcher(self.group), reservation.room
        metadata = _metadata_in_room(reservation, dispatcher.ep_size, torch.Size((0, 0)))
        shape_XH = (room.rows, reservation.hidden_size)
        zeros_XH = torch.zeros(shape_XH, device=device, dtype=reservation.hidden_dtype)
        rows = dispatcher.start_rows(zeros_XH, metadata)
        words_WL = dispatcher.words_to_fill(room, device)
        sent_C = torch.tensor([0, 0, 0, tokens, checksum, 0])
        counts_2WC = sent_C.to(device).expand(2, dispatcher.ep_size, COUNTS).contiguous()
        _header(words_WL).copy_(counts_2WC[0])
        messages = dispatcher.exchange_words(words_WL)
        unpack_in_room(messages, counts_2WC[1], room)
        partial_RH = torch.zeros_like(rows.wait(), dtype=reservation.sum_dtype)
        dtypes = (reservation.sum_dtype, reservation.hidden_dtype)
        sums = dispatcher.sums(metadata, reservation.hidden_size, *dtypes)
        for part in sums.parts:
            part.out.zero_()
            part.on_written()
        sums.start(partial_RH)
        sums.collect()
        return InRoom(reservation, counts_2WC, *_to_host(counts_2WC))


def _wait(read: torch.cuda.Event, timeout: float) -> None:
    """Raises RuntimeError after so many seconds, or if the device failed.

    Not in the driver: where another collective fails before, what this pass waits for begins only
    then to wait as long.
    """
    end = time.monotonic() + timeout
    try:
        while not read.query() and time.monotonic() < end:
            time.sleep(0)
        if read.query():
            return read.synchronize()
    except RuntimeError as error:
        # A barrier that no rank comes to in time ends like any kernel that fails.
        raise RuntimeError(
            "the device failed while this rank waited for the counts of others: a kernel "
            "failed before, or a rank did not come within the group's timeout"
        ) from error
    raise RuntimeError(
        f"a rank did not come within the group's timeout: no counts of others in {timeout:g} s"
    )


def _header(words_WL: Tensor) -> Tensor:
    """(W, COUNTS) int64: what messages begin with."""
    return words_WL.view(torch.int64)[:, :COUNTS]


def _to_host(counts_2WC: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that is on its way beside other work, and when it is there."""
    device, read = counts_2WC.device, None
    with SideStream(device):
        exchanged_2WC = counts_2WC.to("cpu", non_blocking=True)
        if device.type == "cuda":
            read = torch.cuda.Event()
            read.record(torch.cuda.current_stream(device))
    return exchanged_2WC, read


def _dispatch_into_room(
    reservation: Reservation, given: Input, dispatcher: AllGatherDispatcher
) -> Dispatched:
    room, ep_size, device = reservation.room, dispatcher.ep_size, given.settings.device
    metadata = _metadata_in_room(reservation, ep_size, given.indices_TK.shape)
    # Without peer memory these travel while pairs are sorted and packed.
    rows = dispatcher.start_rows(given.hidden_TH, metadata)
    words_WL = dispatcher.words_to_fill(room, device)
    counts_2WC = torch.empty(2, ep_size, COUNTS, device=device, dtype=torch.int64)
    routing = given.routing(ep_size)
    routing.write_counts(
        counts_2WC[0], given.checksum, count_rows=False, copies_WC=_header(words_WL)
    )
    slots_P = routing.pack_in_room(given.weights_TK, words_WL, room)
    messages = dispatcher.exchange_words(words_WL)
    row_offsets, ids_M, weights_M = unpack_in_room(messages, counts_2WC[1], room)
    rows.fetch()
    mean_pairs = pairs_per_row(reservation.slots, ep_size)
    return Dispatched(
        ReceivedTokens(rows.rows_RH, rows.parts, row_offsets, ids_M, weights_M, mean_pairs),
        metadata.with_tensors(slots_P, None, None),
        dispatcher,
        InRoom(reservation, counts_2WC, *_to_host(counts_2WC)),
    )


def _metadata_in_room(
    reservation: Reservation, ep_size: int, shape_TK: torch.Size
) -> DispatchMetadata:
    rows = reservation.room.rows
    return DispatchMetadata(
        rows_sent=[rows] * ep_size,
        rows_received=[rows] * ep_size,
        pairs_sent=[],
        pairs_received=[],
        num_tokens=shape_TK[0],
        most_tokens=rows,
        shape_TK=shape_TK,
    )
