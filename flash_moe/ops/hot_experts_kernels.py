"""Triton kernels that partition the pairs of hot experts: see `flash_moe.ops.hot_experts`."""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def count_hot_kernel(num_tokens, totals, num_experts, threshold, BLOCK: tl.constexpr):
    """Count totals[i], the hot experts among the i-th BLOCK of experts.

    grid (blocks,).
    """
    experts = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(num_tokens + experts, mask=experts < num_experts, other=-1)
    hot = (counts >= threshold) & (experts < num_experts)
    tl.store(totals + tl.program_id(0), tl.sum(hot.to(tl.int32), 0))


@triton.jit
def index_hot_kernel(
    hot_index, totals, experts_by_hot_index, num_hot, num_experts, threshold, BLOCK: tl.constexpr
):
    """Replace each expert's number of tokens in `hot_index` by its hot index; grid (blocks,)."""
    block = tl.program_id(0)
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, block, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        before += tl.load(totals + blocks, mask=blocks < block, other=0)
    experts = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = experts < num_experts
    counts = tl.load(hot_index + experts, mask=in_block, other=-1)
    hot = (counts >= threshold) & in_block
    index = tl.sum(before, 0) + tl.cumsum(hot.to(tl.int32), 0) - 1
    tl.store(hot_index + experts, tl.where(hot, index, -1), mask=in_block)
    tl.store(experts_by_hot_index + index, experts.to(tl.int32), mask=hot)
    if block == tl.num_programs(0) - 1:
        tl.store(num_hot, tl.max(index, 0) + 1)


@triton.jit
def partition_hot_pairs_kernel(
    ids,
    order,
    hot_index,
    num_hot,
    pair_counts,
    bitmaps,
    num_bitmaps,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HOT: tl.constexpr,
):
    """Bring one token's sorted pairs into the order of `HotPairs`, in place; grid (T,).

    Writes the token's bitmaps up to the number of hot experts, rounded up to a multiple of
    BLOCK_HOT.
    """
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK)
    in_row = slots < TOP_K
    row = token * TOP_K + slots
    experts = tl.load(ids + row, mask=in_row, other=-1)
    previous = tl.load(ids + row - 1, mask=in_row & (slots > 0), other=-1)
    moved = tl.load(order + row, mask=in_row, other=0)
    occupied = in_row & (experts >= 0)
    index = tl.load(hot_index + experts, mask=occupied, other=-1)
    hot = index >= 0
    first = hot & (experts != previous)
    repeat = hot & (experts == previous)
    cold = occupied & (index < 0)
    # Three counts of up to TOP_K in one number, so that one scan suffices.
    BITS: tl.constexpr = 10 if TOP_K < 1024 else 20
    COUNT: tl.constexpr = tl.int32 if TOP_K < 1024 else tl.int64
    counted = cold.to(COUNT) + (first.to(COUNT) << BITS) + (repeat.to(COUNT) << 2 * BITS)
    running = tl.cumsum(counted, 0)
    total = tl.sum(counted, 0)
    MASK: tl.constexpr = (1 << BITS) - 1
    num_cold = (total & MASK).to(tl.int32)
    num_first = ((total >> BITS) & MASK).to(tl.int32)
    num_repeat = (total >> 2 * BITS).to(tl.int32)
    to_cold = (running & MASK).to(tl.int32) - 1
    to_first = num_cold + ((running >> BITS) & MASK).to(tl.int32) - 1
    to_repeat = num_cold + num_first + (running >> 2 * BITS).to(tl.int32) - 1
    # Empty slots come first among sorted ids, and go last.
    empty = in_row & (experts < 0)
    num_empty = TOP_K - num_cold - num_first - num_repeat
    to = tl.where(cold, to_cold, tl.where(first, to_first, to_repeat))
    to = tl.where(empty, TOP_K - num_empty + slots, to)
    bitmap_row = bitmaps + token * num_bitmaps
    bitmaps_used = tl.minimum(tl.cdiv(tl.load(num_hot), BLOCK_HOT) * (BLOCK_HOT // 32), num_bitmaps)
    for begin in range(0, bitmaps_used, BLOCK):
        zeroed = begin + slots
        tl.store(bitmap_row + zeroed, tl.zeros([BLOCK], dtype=tl.int64), mask=zeroed < bitmaps_used)
    # All reads come before the first write, and all zeros before the first addition.
    tl.debug_barrier()
    tl.store(ids + token * TOP_K + to, tl.where(hot, -2 - experts, experts), mask=in_row)
    tl.store(order + token * TOP_K + to, moved, mask=in_row)
    tl.store(pair_counts + token * 3, num_cold)
    tl.store(pair_counts + token * 3 + 1, num_first)
    tl.store(pair_counts + token * 3 + 2, num_repeat)
    # Each bit and each position is added once: both sums are exact, in any order.
    bit = tl.full([BLOCK], 1, tl.int64) << (index % 32)
    tl.atomic_add(
        bitmap_row + index // 32,
        bit + (to.to(tl.int64) << 32),
        mask=first,
        sem="relaxed",
    )
