"""Triton kernels that check a pair pattern and bring it into the order the backends want.

ids              (N,) or (T, SLOTS), int32 or int64, any values
arranged_ids     the same shape, int32 in [-1, num_experts): an id out of range becomes -1
found (4,)       int64 on the device: least and greatest id out of range, the number of
                 experts then, and the number of pairs that bad row offsets went with
flag (1,)        int32 in memory that the host reads too: set when `found` was written
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
def check_ids_kernel(ids, arranged_ids, found, flag, num_ids, num_experts, BLOCK: tl.constexpr):
    """Checked ids in the order they came; grid (blocks of ids,)."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = positions < num_ids
    loaded = tl.load(ids + positions, mask=in_block, other=-1).to(tl.int64)
    checked = _without_ids_out_of_range(loaded, num_experts, found, flag)
    tl.store(arranged_ids + positions, checked.to(tl.int32), mask=in_block)


@triton.jit
def sorted_slots(ids, slots, in_row, num_experts, BLOCK: tl.constexpr, KEY: tl.constexpr):
    """Ids (BLOCK,) in [-1, num_experts) in ascending order, int32, and the slots they came from.

    An id and its slot are sorted as one number of type KEY, so that equal ids keep their order.
    """
    # Places past the row sort behind every id; added in 64 bits, which num_experts may not have.
    past = tl.zeros_like(ids) + num_experts + 1
    keys = tl.sort((tl.where(in_row, ids + 1, past) * BLOCK + slots).to(KEY))
    return (keys // BLOCK - 1).to(tl.int32), (keys % BLOCK).to(tl.int64)


@triton.jit
def sort_slots_kernel(
    ids,
    arranged_ids,
    order,
    num_tokens,
    found,
    flag,
    num_experts,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Checked ids sorted within each token, and the position each came from; grid (T,).

    If HAS_COUNTS, num_tokens (num_experts,) is raised by one for each expert of the token.
    """
    row = tl.program_id(0).to(tl.int64) * SLOTS
    slots = tl.arange(0, BLOCK)
    in_row = slots < SLOTS
    loaded = tl.load(ids + row + slots, mask=in_row, other=-1).to(tl.int64)
    checked = _without_ids_out_of_range(loaded, num_experts, found, flag)
    sorted_ids, sorted_from = sorted_slots(checked, slots, in_row, num_experts, BLOCK, KEY)
    tl.store(arranged_ids + row + slots, sorted_ids, mask=in_row)
    positions = row + sorted_from
    tl.store(order + row + slots, positions.to(order.dtype.element_ty), mask=in_row)
    if HAS_COUNTS:
        # What one thread wrote, its neighbour reads.
        tl.debug_barrier()
        before = tl.load(arranged_ids + row + slots - 1, mask=in_row & (slots > 0), other=-1)
        first = in_row & (sorted_ids >= 0) & (sorted_ids != before)
        # One atomic for an expert and a token, in whole numbers: any order gives the same.
        tl.atomic_add(num_tokens + sorted_ids, 1, mask=first, sem="relaxed")


@triton.jit
def check_offsets_kernel(
    offsets, arranged_offsets, found, flag, num_rows, num_pairs, BLOCK: tl.constexpr
):
    """Row offsets as int64 in [0, num_pairs]; grid (blocks of num_rows + 1 offsets,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_block = rows <= num_rows
    begin = tl.load(offsets + rows, mask=in_block, other=0).to(tl.int64)
    # The end of the last row but one past it stands for itself.
    end = tl.load(offsets + tl.minimum(rows + 1, num_rows), mask=in_block, other=0).to(tl.int64)
    wrong = (begin < 0) | (end < begin) | (end > num_pairs)
    wrong |= (rows == 0) & (begin != 0)
    wrong |= (rows == num_rows) & (begin != num_pairs)
    if tl.max((wrong & in_block).to(tl.int32), 0) > 0:
        tl.store(found + 3, num_pairs)
        tl.store(flag, 1)
    begin = tl.minimum(tl.maximum(begin, 0), num_pairs)
    tl.store(arranged_offsets + rows, begin, mask=in_block)
