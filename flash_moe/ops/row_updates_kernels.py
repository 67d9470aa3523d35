"""Triton kernels that sum a table's gradient row by row in registers, and use each sum at once.

One program serves one expert with a whole row (the experts of more than SPLIT pairs: several, and a
second kernel). The `row_squares` kernels store the squared norm of each gradient row, the
`row_update` kernels update each touched row and its optimizer state. Arguments that belong together
are tuples:

    pairs     (values, rows, rows_stride, expert_ids, tokens_by_expert, expert_order,
              expert_offsets, num_pairs): see `gather_kernels`
    state     (table, table_stride, low_bits, first, second, touches)
    numbers   (lr, weight_decay, eps, max_row_norm, first_gain, second_gain, log_first_beta,
              log_second_beta, first_row, seed_bits)

    partial_sums: see `spmm_t_kernel`, of one table
    factor    () float32, on all gradients; or None. No row is updated if it is not finite.
    squares   (E,) float64
    table     (E, H); WEIGHTS 0: float32; 1, 2: the bits of bfloat16, as int16
    low_bits  (E, H) int16, see `split_float`; None unless WEIGHTS is 1
    first     (E, H) float32 or bfloat16, averages of gradients; None unless FIRST
    second    SECOND 1: (E,), 2: (E, H), float32: averages of squares, sums unless FIRST; else None
    touches   (E,) int32, or None
    lr        number, or float32 tensor () if HAS_LR_TENSOR
    max_row_norm: number, or None
    gains     1 - beta
    log_betas natural logarithms
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.gather_kernels import (
    add_partial_sums_of_expert,
    store_partial_sums,
    token_sums,
)
from flash_moe.ops.backends.kernel_utils import store_rounded

# Constants of SplitMix64, as in `flash_moe.optim.stochastic_rounding`.
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(numbers):
    """Mix the bits of uint64 numbers."""
    numbers = (numbers ^ (numbers >> 30)) * tl.full([], MIX_FIRST, tl.uint64)
    numbers = (numbers ^ (numbers >> 27)) * tl.full([], MIX_SECOND, tl.uint64)
    return numbers ^ (numbers >> 31)


@triton.jit
def _round_stochastically(values, row, touches, columns, seed_bits):
    """Round float32 values at random, to the bits of bfloat16; see `round_stochastically`."""
    golden = tl.full([], GOLDEN, tl.uint64)
    start = tl.cast(seed_bits, tl.int64).to(tl.uint64, bitcast=True)
    key = _mix(_mix(row.to(tl.uint64) + start) + touches.to(tl.uint64) * golden)
    noise = (_mix(key + columns.to(tl.uint64) * golden) & 0xFFFF).to(tl.int32)
    bits = values.to(tl.int32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    # A NaN stays one though its lower bits go.
    exact = tl.where(values == values, bits, bits | 0x400000)
    return (tl.where(is_finite, bits + noise, exact) >> 16).to(tl.int16)


@triton.jit
def _expert_of_split(split, pairs, SPLIT: tl.constexpr):
    """Find the expert whose pairs, more than SPLIT, begin in this split, and their bounds."""
    _, _, _, expert_ids, _, expert_order, expert_offsets, num_pairs = pairs
    split_begin = split * SPLIT
    split_end = tl.minimum(split_begin + SPLIT, num_pairs)
    expert = tl.load(expert_ids + tl.load(expert_order + split_end - 1)).to(tl.int64)
    begin = tl.load(expert_offsets + expert, mask=expert >= 0, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=expert >= 0, other=0)
    is_long = (expert >= 0) & (begin >= split_begin) & (end - begin > SPLIT)
    return tl.where(is_long, expert, -1), begin, end


@triton.jit
def _bounds(expert, pairs):
    """Load where an expert's pairs begin and end in the order by expert."""
    _, _, _, _, _, _, expert_offsets, _ = pairs
    return tl.load(expert_offsets + expert), tl.load(expert_offsets + expert + 1)


@triton.jit
def _sum_row(begin, end, pairs, columns, HIDDEN_SIZE: tl.constexpr, TOP_K: tl.constexpr):
    """Sum the pairs from begin to end in the order by expert."""
    values, rows, stride, _, tokens_by_expert, expert_order, _, _ = pairs
    in_row = columns < HIDDEN_SIZE
    zeros = tl.zeros(columns.shape, tl.float32)
    total, _ = token_sums(
        begin,
        end,
        expert_order,
        tokens_by_expert,
        values,
        rows,
        stride,
        values,
        rows,
        stride,
        columns,
        in_row,
        zeros,
        zeros,
        TOP_K,
        1,
    )
    return total


@triton.jit
def _sum_split(
    split,
    pairs,
    partial_sums,
    columns,
    HIDDEN_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store the partial sums of a split."""
    values, rows, stride, expert_ids, tokens_by_expert, order, offsets, num_pairs = pairs
    store_partial_sums(
        split,
        values,
        rows,
        stride,
        values,
        rows,
        stride,
        partial_sums,
        expert_ids,
        tokens_by_expert,
        order,
        offsets,
        num_pairs,
        columns,
        columns < HIDDEN_SIZE,
        tl.zeros(columns.shape, tl.float32),
        TOP_K,
        HIDDEN_SIZE,
        SPLIT,
        1,
    )


@triton.jit
def row_squares_kernel(
    partial_sums,
    pairs,
    num_splits,
    squares,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store squared norms of the experts of up to SPLIT pairs, and partial sums of the others.

    grid (num_splits + experts,).
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HIDDEN)
    if program >= num_splits:
        expert = program - num_splits
        begin, end = _bounds(expert, pairs)
        if end - begin <= SPLIT:
            grads = _sum_row(begin, end, pairs, columns, HIDDEN_SIZE, TOP_K)
            wide = grads.to(tl.float64)
            tl.store(squares + expert, tl.sum(wide * wide, 0))
    else:
        _sum_split(program, pairs, partial_sums, columns, HIDDEN_SIZE, TOP_K, SPLIT)


@triton.jit
def row_squares_splits_kernel(
    partial_sums,
    pairs,
    squares,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Store squared norms of the experts of more than SPLIT pairs; grid (splits,)."""
    split = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HIDDEN)
    expert, begin, end = _expert_of_split(split, pairs, SPLIT)
    if expert >= 0:
        grads = add_partial_sums_of_expert(
            partial_sums,
            split,
            begin,
            end,
            0,
            columns,
            columns < HIDDEN_SIZE,
            HIDDEN_SIZE,
            BLOCK_SPLITS,
            SPLIT,
            1,
        )
        wide = grads.to(tl.float64)
        tl.store(squares + expert, tl.sum(wide * wide, 0))


@triton.jit
def _load_row(
    expert,
    columns,
    state,
    HIDDEN_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_TOUCHES: tl.constexpr,
):
    """Load an expert's weights, averages, squares and touches; zeros for those not kept."""
    table, table_stride, low_bits, first, second, touches = state
    in_row = columns < HIDDEN_SIZE
    elements = expert * HIDDEN_SIZE + columns
    average = tl.zeros(columns.shape, tl.float32)
    variance = average
    weights = tl.load(table + expert * table_stride + columns, mask=in_row, other=0)
    if WEIGHTS > 0:
        bits = weights.to(tl.int32) << 16
        if WEIGHTS == 1:
            bits += tl.load(low_bits + elements, mask=in_row, other=0).to(tl.int32)
        weights = bits.to(tl.float32, bitcast=True)
    if FIRST:
        average = tl.load(first + elements, mask=in_row, other=0.0).to(tl.float32)
    if SECOND == 1:
        variance += tl.load(second + expert)
    if SECOND == 2:
        variance = tl.load(second + elements, mask=in_row, other=0.0)
    touched = tl.full([], 0, tl.int32)
    if HAS_TOUCHES:
        # Here, so that a barrier lies between this and the store of one thread.
        touched = tl.load(touches + expert)
    return weights, average, variance, touched


@triton.jit
def _update_row(
    grads,
    loaded,
    expert,
    columns,
    state,
    numbers,
    HIDDEN_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_TOUCHES: tl.constexpr,
    HAS_LR_TENSOR: tl.constexpr,
):
    """Store a row's new weights and state: the formulas of `flash_moe.optim.table_optimizers`.

    Stores nothing if its gradient is not finite.
    """
    table, table_stride, low_bits, first, second, touches = state
    lr, decay, eps, max_norm, first_gain, second_gain, log_first, log_second, first_row, seed = (
        numbers
    )
    weights, average, variance, touched = loaded
    in_row = columns < HIDDEN_SIZE
    elements = expert * HIDDEN_SIZE + columns
    squared_norm = tl.sum(grads * grads, 0)
    if squared_norm < float("inf"):
        if HAS_LR_TENSOR:
            lr = tl.load(lr).to(tl.float32)
        if HAS_TOUCHES:
            tl.store(touches + expert, touched + 1)
        if max_norm is not None:
            shrink = tl.minimum(max_norm / (tl.sqrt_rn(squared_norm) + 1e-6), 1.0)
            grads *= shrink
            squared_norm *= shrink * shrink
        step = grads
        if SECOND > 0:
            if SECOND == 1:
                new_squares = tl.zeros(columns.shape, tl.float32) + squared_norm / HIDDEN_SIZE
            else:
                new_squares = grads * grads
            if FIRST:
                variance += second_gain * (new_squares - variance)
            else:
                variance += new_squares
            if SECOND == 1:
                # All elements are the same number.
                tl.store(second + expert, tl.max(variance, 0))
            else:
                tl.store(second + elements, variance, mask=in_row)
            corrected = variance
            if FIRST:
                average += first_gain * (grads - average)
                store_rounded(first + elements, average, in_row)
                # In float64, as 1 - beta^t cancels.
                times = (touched + 1).to(tl.float64)
                step = average / (1 - tl.exp(times * log_first)).to(tl.float32)
                corrected = variance / (1 - tl.exp(times * log_second)).to(tl.float32)
            step = step / (tl.sqrt_rn(corrected) + eps)
        weights -= lr * (step + decay * weights)
        stored = table + expert * table_stride + columns
        if WEIGHTS == 0:
            tl.store(stored, weights, mask=in_row)
        elif WEIGHTS == 1:
            bits = weights.to(tl.int32, bitcast=True)
            low = (bits << 16) >> 16
            tl.store(stored, ((bits - low) >> 16).to(tl.int16), mask=in_row)
            tl.store(low_bits + elements, low.to(tl.int16), mask=in_row)
        else:
            row = expert + first_row
            rounded = _round_stochastically(weights, row, touched, columns, seed)
            tl.store(stored, rounded, mask=in_row)


@triton.jit
def row_update_kernel(
    partial_sums,
    pairs,
    num_splits,
    factor,
    state,
    numbers,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_TOUCHES: tl.constexpr,
    HAS_LR_TENSOR: tl.constexpr,
):
    """Update the experts of up to SPLIT pairs, and store partial sums of the others.

    grid (num_splits + experts,).
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HIDDEN)
    scale = tl.full([], 1.0, tl.float32)
    if factor is not None:
        scale = tl.load(factor)
    if program >= num_splits:
        expert = program - num_splits
        begin, end = _bounds(expert, pairs)
        if (begin < end) & (end - begin <= SPLIT) & (tl.abs(scale) < float("inf")):
            # Before the sum, so that both wait for memory at once.
            loaded = _load_row(
                expert, columns, state, HIDDEN_SIZE, FIRST, SECOND, WEIGHTS, HAS_TOUCHES
            )
            grads = scale * _sum_row(begin, end, pairs, columns, HIDDEN_SIZE, TOP_K)
            _update_row(
                grads,
                loaded,
                expert,
                columns,
                state,
                numbers,
                HIDDEN_SIZE,
                FIRST,
                SECOND,
                WEIGHTS,
                HAS_TOUCHES,
                HAS_LR_TENSOR,
            )
    else:
        _sum_split(program, pairs, partial_sums, columns, HIDDEN_SIZE, TOP_K, SPLIT)


@triton.jit
def row_update_splits_kernel(
    partial_sums,
    pairs,
    factor,
    state,
    numbers,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HAS_TOUCHES: tl.constexpr,
    HAS_LR_TENSOR: tl.constexpr,
):
    """Update the experts of more than SPLIT pairs; grid (splits,)."""
    split = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_HIDDEN)
    scale = tl.full([], 1.0, tl.float32)
    if factor is not None:
        scale = tl.load(factor)
    expert, begin, end = _expert_of_split(split, pairs, SPLIT)
    if (expert >= 0) & (tl.abs(scale) < float("inf")):
        loaded = _load_row(expert, columns, state, HIDDEN_SIZE, FIRST, SECOND, WEIGHTS, HAS_TOUCHES)
        grads = scale * add_partial_sums_of_expert(
            partial_sums,
            split,
            begin,
            end,
            0,
            columns,
            columns < HIDDEN_SIZE,
            HIDDEN_SIZE,
            BLOCK_SPLITS,
            SPLIT,
            1,
        )
        _update_row(
            grads,
            loaded,
            expert,
            columns,
            state,
            numbers,
            HIDDEN_SIZE,
            FIRST,
            SECOND,
            WEIGHTS,
            HAS_TOUCHES,
            HAS_LR_TENSOR,
        )
