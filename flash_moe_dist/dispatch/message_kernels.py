"""Triton kernels that write pairs into messages to all ranks, and read those of all ranks.

T tokens, K experts per token, W ranks that own `local_size` experts each; `message.py` describes
the layout of a message.
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe_dist.dispatch.header_kernels import (
    CHECKSUM,
    HEADER_FIELDS,
    HEADER_WORDS,
    PAIRS,
    ROWS,
    TOKENS,
)


@triton.jit
def pack_kernel(
    sorted_ids,
    slots,
    begin,
    pairs_end,
    rows_end,
    weights,
    messages,
    slots_sent,
    tokens_sent,
    row_copies,
    local_size,
    padded_tokens,
    ep_size,
    message_stride,
    max_pairs,
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    HAS_CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the pairs of one token into the message to each rank; grid (T,).

    pairs_end, rows_end (W*T,) count pairs and rows up to each token's with each rank, inclusive.
    Every rank gets padded_tokens rows if ALL_ROWS, else the rows with pairs. slots_sent (P,),
    tokens_sent (S,) and row_copies (T, W) are the `MetadataTensors`; the latter two are written
    unless ALL_ROWS. HAS_CAPACITY: messages lie message_stride words apart, begin with a header
    that is not written here, and hold max_pairs pairs; pairs beyond that are left out.
    """
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for rank in range(ep_size):
        position = rank * num_tokens + token
        rank_begin, rank_end = rank * num_tokens, (rank + 1) * num_tokens
        pairs_before = tl.load(pairs_end + rank_begin - 1, mask=rank_begin > 0, other=0)
        end = tl.load(pairs_end + position)
        first = tl.load(pairs_end + position - 1, mask=position > 0, other=0)
        if ALL_ROWS:
            row, num_rows = token, tl.zeros([], tl.int64) + padded_tokens
            rows_before = rank * num_rows
        else:
            rows_before = tl.load(rows_end + rank_begin - 1, mask=rank_begin > 0, other=0)
            num_rows = tl.load(rows_end + rank_end - 1) - rows_before
            row = tl.load(rows_end + position) - 1
            tl.store(
                row_copies + token * ep_size + rank, tl.where(end > first, row, -1).to(tl.int32)
            )
            tl.store(tokens_sent + row, token, mask=end > first)
            row -= rows_before
        last = end
        if HAS_CAPACITY:
            message = messages + tl.cast(rank, tl.int64) * message_stride + HEADER_WORDS
            last = tl.minimum(end, pairs_before + max_pairs)
            all_pairs = tl.zeros([], tl.int64) + max_pairs
        else:
            message = messages + rows_before + pairs_before * (1 + WEIGHT_WORDS)
            all_pairs = tl.load(pairs_end + rank_end - 1) - pairs_before
        is_sent = (end > first) | ALL_ROWS
        tl.store(message + row, (last - pairs_before).to(tl.int32), mask=is_sent)
        source = tl.load(begin + position)
        for done in range(0, last - first, BLOCK):
            inside = done + lanes < last - first
            ids = tl.load(sorted_ids + source + done + lanes, mask=inside, other=0)
            slot = tl.load(slots + source + done + lanes, mask=inside, other=0)
            pair = first + done + lanes
            tl.store(slots_sent + pair, slot.to(tl.int64), mask=inside)
            word = num_rows + pair - pairs_before
            tl.store(message + word, ids - rank * local_size, mask=inside)
            word = num_rows + all_pairs + (pair - pairs_before) * WEIGHT_WORDS
            if WEIGHT_WORDS == 1:
                weight = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
                tl.store(message + word, weight.to(tl.int32, bitcast=True), mask=inside)
            else:
                bits = tl.load(weights + slot, mask=inside, other=0.0).to(tl.int64, bitcast=True)
                tl.store(message + word, bits.to(tl.int32), mask=inside)
                tl.store(message + word + 1, (bits >> 32).to(tl.int32), mask=inside)


@triton.jit
def _header_and_body(messages, rank, message_stride, BY_POINTER: tl.constexpr):
    """Pointers to the header of a message with static capacity, and to what follows it."""
    if BY_POINTER:
        message = tl.load(messages + rank).to(tl.pointer_type(tl.int32))
    else:
        message = messages + rank * message_stride
    return message.to(tl.pointer_type(tl.int64)), message + HEADER_WORDS


@triton.jit
def _pairs_in_message(header, max_pairs, checksum):
    """Number of pairs in a message with static capacity: 0 if the checksum is another."""
    is_of_this_pass = tl.load(header + CHECKSUM) == checksum
    return tl.where(is_of_this_pass, tl.minimum(tl.load(header + PAIRS), max_pairs), 0)


# The checksum differs from pass to pass; specialised, a multiple of 16 would compile in training.
@triton.jit(do_not_specialize=["checksum"])
def unpack_kernel(
    messages,
    headers,
    offsets,
    ids,
    weights,
    padded_tokens,
    message_stride,
    max_pairs,
    checksum,
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    HAS_CAPACITY: tl.constexpr,
    BY_POINTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads what `pack_kernel` wrote on all ranks; grid (W, programs that share one message).

    headers (W, F): of all ranks; written if HAS_CAPACITY, from the headers of the messages, else
    read. messages: if BY_POINTER (W,) int64, a pointer to each message. offsets (R+1,), ids (M,)
    and weights (M,) are written; rows past a rank's own tokens get no pairs, nor do those of a
    message with another checksum if HAS_CAPACITY.
    """
    source = tl.program_id(0).to(tl.int64)
    rows_before, pairs_before = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for rank in range(source):
        sent = headers + rank * HEADER_FIELDS
        if HAS_CAPACITY:
            sent, _ = _header_and_body(messages, rank, message_stride, BY_POINTER)
        rows_before += padded_tokens if ALL_ROWS else tl.load(sent + ROWS)
        if HAS_CAPACITY:
            pairs_before += _pairs_in_message(sent, max_pairs, checksum)
        else:
            pairs_before += tl.load(sent + PAIRS)
    sent = headers + source * HEADER_FIELDS
    if HAS_CAPACITY:
        sent, message = _header_and_body(messages, source, message_stride, BY_POINTER)
    else:
        message = messages + rows_before + pairs_before * (1 + WEIGHT_WORDS)
    num_rows = tl.zeros([], tl.int64) + (padded_tokens if ALL_ROWS else tl.load(sent + ROWS))
    rows_with_pairs = tl.minimum(num_rows, tl.load(sent + TOKENS)) if ALL_ROWS else num_rows
    all_pairs = tl.load(sent + PAIRS)
    num_pairs = all_pairs
    if HAS_CAPACITY:
        num_pairs = _pairs_in_message(sent, max_pairs, checksum)
        rows_with_pairs = tl.where(num_pairs > 0, rows_with_pairs, 0)
        all_pairs = tl.zeros([], tl.int64) + max_pairs
        if tl.program_id(1) == 0:
            for field in tl.static_range(HEADER_FIELDS):
                tl.store(headers + source * HEADER_FIELDS + field, tl.load(sent + field))
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(1) * BLOCK
    if (source == 0) & (tl.program_id(1) == 0):
        tl.store(offsets, 0)
    for done in range(0, num_rows, step):
        row = done + lanes
        known = row < rows_with_pairs
        end = tl.load(message + row, mask=known, other=0).to(tl.int64) & 0xFFFFFFFF
        end = tl.where(known, end, num_pairs)
        tl.store(offsets + 1 + rows_before + row, pairs_before + end, mask=row < num_rows)
    for done in range(0, num_pairs, step):
        pair = done + lanes
        inside = pair < num_pairs
        id = tl.load(message + num_rows + pair, mask=inside, other=0)
        tl.store(ids + pairs_before + pair, id, mask=inside)
        word = num_rows + all_pairs + pair.to(tl.int64) * WEIGHT_WORDS
        if WEIGHT_WORDS == 1:
            bits = tl.load(message + word, mask=inside, other=0)
            weight = bits.to(tl.float32, bitcast=True).to(weights.dtype.element_ty)
        else:
            low = tl.load(message + word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
            high = tl.load(message + word + 1, mask=inside, other=0).to(tl.int64) << 32
            weight = (low | high).to(tl.float64, bitcast=True)
        tl.store(weights + pairs_before + pair, weight, mask=inside)
