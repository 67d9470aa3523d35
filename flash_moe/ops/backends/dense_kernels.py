"""Triton kernels between pairs and a (T, CHUNK) matrix of tokens and a range of experts.

    row_offsets   (T+1,)  pairs of token t are row_offsets[t]:row_offsets[t+1]; where SLOTS > 0,
                          SLOTS*t:SLOTS*(t+1) instead
    expert_ids    (N,)    ascending within each token; -1 marks an empty slot

The matrix holds experts chunk_begin to chunk_begin + CHUNK. grid (T,).
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _row_range(token, row_offsets, SLOTS: tl.constexpr):
    if SLOTS > 0:
        return token * SLOTS, token * SLOTS + SLOTS
    return tl.load(row_offsets + token).to(tl.int64), tl.load(row_offsets + token + 1).to(tl.int64)


@triton.jit
def read_pairs_kernel(
    matrix,
    row_offsets,
    expert_ids,
    out,
    chunk_begin,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = matrix[token of n, expert of n]; 0 for an empty slot, with the first chunk."""
    token = tl.program_id(0).to(tl.int64)
    begin, end = _row_range(token, row_offsets, SLOTS)
    for block_begin in range(begin, end, BLOCK):
        pairs = block_begin + tl.arange(0, BLOCK)
        in_block = pairs < end
        ids = tl.load(expert_ids + pairs, mask=in_block, other=-1)
        column = ids - chunk_begin
        here = (ids >= 0) & (column >= 0) & (column < CHUNK)
        value = tl.load(matrix + token * CHUNK + column, mask=here, other=0.0)
        tl.store(out + pairs, value, mask=here | (in_block & (ids < 0) & (chunk_begin == 0)))


@triton.jit
def _add_within_run(value, starts, next_value, next_starts):
    return tl.where(next_starts != 0, next_value, value + next_value), starts | next_starts


@triton.jit
def _zero_until(row, column, until, CHUNK: tl.constexpr, BLOCK_ZEROS: tl.constexpr, dtype):
    """Zeros from `column`, a multiple of BLOCK_ZEROS, to the next one at or past `until`."""
    for begin in range(column, until, BLOCK_ZEROS):
        columns = begin + tl.arange(0, BLOCK_ZEROS)
        tl.store(row + columns, tl.zeros([BLOCK_ZEROS], dtype=dtype), mask=columns < CHUNK)
    return tl.maximum(column, tl.cdiv(until, BLOCK_ZEROS) * BLOCK_ZEROS)


@triton.jit
def fill_matrix_kernel(
    values,
    row_offsets,
    expert_ids,
    matrix,
    chunk_begin,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ZEROS: tl.constexpr,
):
    """matrix[t, e] = sum of the values of token t's pairs with expert e, 0 where there are none."""
    token = tl.program_id(0).to(tl.int64)
    dtype = matrix.dtype.element_ty
    row = matrix + token * CHUNK
    begin, end = _row_range(token, row_offsets, SLOTS)
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
        total, started = tl.associative_scan((value, starts), 0, _add_within_run)
        total += tl.where(started == 0, carried, 0.0)
        carried = tl.sum(tl.where(pairs == block_begin + BLOCK - 1, total, 0.0), 0)
        column = ids - chunk_begin
        # Zeros just before the values among them: both meet in cache.
        until = tl.minimum(tl.max(column, 0) + 1, CHUNK)
        zeroed = _zero_until(row, zeroed, until, CHUNK, BLOCK_ZEROS, dtype)
        # What one thread set to zero, another writes again.
        tl.debug_barrier()
        # The last pair of each run of one expert stores the sum of the run.
        last = in_block & (ids != after) & (ids >= 0) & (column >= 0) & (column < CHUNK)
        tl.store(row + column, total.to(dtype), mask=last)
    _zero_until(row, zeroed, CHUNK, CHUNK, BLOCK_ZEROS, dtype)
