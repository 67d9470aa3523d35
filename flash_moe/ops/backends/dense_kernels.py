"""Triton kernels that read and fill a (T, RANGE) matrix of tokens and a range of experts.

    row_offsets   (T+1,)  pairs of token t are row_offsets[t]:row_offsets[t+1]; where TOP_K > 0,
                          TOP_K*t:TOP_K*(t+1) instead
    expert_ids    (N,)    ascending within each token; -1 marks an empty slot

The matrix holds experts range_begin to range_begin + RANGE. grid (T,).
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import add_within_run, row_range


@triton.jit
def read_pairs_kernel(
    matrix,
    row_offsets,
    expert_ids,
    out,
    range_begin,
    RANGE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store out[n] = matrix[token of n, expert of n]; the first range stores 0 for empty slots."""
    token = tl.program_id(0).to(tl.int64)
    begin, end = row_range(token, row_offsets, row_offsets, TOP_K, False)
    for block_begin in range(begin, end, BLOCK):
        pairs = block_begin + tl.arange(0, BLOCK)
        in_block = pairs < end
        ids = tl.load(expert_ids + pairs, mask=in_block, other=-1)
        column = ids - range_begin
        here = (ids >= 0) & (column >= 0) & (column < RANGE)
        value = tl.load(matrix + token * RANGE + column, mask=here, other=0.0)
        tl.store(out + pairs, value, mask=here | (in_block & (ids < 0) & (range_begin == 0)))


@triton.jit
def _zero_until(row, column, until, RANGE: tl.constexpr, BLOCK_ZEROS: tl.constexpr, dtype):
    """Store zeros from `column`, a multiple of BLOCK_ZEROS, to `until` rounded up to a multiple.

    Returns the column where the zeros end.
    """
    for begin in range(column, until, BLOCK_ZEROS):
        columns = begin + tl.arange(0, BLOCK_ZEROS)
        tl.store(row + columns, tl.zeros([BLOCK_ZEROS], dtype=dtype), mask=columns < RANGE)
    return tl.maximum(column, tl.cdiv(until, BLOCK_ZEROS) * BLOCK_ZEROS)


@triton.jit
def fill_matrix_kernel(
    values,
    row_offsets,
    expert_ids,
    matrix,
    range_begin,
    RANGE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ZEROS: tl.constexpr,
):
    """Store matrix[t, e], the sum of the values of token t's pairs with expert e."""
    token = tl.program_id(0).to(tl.int64)
    dtype = matrix.dtype.element_ty
    row = matrix + token * RANGE
    begin, end = row_range(token, row_offsets, row_offsets, TOP_K, False)
    carried = tl.zeros([], dtype=values.dtype.element_ty)
    zeroed = 0
    for block_begin in range(begin, end, BLOCK):
        pairs = block_begin + tl.arange(0, BLOCK)
        in_block = pairs < end
        ids = tl.load(expert_ids + pairs, mask=in_block, other=-1)
        before = tl.load(expert_ids + pairs - 1, mask=in_block & (pairs > begin), other=-2)
        after = tl.load(expert_ids + pairs + 1, mask=pairs + 1 < end, other=-2)
        value = tl.load(values + pairs, mask=in_block & (ids >= 0), other=0.0)
        starts = (ids != before).to(tl.int32)
        total, started = tl.associative_scan((value, starts), 0, add_within_run)
        total += tl.where(started == 0, carried, 0.0)
        carried = tl.sum(tl.where(pairs == block_begin + BLOCK - 1, total, 0.0), 0)
        column = ids - range_begin
        # Zeros are stored just before the values among them, so that both meet in cache.
        until = tl.minimum(tl.max(column, 0) + 1, RANGE)
        zeroed = _zero_until(row, zeroed, until, RANGE, BLOCK_ZEROS, dtype)
        # One thread overwrites what another has set to zero.
        tl.debug_barrier()
        # The last pair of each run of one expert stores the sum of the run.
        last = in_block & (ids != after) & (ids >= 0) & (column >= 0) & (column < RANGE)
        tl.store(row + column, total.to(dtype), mask=last)
    _zero_until(row, zeroed, RANGE, RANGE, BLOCK_ZEROS, dtype)
