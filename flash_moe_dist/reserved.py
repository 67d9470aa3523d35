"""Dispatch of a layer's forward passes: counts first, or into room that was reserved for them.

W ranks, T local tokens, K experts per token, H hidden size.

A rank has to know how many pairs it gets before it can receive them. The first pass exchanges
counts, and the host waits for them before it launches anything else. Where every rank gets all rows
(`AllGatherDispatcher`), the next pass takes messages of the same sizes, with room to spare for
pairs. Counts then travel in front of the pairs, and the host reads them when it has launched all of
the pass. If they show that the room does not do, for more pairs or another number of tokens, the
pass is done again, with counts first.

All ranks have the same room, as it comes from counts that all have seen, and messages have its
sizes whatever is wrong with a rank's input: such a rank sends nothing in them but that.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.aside import Aside
from flash_moe.ops.backends import TRITON_BACKENDS, accumulator_dtype, default_backend
from flash_moe_dist.agreement import raise_same_error
from flash_moe_dist.counts import Counts, Input, fail_together
from flash_moe_dist.dispatch import (
    AllGatherDispatcher,
    DispatchMetadata,
    ReceivedTokens,
    Sums,
    TokenDispatcher,
    pairs_per_row,
)
from flash_moe_dist.peer_dispatch import PeerDispatcher, bytes_of_regions
from flash_moe_dist.peer_memory import PeerMemory, peer_memory
from flash_moe_dist.routing import Room, unpack_in_room
from flash_moe_dist.volume import COUNTS

# Not where pairs are so uneven that messages would be mostly room.
MOST_ROOM = 2


@dataclass(frozen=True)
class Reservation:
    """Room, and all that it depends on: a pass of other settings needs another.

    memory: where ranks read it directly; None: it is sent.
    """

    room: Room
    sizes: dict[str, Any]
    slots: int
    hidden_size: int
    hidden_dtype: torch.dtype
    sum_dtype: torch.dtype
    memory: PeerMemory | None

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
            PeerDispatcher(group, memory).exchanged_at(reserved.message_words)
        return cls(
            reserved,
            given.sizes,
            slots,
            hidden_size,
            given.hidden_TH.dtype,
            sum_dtype,
            memory,
        )

    def fits(self, given: Input) -> bool:
        return given.sizes == self.sizes and given.hidden_TH.shape[0] == self.room.rows

    def dispatcher(self, group: dist.ProcessGroup) -> AllGatherDispatcher:
        if self.memory is None:
            return AllGatherDispatcher(group)
        return PeerDispatcher(group, self.memory)

    def covers(self, counts: Counts) -> bool:
        return counts.most_pairs <= self.room.pairs and set(counts.tokens) == {self.room.rows}


@dataclass
class Dispatched:
    """A dispatch that is under way, and how to end it.

    reservation: that it was made in; None if counts came first, and are known.
    counts_2WC, exchanged_2WC: sent and received, and the same on their way to the host.
    read: when they are there.
    """

    received: ReceivedTokens
    metadata: DispatchMetadata
    dispatcher: TokenDispatcher
    reservation: Reservation | None = None
    counts_2WC: Tensor = field(default_factory=lambda: torch.empty(0))
    exchanged_2WC: Tensor = field(default_factory=lambda: torch.empty(0))
    read: torch.cuda.Event | None = None

    def sums(self, dtype: torch.dtype) -> Sums:
        """For partial sums in that dtype."""
        rows_RH = self.received.hidden_RH
        return self.dispatcher.sums(self.metadata, rows_RH.shape[1], dtype, rows_RH.dtype)


class LayerDispatch:
    """Dispatches one layer's passes over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.reservation: Reservation | None = None

    def dispatch(self, given: Input, dispatcher: TokenDispatcher) -> Dispatched:
        """By `dispatcher`; into room where there is some, to be done again if `settle` says so.

        Raises:
            TypeError, ValueError: as `TokenDispatcher.dispatch`.
        """
        if self.reservation is None:
            received, metadata, counts = dispatcher.dispatch(given)
            if dispatcher.sends_all_rows:
                sum_dtype = accumulator_dtype(given.hidden_TH.dtype, given.settings.table_dtypes[0])
                self.reservation = Reservation.after(given, counts, self.group, sum_dtype)
            return Dispatched(received, metadata, dispatcher)
        return _dispatch_into_room(self.reservation, given, self.reservation.dispatcher(self.group))

    def settle(self, given: Input, dispatched: Dispatched) -> DispatchMetadata | None:
        """Wait for the counts; None if the pass has to be done again.

        Raises:
            TypeError, ValueError: as `TokenDispatcher.dispatch`.
        """
        reservation, metadata = dispatched.reservation, dispatched.metadata
        if reservation is None:
            return metadata
        # Whatever comes of it, all ranks keep or lose the room alike.
        self.reservation = None
        if dispatched.read is not None:
            try:
                dispatched.read.synchronize()
            except RuntimeError as error:
                # A barrier that no rank comes to in time ends like any kernel that fails.
                raise RuntimeError(
                    "the device failed while this rank waited for the counts of others: a kernel "
                    "failed before, or a rank did not come within the group's timeout"
                ) from error
        sent, received = dispatched.exchanged_2WC.tolist()
        counts = given.counts(sent, received, self.group)
        if not reservation.covers(counts):
            return None
        self.reservation = reservation
        assert metadata.slots_P is not None
        return replace(
            metadata,
            pairs_sent=counts.pairs_sent,
            pairs_received=counts.pairs_received,
            slots_P=metadata.slots_P[: sum(counts.pairs_sent)],
        )

    def fail(self, error: Exception, device: torch.device) -> NoReturn:
        """Raise `error` on every rank, in place of a pass that this rank cannot make."""
        if self.reservation is None:
            fail_together(error, device, self.group)
        reservation, self.reservation = self.reservation, None
        dispatcher = reservation.dispatcher(self.group)
        rows_TH = _empty_rows(reservation, device)
        metadata = _metadata_in_room(reservation, dispatcher.ep_size, torch.Size((0, 0)))
        rows = dispatcher.start_rows(rows_TH, metadata)
        words_WL = dispatcher.words_to_fill(reservation.room, device)
        dispatcher.exchange_words(words_WL.zero_())
        rows_RH = rows.wait().to(reservation.sum_dtype)
        dtypes = (reservation.sum_dtype, reservation.hidden_dtype)
        sums = dispatcher.sums(metadata, reservation.hidden_size, *dtypes)
        for part in sums.parts:
            part.written()
        sums.start(rows_RH)
        sums.collect()
        raise_same_error(error, self.group)
        raise AssertionError("an error of this rank was not raised")


def _dispatch_into_room(
    reservation: Reservation, given: Input, dispatcher: AllGatherDispatcher
) -> Dispatched:
    room, ep_size, device = reservation.room, dispatcher.ep_size, given.settings.device
    fits = given.error is None and reservation.fits(given)
    shape_TK = given.indices_TK.shape if fits else torch.Size((0, 0))
    metadata = _metadata_in_room(reservation, ep_size, shape_TK)
    # These travel while pairs are sorted and packed.
    rows = dispatcher.start_rows(
        given.hidden_TH if fits else _empty_rows(reservation, device), metadata
    )
    words_WL = dispatcher.words_to_fill(room, device)
    counts_2WC = torch.empty(2, ep_size, COUNTS, device=device, dtype=torch.int64)
    header_WC = words_WL.view(torch.int64)[:, :COUNTS]
    if fits:
        routing = given.routing(ep_size)
        routing.write_counts(counts_2WC[0], given.checksum, count_rows=False, copies_WC=header_WC)
        slots_P = routing.pack_in_room(given.weights_TK, words_WL, room)
    else:
        counts_2WC[0].zero_()
        if given.error is None:
            # No number of tokens: so everybody does the pass again.
            counts_2WC[0, :, 3] = -1
            counts_2WC[0, :, 4] = given.checksum
        header_WC.copy_(counts_2WC[0])
        slots_P = torch.empty(0, device=device, dtype=torch.int64)
    messages = dispatcher.exchange_words(words_WL)
    row_offsets, ids_M, weights_M = unpack_in_room(messages, counts_2WC[1], room)
    rows.fetch()
    read = None
    with Aside(device):
        exchanged_2WC = counts_2WC.to("cpu", non_blocking=True)
        if device.type == "cuda":
            read = torch.cuda.Event()
            read.record(torch.cuda.current_stream(device))
    mean_pairs = pairs_per_row(reservation.slots, ep_size)
    received = ReceivedTokens(rows.rows_RH, rows.parts, row_offsets, ids_M, weights_M, mean_pairs)
    metadata = metadata.with_tensors(slots_P, None, None)
    counts = (counts_2WC, exchanged_2WC)
    return Dispatched(received, metadata, dispatcher, reservation, *counts, read)


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


def _empty_rows(reservation: Reservation, device: torch.device) -> Tensor:
    shape = (reservation.room.rows, reservation.hidden_size)
    return torch.zeros(shape, device=device, dtype=reservation.hidden_dtype)
