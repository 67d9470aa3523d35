"""Triton kernels that sort a token's pairs by owner and write them into the words to be sent.

T tokens, K slots of each, W ranks that own `local_size` experts each; see `message.py`.

ids (T, K)            int32 or int64, any values
sorted_ids, slots     (T*K,) ids in ascending order within each token, -1 for what is no expert, and
                      the place in (T*K,) each came from
begin, pairs (W, T)   where the pairs of a token with a rank begin in sorted_ids, and how many
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.indices_kernels import sorted_slots


@triton.jit
def route_kernel(
    ids,
    sorted_ids,
    slots,
    begin,
    pairs,
    out_of_range,
    num_experts,
    local_size,
    ep_size,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY: tl.constexpr,
):
    """grid (T,); out_of_range (1,) is raised by the number of ids that are no expert and not -1."""
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = token * SLOTS
    places = tl.arange(0, BLOCK)
    in_row = places < SLOTS
    loaded = tl.load(ids + row + places, mask=in_row, other=-1).to(tl.int64)
    outside = (loaded < -1) | (loaded >= num_experts)
    num_outside = tl.sum(outside.to(tl.int32), 0)
    if num_outside > 0:
        tl.atomic_add(out_of_range, num_outside.to(tl.int64))
    ids_of_token, slots_of_token = sorted_slots(
        tl.where(outside, -1, loaded), places, in_row, num_experts, BLOCK, KEY
    )
    tl.store(sorted_ids + row + places, ids_of_token, mask=in_row)
    positions = row + slots_of_token
    tl.store(slots + row + places, positions.to(slots.dtype.element_ty), mask=in_row)
    # Empty slots lie before all ranks' pairs, places past the row behind.
    first = tl.sum((in_row & (ids_of_token < 0)).to(tl.int32), 0)
    for rank in range(ep_size):
        bound = (rank + 1) * local_size
        end = tl.sum((in_row & (ids_of_token < bound)).to(tl.int32), 0)
        tl.store(begin + rank * num_tokens + token, row + first)
        tl.store(pairs + rank * num_tokens + token, (end - first).to(tl.int64))
        first = end


@triton.jit
def counts_kernel(
    pairs_end,
    rows_end,
    out_of_range,
    counts,
    copies,
    copies_stride,
    num_tokens,
    checksum,
    ep_size,
    COUNTS: tl.constexpr,
    COUNT_ROWS: tl.constexpr,
):
    """counts (W, COUNTS) and copies (W, any stride): see `Routing.write_counts`; grid (W,).

    pairs_end, rows_end: as `pack_kernel`; rows are not counted unless COUNT_ROWS.
    """
    rank = tl.program_id(0).to(tl.int64)
    before, last = rank * num_tokens - 1, (rank + 1) * num_tokens - 1
    rows = tl.zeros([], tl.int64)
    if COUNT_ROWS:
        rows = tl.load(rows_end + last) - tl.load(rows_end + before, mask=rank > 0, other=0)
    pairs = tl.load(pairs_end + last) - tl.load(pairs_end + before, mask=rank > 0, other=0)
    most, end = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for other in range(ep_size):
        begin, end = end, tl.load(pairs_end + (other + 1) * num_tokens - 1)
        most = tl.maximum(most, end - begin)
    bad = tl.load(out_of_range)
    for copy in tl.static_range(2):
        row = copies + rank * copies_stride if copy else counts + rank * COUNTS
        tl.store(row, rows)
        tl.store(row + 1, pairs)
        tl.store(row + 2, bad)
        tl.store(row + 3, num_tokens)
        tl.store(row + 4, checksum)
        tl.store(row + 5, most)


@triton.jit
def pack_kernel(
    sorted_ids,
    slots,
    begin,
    pairs_end,
    rows_end,
    weights,
    words,
    slots_sent,
    tokens_sent,
    copies,
    local_size,
    rows_of_all,
    ep_size,
    message_words,
    pairs_room,
    HEADER_WORDS: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    IN_ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Words for each rank, as `flash_moe_dist.dispatch.message` lays them out; grid (T,).

    pairs_end, rows_end (W*T,) count pairs and rows up to each token's with each rank, inclusive;
    every rank gets rows_of_all rows if ALL_ROWS, else those with pairs. slots_sent (P,),
    tokens_sent (S,) and copies (T, W) as in `Routing`; the latter two where rows are chosen.
    IN_ROOM: the message to each rank has message_words, HEADER_WORDS of them in front, and room
    for pairs_room pairs; pairs beyond that are left out.
    """
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for rank in range(ep_size):
        place = rank * num_tokens + token
        rank_begin, rank_end = rank * num_tokens, (rank + 1) * num_tokens
        pairs_before = tl.load(pairs_end + rank_begin - 1, mask=rank_begin > 0, other=0)
        end = tl.load(pairs_end + place)
        first = tl.load(pairs_end + place - 1, mask=place > 0, other=0)
        if ALL_ROWS:
            row, num_rows = token, tl.zeros([], tl.int64) + rows_of_all
            rows_before = rank * num_rows
        else:
            rows_before = tl.load(rows_end + rank_begin - 1, mask=rank_begin > 0, other=0)
            num_rows = tl.load(rows_end + rank_end - 1) - rows_before
            row = tl.load(rows_end + place) - 1
            tl.store(copies + token * ep_size + rank, tl.where(end > first, row, -1).to(tl.int32))
            tl.store(tokens_sent + row, token, mask=end > first)
            row -= rows_before
        last = end
        if IN_ROOM:
            message = words + tl.cast(rank, tl.int64) * message_words + HEADER_WORDS
            last = tl.minimum(end, pairs_before + pairs_room)
            all_pairs = tl.zeros([], tl.int64) + pairs_room
        else:
            message = words + rows_before + pairs_before * (1 + WEIGHT_WORDS)
            all_pairs = tl.load(pairs_end + rank_end - 1) - pairs_before
        is_sent = (end > first) | ALL_ROWS
        tl.store(message + row, (last - pairs_before).to(tl.int32), mask=is_sent)
        source = tl.load(begin + place)
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
def _message(words, rank, message_words, HEADER_WORDS: tl.constexpr, AT_ADDRESSES: tl.constexpr):
    """Of a message with room: its counts, and what follows them."""
    if AT_ADDRESSES:
        message = tl.load(words + rank).to(tl.pointer_type(tl.int32))
    else:
        message = words + rank * message_words
    return message.to(tl.pointer_type(tl.int64)), message + HEADER_WORDS


@triton.jit
def unpack_kernel(
    words,
    counts,
    offsets,
    ids,
    weights,
    rows_of_all,
    message_words,
    pairs_room,
    COUNTS: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    IN_ROOM: tl.constexpr,
    AT_ADDRESSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `pack_kernel` wrote, from all ranks; grid (W, programs that share one rank's words).

    counts (W, COUNTS): as each rank's `Routing.write_counts`; written if IN_ROOM, from what the
    messages begin with. words: if AT_ADDRESSES (W,) int64, where the messages are. offsets (R+1,),
    ids (M,) and weights (M,) are written; rows that a rank does not have are rows without pairs.
    """
    source = tl.program_id(0).to(tl.int64)
    rows_before, pairs_before = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for rank in range(source):
        sent = counts + rank * COUNTS
        if IN_ROOM:
            sent, _ = _message(words, rank, message_words, HEADER_WORDS, AT_ADDRESSES)
        rows_before += rows_of_all if ALL_ROWS else tl.load(sent)
        pairs = tl.load(sent + 1)
        pairs_before += tl.minimum(pairs, pairs_room) if IN_ROOM else pairs
    sent = counts + source * COUNTS
    if IN_ROOM:
        sent, message = _message(words, source, message_words, HEADER_WORDS, AT_ADDRESSES)
    else:
        message = words + rows_before + pairs_before * (1 + WEIGHT_WORDS)
    num_rows = tl.zeros([], tl.int64) + (rows_of_all if ALL_ROWS else tl.load(sent))
    rows_with_pairs = tl.minimum(num_rows, tl.load(sent + 3)) if ALL_ROWS else num_rows
    all_pairs = tl.load(sent + 1)
    num_pairs = all_pairs
    if IN_ROOM:
        num_pairs = tl.minimum(num_pairs, pairs_room)
        all_pairs = tl.zeros([], tl.int64) + pairs_room
        if tl.program_id(1) == 0:
            for number in tl.static_range(COUNTS):
                tl.store(counts + source * COUNTS + number, tl.load(sent + number))
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
