"""Triton kernels that check ids and row offsets, and sort ids within each token.

ids              (N,) or (T, TOP_K), int32 or int64, any values
checked_ids      the same shape, int32 in [-1, num_experts): an id out of range becomes -1
found (4,)       int64 on the device: least and greatest id out of range, the number of experts
                 they were checked against, and the number of pairs of wrong row offsets
flag (1,)        int32 in memory that the host can read: set once `found` was written
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

LARGEST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _without_ids_out_of_range(ids, num_experts, found, flag):
    outside = (ids < -1) | (ids >= num_experts)
    if tl.max(outside.to(tl.int32), 0) > 0:
        tl.atomic_min(found, tl.min(tl.where(outside, ids, LARGEST_KEY), 0))
        tl.atomic_max(found + 1, tl.max(tl.where(outside, ids, -LARGEST_KEY), 0))
        tl.store(found + 2, num_experts)
        tl.store(flag, 1)
    return tl.where(outside, -1, ids)


@triton.jit
def check_ids_kernel(ids, checked_ids, found, flag, num_ids, num_experts, BLOCK: tl.constexpr):
    """Check ids without changing their order; grid (blocks of ids,)."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = positions < num_ids
    loaded = tl.load(ids + positions, mask=in_block, other=-1).to(tl.int64)
    checked = _without_ids_out_of_range(loaded, num_experts, found, flag)
    tl.store(checked_ids + positions, checked.to(tl.int32), mask=in_block)


@triton.jit
def sorted_slots(ids, slots, in_row, num_experts, BLOCK: tl.constexpr, KEY: tl.constexpr):
    """Sort ids (BLOCK,) in [-1, num_experts): ascending int32 ids, and the slot each came from.

    An id and its slot are sorted as one number of type KEY, so equal ids keep their order.
    """
    # Slots past the row sort after every id. In 64 bits, since num_experts may be 2**31 - 1.
    past = tl.zeros_like(ids) + num_experts + 1
    keys = tl.sort((tl.where(in_row, ids + 1, past) * BLOCK + slots).to(KEY))
    return (keys // BLOCK - 1).to(tl.int32), (keys % BLOCK).to(tl.int64)


@triton.jit
def sort_slots_kernel(
    ids,
    checked_ids,
    order,
    num_tokens,
    found,
    flag,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Check ids and sort them within each token; grid (T,).

    order: the position in `ids` that each sorted id came from. If HAS_COUNTS, each expert of the
    token adds one to num_tokens (num_experts,).
    """
    row = tl.program_id(0).to(tl.int64) * TOP_K
    slots = tl.arange(0, BLOCK)
    in_row = slots < TOP_K
    loaded = tl.load(ids + row + slots, mask=in_row, other=-1).to(tl.int64)
    checked = _without_ids_out_of_range(loaded, num_experts, found, flag)
    sorted_ids, sorted_from = sorted_slots(checked, slots, in_row, num_experts, BLOCK, KEY)
    tl.store(checked_ids + row + slots, sorted_ids, mask=in_row)
    positions = row + sorted_from
    tl.store(order + row + slots, positions.to(order.dtype.element_ty), mask=in_row)
    if HAS_COUNTS:
        # Each thread reads what its neighbour wrote.
        tl.debug_barrier()
        before = tl.load(checked_ids + row + slots - 1, mask=in_row & (slots > 0), other=-1)
        first = in_row & (sorted_ids >= 0) & (sorted_ids != before)
        # Integer sums: exact in any order.
        tl.atomic_add(num_tokens + sorted_ids, 1, mask=first, sem="relaxed")


@triton.jit
def check_offsets_kernel(
    offsets, checked_offsets, found, flag, num_rows, num_pairs, BLOCK: tl.constexpr
):
    """Check row offsets and clamp them to [0, num_pairs]; grid (blocks of offsets,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = rows <= num_rows
    begin = tl.load(offsets + rows, mask=in_block, other=0).to(tl.int64)
    # The last offset has no successor and is compared with itself.
    end = tl.load(offsets + tl.minimum(rows + 1, num_rows), mask=in_block, other=0).to(tl.int64)
    wrong = (begin < 0) | (end < begin) | (end > num_pairs)
    wrong |= (rows == 0) & (begin != 0)
    wrong |= (rows == num_rows) & (begin != num_pairs)
    if tl.max((wrong & in_block).to(tl.int32), 0) > 0:
        tl.store(found + 3, num_pairs)
        tl.store(flag, 1)
    begin = tl.minimum(tl.maximum(begin, 0), num_pairs)
    tl.store(checked_offsets + rows, begin, mask=in_block)
