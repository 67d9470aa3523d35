"""Which pairs and rows go to which rank, and the words that tell a rank of its pairs.

T local tokens, K experts per token, N = T K; W ranks, each the owner of a run of experts; S rows
and P pairs sent by this rank.

Pairs are sent rank by rank, within a rank token by token, within a token by ascending expert id.
An index of -1 is sent nowhere. To each rank go 32-bit words: for each row the number of pairs up to
its last, then for each pair the owner's local expert id, then for each the routing weight, as the
bits of a float32 in one word or of a float64 in two. Messages are as long as that takes; or as long
as there is `Room`, and then begin with counts.

Example: 2 ranks of 2 experts, this rank's tokens choose [3, 0], [1, 0], [2, -1]. Rank 0 gets the
pairs of token 0 with its local expert [0] and of token 1 with [0, 1]; rank 1 those of token 0 with
its local expert [1] and of token 2 with [0]. Rows, if sent once to each rank that needs them: of
tokens 0 and 1 to rank 0, of tokens 0 and 2 to rank 1. The words, with g for a weight:

    rank 0    1 3   0 0 1   g g g
    rank 1    1 2   1 0     g g
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from flash_moe.ops.backend_choice import MAX_SORTED_SLOTS, TRITON_BACKENDS, default_backend
from flash_moe.ops.indices import order_dtype
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe_dist.dispatch.comm_volume import COUNTS
from flash_moe_dist.dispatch.message_kernels import (
    counts_kernel,
    pack_kernel,
    route_kernel,
    unpack_kernel,
)
from flash_moe_dist.dispatch.partition import experts_per_rank

PACK_BLOCK = 128
UNPACK_BLOCK, UNPACK_PROGRAMS = 1024, 1056


# Counts of a message with room, in 64 bits each.
HEADER_WORDS = 2 * COUNTS


@dataclass(frozen=True)
class Room:
    """Of each message: rows of all tokens of the rank that has most, and up to `pairs` pairs."""

    rows: int
    pairs: int
    weight_dtype: torch.dtype

    @property
    def message_words(self) -> int:
        """A multiple of 16 bytes."""
        words = HEADER_WORDS + self.rows + words_of_pair(self.weight_dtype) * self.pairs
        return cdiv(words, 4) * 4


@dataclass(frozen=True)
class SentPairs:
    """What `Routing.pack` gives, on the device.

    words       to each rank in turn: see above; `splits` (W,) says how many
    slots_P     place in (T, K) of each pair
    tokens_S    token of each row, and
    sent_TW     (T, W) int32: which of the S rows are copies of token t, in the order of the ranks,
                -1 for none; both None where every rank gets all rows
    """

    words: Tensor
    splits: list[int]
    slots_P: Tensor
    tokens_S: Tensor | None = None
    sent_TW: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """This rank's pairs by owner, on the device.

    ids_N, slots_N   ids sorted within each token, and the place in (T, K) each came from
    begin_WT         where the pairs of token t with rank w begin in ids_N
    pairs_WT         how many there are
    out_of_range     (1,) how many ids are neither an expert nor -1; these go nowhere
    local_size       experts of each rank but the last ones
    """

    ids_N: Tensor
    slots_N: Tensor
    begin_WT: Tensor
    pairs_WT: Tensor
    out_of_range: Tensor
    local_size: int

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int, ep_size: int) -> "Routing":
        local_size = experts_per_rank(num_experts, ep_size)
        if _in_kernels(indices_TK) and 0 < indices_TK.shape[1] <= MAX_SORTED_SLOTS:
            return cls._of_in_kernel(indices_TK, num_experts, ep_size, local_size)
        device = indices_TK.device
        num_tokens, slots = indices_TK.shape
        ids_TK, slot_TK = indices_TK.sort(dim=1, stable=True)
        # The last rank's range ends with the last expert: ids beyond it go nowhere.
        bounds = (torch.arange(ep_size + 1, device=device) * local_size).clamp(max=num_experts)
        bounds_TW1 = bounds.to(ids_TK.dtype).repeat(num_tokens, 1)
        begin_TW1 = torch.searchsorted(ids_TK, bounds_TW1)
        first_slot_T = torch.arange(num_tokens, device=device) * slots
        return cls(
            ids_TK.flatten().to(torch.int32),
            (slot_TK + first_slot_T.unsqueeze(1)).flatten(),
            begin_TW1[:, :-1].t() + first_slot_T,
            begin_TW1.diff(dim=1).t().contiguous(),
            ((indices_TK < -1) | (indices_TK >= num_experts)).sum().view(1),
            local_size,
        )

    @classmethod
    def _of_in_kernel(
        cls, indices_TK: Tensor, num_experts: int, ep_size: int, local_size: int
    ) -> "Routing":
        device, (num_tokens, slots) = indices_TK.device, indices_TK.shape
        block = next_power_of_2(slots)
        narrow = (num_experts + 2) * block < 2**31
        routing = cls(
            torch.empty(num_tokens * slots, device=device, dtype=torch.int32),
            torch.empty(num_tokens * slots, device=device, dtype=order_dtype(num_tokens * slots)),
            torch.empty(ep_size, num_tokens, device=device, dtype=torch.int64),
            torch.empty(ep_size, num_tokens, device=device, dtype=torch.int64),
            torch.zeros(1, device=device, dtype=torch.int64),
            local_size,
        )
        if num_tokens:
            launch(
                route_kernel,
                (num_tokens,),
                indices_TK.contiguous(),
                routing.ids_N,
                routing.slots_N,
                routing.begin_WT,
                routing.pairs_WT,
                routing.out_of_range,
                num_experts,
                local_size,
                ep_size,
                SLOTS=slots,
                BLOCK=block,
                KEY=triton.language.int32 if narrow else triton.language.int64,
                # As long as one warp can hold the keys, none of them crosses to another.
                num_warps=1 if block <= 1024 else block // 128,
            )
        return routing

    @cached_property
    def pairs_end(self) -> Tensor:
        """(W*T,) int64: pairs up to each token's with each rank, inclusive."""
        return self.pairs_WT.flatten().cumsum(0)

    @cached_property
    def rows_end(self) -> Tensor:
        """(W*T,) int64: rows up to each token's for each rank, inclusive."""
        return (self.pairs_WT.flatten() > 0).cumsum(0)

    def write_counts(
        self,
        counts_WC: Tensor,
        checksum: int,
        count_rows: bool = True,
        copies_WC: Tensor | None = None,
    ) -> None:
        """For each rank: rows, pairs; and for all the same: bad ids, T, checksum, most pairs.

        Args:
            counts_WC: (W, COUNTS) int64, to be filled; the last is the most pairs for any rank.
            count_rows: rows that have pairs; else 0 stands there.
            copies_WC: to be filled with the same.
        """
        copies_WC = counts_WC if copies_WC is None else copies_WC

        ep_size, num_tokens = self.pairs_WT.shape
        if num_tokens and _in_kernels(self.ids_N):
            launch(
                counts_kernel,
                (ep_size,),
                self.pairs_end,
                self.rows_end if count_rows else self.pairs_end,
                self.out_of_range,
                counts_WC,
                copies_WC,
                copies_WC.stride(0),
                num_tokens,
                checksum,
                ep_size,
                COUNTS=COUNTS,
                COUNT_ROWS=count_rows,
                num_warps=1,
            )
            return
        pairs_W = self.pairs_WT.sum(1)
        counts_WC[:, 0] = (self.pairs_WT > 0).sum(1) if count_rows else 0
        counts_WC[:, 1] = pairs_W
        counts_WC[:, 2] = self.out_of_range
        counts_WC[:, 3] = num_tokens
        counts_WC[:, 4] = checksum
        counts_WC[:, 5] = pairs_W.max()
        copies_WC.copy_(counts_WC)

    def pack(
        self, weights_TK: Tensor, rows_W: list[int], pairs_W: list[int], rows_of_all: int = 0
    ) -> SentPairs:
        """Words for each rank.

        Args:
            weights_TK: routing weights.
            rows_W, pairs_W: as `write_counts` has them, on the host.
            rows_of_all: if not 0, every rank gets that many rows: those of all tokens, then rows
                without pairs.
        """
        width = words_of_pair(weights_TK.dtype)
        rows_W = [rows_of_all] * len(rows_W) if rows_of_all else rows_W
        splits = [rows + width * pairs for rows, pairs in zip(rows_W, pairs_W, strict=True)]
        num_tokens = self.pairs_WT.shape[1]
        if _in_kernels(self.ids_N):
            words = torch.empty(sum(splits), device=self.ids_N.device, dtype=torch.int32)
            slots_P, tokens_S, sent_TW = self._pack_in_kernel(
                weights_TK, words, sum(rows_W), sum(pairs_W), rows_of_all
            )
            return SentPairs(words, splits, slots_P, tokens_S, sent_TW)
        ep_size = len(rows_W)
        local_ids_P, slots_P = self._pairs(sum(pairs_W))
        weights_P = weights_TK.flatten()[slots_P]
        if width == 2:
            weights_P = weights_P.float()
        bits_PV = weights_P.view(torch.int32).view(-1, width - 1)
        tokens_S = sent_TW = None
        if rows_of_all:
            missing = rows_of_all - num_tokens
            pairs_of_rows = torch.nn.functional.pad(self.pairs_WT, (0, missing)).flatten()
        else:
            is_sent = self.pairs_WT.flatten() > 0
            places_S = torch.nonzero_static(is_sent, size=sum(rows_W)).squeeze(1)
            pairs_of_rows = self.pairs_WT.flatten()[places_S]
            tokens_S = places_S % max(1, num_tokens)
            sent_WT = (self.rows_end - 1).masked_fill(~is_sent, -1).view(ep_size, num_tokens)
            sent_TW = sent_WT.t().to(torch.int32).contiguous()
        by_rank = (part.split(pairs_W) for part in (local_ids_P, bits_PV))
        words = torch.cat(
            [
                part
                for rows, ids, bits in zip(pairs_of_rows.split(rows_W), *by_rank, strict=True)
                for part in (rows.cumsum(0).int(), ids, bits.flatten())
            ]
        )
        return SentPairs(words, splits, slots_P, tokens_S, sent_TW)

    def pack_in_room(self, weights_TK: Tensor, words_WL: Tensor, room: Room) -> Tensor:
        """Words for each rank after the counts of its message (W, L), by a kernel.

        Pairs for which there is no room are left out. Returns the place in (T, K) of each pair:
        (T K,), of which those that are sent come first.
        """
        slots_P, *_ = self._pack_in_kernel(
            weights_TK, words_WL, 0, self.ids_N.shape[0], room.rows, room
        )
        return slots_P

    def _pairs(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Local ids (P,) int32 of the pairs in the order they are sent, and their places (P,).

        `num_pairs` = P spares a wait for the device.
        """
        ep_size, num_tokens = self.pairs_WT.shape
        counts = self.pairs_WT.flatten()
        shift = self.begin_WT.flatten() - (self.pairs_end - counts)
        first_expert_W = torch.arange(ep_size, device=counts.device) * self.local_size
        shift_and_expert = torch.stack(
            [shift, first_expert_W.repeat_interleave(num_tokens)], dim=1
        ).repeat_interleave(counts, dim=0, output_size=num_pairs)
        places = torch.arange(num_pairs, device=counts.device) + shift_and_expert[:, 0]
        local_ids = (self.ids_N[places] - shift_and_expert[:, 1]).to(torch.int32)
        return local_ids, self.slots_N[places]

    def _pack_in_kernel(
        self,
        weights_TK: Tensor,
        words: Tensor,
        num_rows: int,
        num_pairs: int,
        rows_of_all: int,
        room: Room | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ep_size, num_tokens = self.pairs_WT.shape
        device, all_rows = self.ids_N.device, rows_of_all > 0
        slots_P = torch.empty(num_pairs, device=device, dtype=torch.int64)
        tokens_S = sent_TW = None
        if not all_rows:
            tokens_S = torch.empty(num_rows, device=device, dtype=torch.int64)
            sent_TW = torch.empty(num_tokens, ep_size, device=device, dtype=torch.int32)
        if num_tokens:
            launch(
                pack_kernel,
                (num_tokens,),
                self.ids_N,
                self.slots_N,
                self.begin_WT,
                self.pairs_end,
                self.pairs_end if all_rows else self.rows_end,
                weights_TK.contiguous(),
                words,
                slots_P,
                slots_P if tokens_S is None else tokens_S,
                slots_P if sent_TW is None else sent_TW,
                self.local_size,
                rows_of_all,
                ep_size,
                0 if room is None else room.message_words,
                0 if room is None else room.pairs,
                HEADER_WORDS=HEADER_WORDS,
                WEIGHT_WORDS=words_of_pair(weights_TK.dtype) - 1,
                ALL_ROWS=all_rows,
                IN_ROOM=room is not None,
                BLOCK=PACK_BLOCK,
                num_warps=1,
            )
        return slots_P, tokens_S, sent_TW


def words_of_pair(weight_dtype: torch.dtype) -> int:
    """An id, and a weight."""
    return 3 if weight_dtype == torch.float64 else 2


def unpack(
    words: Tensor,
    counts_WC: Tensor,
    rows_W: list[int],
    pairs_W: list[int],
    weight_dtype: torch.dtype,
    rows_of_all: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the words received from each rank: row offsets (R+1,), ids (M,) int32, weights (M,).

    Args:
        counts_WC, rows_W, pairs_W: as those ranks' `Routing.write_counts`, and on the host.
        rows_of_all: as `Routing.pack`.
    """
    width = words_of_pair(weight_dtype)
    rows_W = [rows_of_all] * len(rows_W) if rows_of_all else rows_W
    if _in_kernels(words):
        room_for = (sum(rows_W), sum(pairs_W), max(pairs_W))
        return _unpack_in_kernel(words, counts_WC, *room_for, weight_dtype, rows_of_all)
    sizes = [
        size
        for rows, pairs in zip(rows_W, pairs_W, strict=True)
        for size in (rows, pairs, (width - 1) * pairs)
    ]
    parts = words.split(sizes)
    ids_M, bits_M = torch.cat(parts[1::3]), torch.cat(parts[2::3])
    weights_M = bits_M.view(torch.float64 if width == 3 else torch.float32).to(weight_dtype)
    offsets, pairs_before = [words.new_zeros(1, dtype=torch.int64)], 0
    for ends, pairs in zip(parts[::3], pairs_W, strict=True):
        offsets.append(ends.long() + pairs_before)
        pairs_before += pairs
    return torch.cat(offsets), ids_M, weights_M


def unpack_in_room(
    messages: Tensor, counts_WC: Tensor, room: Room
) -> tuple[Tensor, Tensor, Tensor]:
    """As `unpack`, of messages with room, by a kernel.

    Args:
        messages: (W, L) int32; or (W,) int64, the addresses of each.
        counts_WC: to be filled with what they begin with.

    Returns:
        Ids and weights as many as there is room for; those that were received come first.
    """
    ep_size = len(messages)
    sizes = (ep_size * room.rows, ep_size * room.pairs, room.pairs)
    return _unpack_in_kernel(messages, counts_WC, *sizes, room.weight_dtype, room.rows, room)


def _unpack_in_kernel(
    words: Tensor,
    counts_WC: Tensor,
    num_rows: int,
    num_pairs: int,
    most_pairs: int,
    weight_dtype: torch.dtype,
    rows_of_all: int,
    room: Room | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    device, ep_size = words.device, len(counts_WC)
    fresh = torch.empty if words.numel() else torch.zeros
    offsets = fresh(num_rows + 1, device=device, dtype=torch.int64)
    ids_M = torch.empty(num_pairs, device=device, dtype=torch.int32)
    weights_M = torch.empty(num_pairs, device=device, dtype=weight_dtype)
    # Enough programs for all multiprocessors, whatever the number of ranks.
    programs = max(1, min(UNPACK_PROGRAMS // ep_size, cdiv(most_pairs, UNPACK_BLOCK)))
    if words.numel():
        launch(
            unpack_kernel,
            (ep_size, programs),
            words,
            counts_WC,
            offsets,
            ids_M,
            weights_M,
            rows_of_all,
            0 if room is None else room.message_words,
            0 if room is None else room.pairs,
            COUNTS=COUNTS,
            HEADER_WORDS=HEADER_WORDS,
            WEIGHT_WORDS=words_of_pair(weight_dtype) - 1,
            ALL_ROWS=rows_of_all > 0,
            IN_ROOM=room is not None,
            AT_ADDRESSES=words.dtype == torch.int64,
            BLOCK=UNPACK_BLOCK,
        )
    return offsets, ids_M, weights_M


def _in_kernels(tensor: Tensor) -> bool:
    return default_backend(tensor.device) in TRITON_BACKENDS
