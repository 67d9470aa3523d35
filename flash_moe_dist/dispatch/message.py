"""Wire format of the messages that tell each rank of its pairs: pack and unpack.

T local tokens, K experts per token; W ranks; S rows and P pairs sent, R rows and M pairs received
by this rank; X most tokens of any rank.

A message is 32-bit words: for each row the number of pairs up to its last, then for each pair the
owner's local expert id, then for each pair the routing weight, as the bits of a float32 in one word
or of a float64 in two. With `ExactLayout` messages are as long as that takes. With
`CapacityLayout` all have one length, begin with the `Header`, and have space for `max_pairs` pairs.

Example: 2 ranks of 2 experts, this rank's tokens choose [3, 0], [1, 0], [2, -1]. Rank 0 gets the
pairs of token 0 with its local expert [0] and of token 1 with [0, 1]; rank 1 those of token 0 with
its local expert [1] and of token 2 with [0]. Rows, if sent once to each rank that needs them: of
tokens 0 and 1 to rank 0, of tokens 0 and 2 to rank 1. The words, with g for a weight:

    rank 0    1 3   0 0 1   g g g
    rank 1    1 2   1 0     g g
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.triton_launch import cdiv, launch
from flash_moe_dist.dispatch.header import HEADER_BYTES, INVALID_INPUT, Header
from flash_moe_dist.dispatch.message_kernels import pack_kernel, unpack_kernel
from flash_moe_dist.dispatch.routing import Routing

PACK_BLOCK = 128
UNPACK_BLOCK, UNPACK_PROGRAMS = 1024, 1056
WORD_BYTES = 4
HEADER_WORDS = HEADER_BYTES // WORD_BYTES


@dataclass(frozen=True)
class ExactLayout:
    """Messages as long as their rows and pairs.

    rows_W, pairs_W: numbers in the message to, or from, each rank.
    weight_dtype: dtype of the routing weights.
    all_rows: every rank gets the rows of all tokens, then rows without pairs up to the same number.
    """

    rows_W: list[int]
    pairs_W: list[int]
    weight_dtype: torch.dtype
    all_rows: bool

    @property
    def splits(self) -> list[int]:
        """Words of the message to, or from, each rank."""
        words = words_per_pair(self.weight_dtype)
        return [rows + words * pairs for rows, pairs in zip(self.rows_W, self.pairs_W, strict=True)]

    @property
    def padded_tokens(self) -> int:
        """Rows that every rank gets, if it gets all of them; else 0."""
        return self.rows_W[0] if self.all_rows else 0


@dataclass(frozen=True)
class CapacityLayout:
    """Messages of one length, for the rows of all tokens and up to `max_pairs` pairs.

    padded_tokens: X, the rows of every message.
    max_pairs: pairs that a message has space for.
    weight_dtype: dtype of the routing weights.
    """

    padded_tokens: int
    max_pairs: int
    weight_dtype: torch.dtype
    all_rows: bool = field(default=True, init=False)

    @property
    def message_stride(self) -> int:
        """L, words of a message: a multiple of 16 bytes."""
        words = words_per_pair(self.weight_dtype) * self.max_pairs
        return cdiv(HEADER_WORDS + self.padded_tokens + words, 4) * 4


class MetadataTensors(NamedTuple):
    """What the way back needs to know of the pairs and rows sent; autograd saves these tensors.

    slots_P     position in (T, K) of each pair
    tokens_S    token of each row sent
    sent_TW     (T, W) int32: which of the S rows are copies of token t, by rank, -1 for none
                (tokens_S and sent_TW are None where every rank gets all rows)
    """

    slots_P: Tensor | None = None
    tokens_S: Tensor | None = None
    sent_TW: Tensor | None = None


NO_TENSORS = MetadataTensors()


class PackedPairs(NamedTuple):
    """Messages to all ranks, and the `MetadataTensors` of the way back.

    message: (words,) int32, the messages to rank 0, 1, ...; (W, L) with static capacity.
    """

    message: Tensor
    slots_P: Tensor
    tokens_S: Tensor | None
    sent_TW: Tensor | None

    @property
    def tensors(self) -> MetadataTensors:
        return MetadataTensors(slots_P=self.slots_P, tokens_S=self.tokens_S, sent_TW=self.sent_TW)


class UnpackedPairs(NamedTuple):
    """Pairs received: row_offsets (R+1,) int64, expert_ids_M (M,) int32, weights_M (M,).

    With static capacity, ids and weights have space for more pairs than came; the pairs that came
    are in front.
    """

    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor


def words_per_pair(weight_dtype: torch.dtype) -> int:
    """Words of an expert id and a routing weight."""
    return 3 if weight_dtype == torch.float64 else 2


def header_of(message_WL: Tensor) -> Tensor:
    """View of the headers (W, F) int64 that messages with static capacity begin with."""
    return message_WL.view(torch.int64)[:, : len(Header)]


def pack(routing: Routing, weights_TK: Tensor, layout: ExactLayout) -> PackedPairs:
    """Write the pairs for each rank into a message as long as they are."""
    num_rows, num_pairs = sum(layout.rows_W), sum(layout.pairs_W)
    if routing.in_kernels:
        message = torch.empty(sum(layout.splits), device=weights_TK.device, dtype=torch.int32)
        return _pack_in_kernel(routing, weights_TK, layout, message, num_rows, num_pairs)
    ep_size, num_tokens = routing.pairs_WT.shape
    local_ids_P, slots_P = routing.pairs_in_order(num_pairs)
    weights_P = weights_TK.flatten()[slots_P]
    weight_words = words_per_pair(layout.weight_dtype) - 1
    if weight_words == 1:
        weights_P = weights_P.float()
    bits_PV = weights_P.view(torch.int32).view(-1, weight_words)
    pairs_of_rows = routing.pairs_WT.flatten()
    tokens_S = sent_TW = None
    if layout.all_rows:
        missing = layout.padded_tokens - num_tokens
        pairs_of_rows = torch.nn.functional.pad(routing.pairs_WT, (0, missing)).flatten()
    else:
        is_sent = pairs_of_rows > 0
        positions_S = torch.nonzero_static(is_sent, size=num_rows).squeeze(1)
        pairs_of_rows = pairs_of_rows[positions_S]
        tokens_S = positions_S % max(1, num_tokens)
        sent_WT = (routing.rows_end - 1).masked_fill(~is_sent, -1).view(ep_size, num_tokens)
        sent_TW = sent_WT.t().to(torch.int32).contiguous()
    by_rank = (rows.split(layout.pairs_W) for rows in (local_ids_P, bits_PV))
    message = torch.cat(
        [
            section
            for rows, ids, bits in zip(pairs_of_rows.split(layout.rows_W), *by_rank, strict=True)
            for section in (rows.cumsum(0).int(), ids, bits.flatten())
        ]
    )
    return PackedPairs(message, slots_P, tokens_S, sent_TW)


def pack_into(
    message_WL: Tensor, routing: Routing, weights_TK: Tensor, layout: CapacityLayout
) -> PackedPairs:
    """Write the pairs for each rank into messages with static capacity, after their headers.

    Pairs beyond the capacity are left out of the message; the header counts them, so that every
    rank notices. `slots_P` of the result is (T K,), the pairs that there are in front.
    """
    num_slots = routing.ids_N.shape[0]
    return _pack_in_kernel(routing, weights_TK, layout, message_WL, 0, num_slots)


def _pack_in_kernel(
    routing: Routing,
    weights_TK: Tensor,
    layout: ExactLayout | CapacityLayout,
    message: Tensor,
    num_rows: int,
    num_pairs: int,
) -> PackedPairs:
    ep_size, num_tokens = routing.pairs_WT.shape
    device = message.device
    capacity = layout if isinstance(layout, CapacityLayout) else None
    slots_P = torch.empty(num_pairs, device=device, dtype=torch.int64)
    tokens_S = sent_TW = None
    if not layout.all_rows:
        tokens_S = torch.empty(num_rows, device=device, dtype=torch.int64)
        sent_TW = torch.empty(num_tokens, ep_size, device=device, dtype=torch.int32)
    if num_tokens:
        launch(
            pack_kernel,
            (num_tokens,),
            routing.ids_N,
            routing.slots_N,
            routing.begin_WT,
            routing.pairs_end,
            routing.pairs_end if layout.all_rows else routing.rows_end,
            weights_TK.contiguous(),
            message,
            slots_P,
            slots_P if tokens_S is None else tokens_S,
            slots_P if sent_TW is None else sent_TW,
            routing.local_size,
            layout.padded_tokens,
            ep_size,
            0 if capacity is None else capacity.message_stride,
            0 if capacity is None else capacity.max_pairs,
            WEIGHT_WORDS=words_per_pair(weights_TK.dtype) - 1,
            ALL_ROWS=layout.all_rows,
            HAS_CAPACITY=capacity is not None,
            BLOCK=PACK_BLOCK,
            num_warps=1,
        )
    return PackedPairs(message, slots_P, tokens_S, sent_TW)


def unpack(
    message: Tensor, header_WF: Tensor, layout: ExactLayout, in_kernels: bool
) -> UnpackedPairs:
    """Read the messages of all ranks.

    Args:
        message: (words,) int32, the messages from rank 0, 1, ...
        header_WF: (W, F) int64, the headers received.
        layout: layout of what was received.
        in_kernels: use Triton kernels.
    """
    rows_W, pairs_W = layout.rows_W, layout.pairs_W
    if in_kernels:
        return _unpack_in_kernel(
            message,
            header_WF,
            layout,
            num_rows=sum(rows_W),
            num_pairs=sum(pairs_W),
            max_pairs=max(pairs_W),
        )
    weight_words = words_per_pair(layout.weight_dtype) - 1
    sizes_W3 = [
        size
        for rows, pairs in zip(rows_W, pairs_W, strict=True)
        for size in (rows, pairs, weight_words * pairs)
    ]
    sections = message.split(sizes_W3)
    ids_M, bits_M = torch.cat(sections[1::3]), torch.cat(sections[2::3])
    weights_M = bits_M.view(torch.float64 if weight_words == 2 else torch.float32)
    offsets, pairs_before = [message.new_zeros(1, dtype=torch.int64)], 0
    for ends, pairs in zip(sections[::3], pairs_W, strict=True):
        offsets.append(ends.long() + pairs_before)
        pairs_before += pairs
    return UnpackedPairs(torch.cat(offsets), ids_M, weights_M.to(layout.weight_dtype))


def unpack_from(
    messages: Tensor, header_WF: Tensor, layout: CapacityLayout, checksum: int
) -> UnpackedPairs:
    """Read the messages of all ranks where they have static capacity.

    A message with another checksum, perhaps of another layer's layout, is read as one of no pairs.

    Args:
        messages: (W, L) int32, or (W,) int64 pointers to the message of each rank.
        header_WF: (W, F) int64, written: the headers of the messages.
        layout: layout of the messages.
        checksum: `RankInput.checksum` of this rank.
    """
    ep_size = len(messages)
    return _unpack_in_kernel(
        messages,
        header_WF,
        layout,
        num_rows=ep_size * layout.padded_tokens,
        num_pairs=ep_size * layout.max_pairs,
        max_pairs=layout.max_pairs,
        checksum=checksum,
    )


def _unpack_in_kernel(
    messages: Tensor,
    header_WF: Tensor,
    layout: ExactLayout | CapacityLayout,
    num_rows: int,
    num_pairs: int,
    max_pairs: int,
    checksum: int = INVALID_INPUT,
) -> UnpackedPairs:
    device, ep_size = messages.device, len(header_WF)
    capacity = layout if isinstance(layout, CapacityLayout) else None
    allocate = torch.empty if messages.numel() else torch.zeros
    row_offsets = allocate(num_rows + 1, device=device, dtype=torch.int64)
    ids_M = torch.empty(num_pairs, device=device, dtype=torch.int32)
    weights_M = torch.empty(num_pairs, device=device, dtype=layout.weight_dtype)
    # Enough programs for all multiprocessors, whatever the number of ranks.
    programs = max(1, min(UNPACK_PROGRAMS // ep_size, cdiv(max_pairs, UNPACK_BLOCK)))
    if messages.numel():
        launch(
            unpack_kernel,
            (ep_size, programs),
            messages,
            header_WF,
            row_offsets,
            ids_M,
            weights_M,
            layout.padded_tokens,
            0 if capacity is None else capacity.message_stride,
            0 if capacity is None else capacity.max_pairs,
            checksum,
            WEIGHT_WORDS=words_per_pair(layout.weight_dtype) - 1,
            ALL_ROWS=layout.all_rows,
            HAS_CAPACITY=capacity is not None,
            BY_POINTER=messages.dtype == torch.int64,
            BLOCK=UNPACK_BLOCK,
        )
    return UnpackedPairs(row_offsets, ids_M, weights_M)
