"""Triton kernels that sort a token's pairs by owner and write them into the words to be sent.

T tokens, K slots of each, W ranks that own `local_size` experts each; see `flash_moe_dist.routing`.

ids (T, K)            int32 or int64, any values
sorted_ids, slots     (T*K,) ids in ascending order within each token, -1 for what is no expert, and
                      the place in (T*K,) each came from
begin, pairs (W, T)   where the pairs of a token with a rank begin in sorted_ids, and how many
"""

import triton
import triton.language as tl

from flash_moe.ops.arrange_kernels import sorted_slots


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
        tl.store(pairs + rank * num_tokens + token, end - first)
        first = end


@triton.jit
def counts_kernel(
    pairs_end,
    rows_end,
    out_of_range,
    counts,
    num_tokens,
    checksum,
    COUNTS: tl.constexpr,
):
    """counts (W, COUNTS): rows, pairs, ids out of range, tokens, checksum for each rank; grid (W,).

    pairs_end, rows_end: as `pack_kernel`.
    """
    rank = tl.program_id(0).to(tl.int64)
    before, last = rank * num_tokens - 1, (rank + 1) * num_tokens - 1
    rows = tl.load(rows_end + last) - tl.load(rows_end + before, mask=rank > 0, other=0)
    pairs = tl.load(pairs_end + last) - tl.load(pairs_end + before, mask=rank > 0, other=0)
    tl.store(counts + rank * COUNTS, rows)
    tl.store(counts + rank * COUNTS + 1, pairs)
    tl.store(counts + rank * COUNTS + 2, tl.load(out_of_range))
    tl.store(counts + rank * COUNTS + 3, num_tokens)
    tl.store(counts + rank * COUNTS + 4, checksum)


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
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Words for each rank, as `flash_moe_dist.routing` lays them out; grid (T,).

    pairs_end, rows_end (W*T,) count pairs and rows up to each token's with each rank, inclusive;
    every rank gets rows_of_all rows if ALL_ROWS, else those with pairs. slots_sent (P,),
    tokens_sent (S,) and copies (T, W) as in `Routing`; the latter two where rows are chosen.
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
            rows_before, num_rows = rank * rows_of_all, rows_of_all
            row = rows_before + token
        else:
            rows_before = tl.load(rows_end + rank_begin - 1, mask=rank_begin > 0, other=0)
            num_rows = tl.load(rows_end + rank_end - 1) - rows_before
            row = tl.load(rows_end + place) - 1
            tl.store(copies + token * ep_size + rank, tl.where(end > first, row, -1).to(tl.int32))
            tl.store(tokens_sent + row, token, mask=end > first)
        block = rows_before + pairs_before * (1 + WEIGHT_WORDS)
        is_sent = (end > first) | ALL_ROWS
        tl.store(words + block + row - rows_before, (end - first).to(tl.int32), mask=is_sent)
        source = tl.load(begin + place)
        for done in range(0, end - first, BLOCK):
            inside = done + lanes < end - first
            ids = tl.load(sorted_ids + source + done + lanes, mask=inside, other=0)
            slot = tl.load(slots + source + done + lanes, mask=inside, other=0)
            pair = first + done + lanes
            tl.store(slots_sent + pair, slot.to(tl.int64), mask=inside)
            word = block + num_rows + (pair - pairs_before) * (1 + WEIGHT_WORDS)
            tl.store(words + word, ids - rank * local_size, mask=inside)
            if WEIGHT_WORDS == 1:
                weight = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
                tl.store(words + word + 1, weight.to(tl.int32, bitcast=True), mask=inside)
            else:
                bits = tl.load(weights + slot, mask=inside, other=0.0).to(tl.int64, bitcast=True)
                tl.store(words + word + 1, bits.to(tl.int32), mask=inside)
                tl.store(words + word + 2, (bits >> 32).to(tl.int32), mask=inside)


@triton.jit
def unpack_kernel(
    words,
    counts,
    pairs_of_rows,
    ids,
    weights,
    rows_of_all,
    COUNTS: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `pack_kernel` wrote, from all ranks; grid (W, programs that share one rank's words).

    counts (W, COUNTS): rows and pairs from each rank come first. pairs_of_rows (R,), ids (M,) and
    weights (M,) are written.
    """
    source = tl.program_id(0)
    rows_before, pairs_before = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for rank in range(source):
        rows_before += rows_of_all if ALL_ROWS else tl.load(counts + rank * COUNTS)
        pairs_before += tl.load(counts + rank * COUNTS + 1)
    num_rows = rows_of_all if ALL_ROWS else tl.load(counts + source * COUNTS)
    num_pairs = tl.load(counts + source * COUNTS + 1)
    block = words + rows_before + pairs_before * (1 + WEIGHT_WORDS)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(1) * BLOCK
    for done in range(0, num_rows, step):
        row = done + lanes
        inside = row < num_rows
        pairs = tl.load(block + row, mask=inside, other=0)
        tl.store(pairs_of_rows + rows_before + row, pairs, mask=inside)
    for done in range(0, num_pairs, step):
        pair = done + lanes
        inside = pair < num_pairs
        word = block + num_rows + pair.to(tl.int64) * (1 + WEIGHT_WORDS)
        tl.store(ids + pairs_before + pair, tl.load(word, mask=inside, other=0), mask=inside)
        if WEIGHT_WORDS == 1:
            bits = tl.load(word + 1, mask=inside, other=0)
            weight = bits.to(tl.float32, bitcast=True).to(weights.dtype.element_ty)
        else:
            low = tl.load(word + 1, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
            high = tl.load(word + 2, mask=inside, other=0).to(tl.int64) << 32
            weight = (low | high).to(tl.float64, bitcast=True)
        tl.store(weights + pairs_before + pair, weight, mask=inside)
