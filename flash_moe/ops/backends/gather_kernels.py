"""Triton kernels that gather table rows.

One program serves one output row, or one block of one token's pairs; sums stay in registers
and run in a fixed order, so results are bitwise repeatable. Every index that meets a stride
is 64 bits wide.

    rows, table, out    (rows, HIDDEN_SIZE), last dimension contiguous, any row stride
    offsets             (rows + 1,)   pairs of an output row are offsets[i]:offsets[i+1]
    ids                 (N,)          which table row a pair reads; negative: none
    order               (N,)          where the i-th pair stands in ids and values
"""

import triton
import triton.language as tl


@triton.jit
def sddmm_kernel(
    rows,
    table,
    row_offsets,
    expert_ids,
    out,
    rows_stride,
    table_stride,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PAIRS_PER_PROGRAM: tl.constexpr,
):
    """out[n] = <rows[token of n], table[expert_ids[n]]>; grid (tokens, blocks of its pairs)."""
    token = tl.program_id(0).to(tl.int64)
    row_begin = tl.load(row_offsets + token).to(tl.int64)
    row_end = tl.load(row_offsets + token + 1).to(tl.int64)
    first = row_begin + tl.program_id(1).to(tl.int64) * PAIRS_PER_PROGRAM
    step = tl.num_programs(1).to(tl.int64) * PAIRS_PER_PROGRAM
    for program_begin in range(first, row_end, step):
        program_end = tl.minimum(program_begin + PAIRS_PER_PROGRAM, row_end)
        for block_begin in range(program_begin, program_end, BLOCK_PAIRS):
            pairs = block_begin + tl.arange(0, BLOCK_PAIRS)
            in_block = pairs < program_end
            ids = tl.load(expert_ids + pairs, mask=in_block, other=-1).to(tl.int64)
            products = tl.zeros([BLOCK_PAIRS, BLOCK_HIDDEN], dtype=out.dtype.element_ty)
            for hidden_begin in tl.static_range(0, HIDDEN_SIZE, BLOCK_HIDDEN):
                hidden = hidden_begin + tl.arange(0, BLOCK_HIDDEN)
                in_row = hidden < HIDDEN_SIZE
                row = tl.load(rows + token * rows_stride + hidden, mask=in_row, other=0.0)
                experts = tl.load(
                    table + ids[:, None] * table_stride + hidden[None, :],
                    mask=(ids >= 0)[:, None] & in_row[None, :],
                    other=0.0,
                )
                products += experts.to(products.dtype) * row.to(products.dtype)[None, :]
            scores = tl.where(ids >= 0, tl.sum(products, 1), 0.0)
            tl.store(out + pairs, scores, mask=in_block)


@triton.jit
def weighted_row_sum_kernel(
    values,
    table,
    offsets,
    ids,
    order,
    out,
    table_stride,
    HIDDEN_SIZE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """out[i] = sum of values[n] * table[ids[n]] over row i's pairs n; grid (rows, H blocks)."""
    row = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_row = hidden < HIDDEN_SIZE
    begin = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    total = tl.zeros([BLOCK_HIDDEN], dtype=values.dtype.element_ty)
    for block_begin in range(begin, end, BLOCK_PAIRS):
        pairs = block_begin + tl.arange(0, BLOCK_PAIRS)
        in_block = pairs < end
        if HAS_ORDER:
            pairs = tl.load(order + pairs, mask=in_block, other=0).to(tl.int64)
        row_ids = tl.load(ids + pairs, mask=in_block, other=-1).to(tl.int64)
        occupied = row_ids >= 0
        weights = tl.load(values + pairs, mask=occupied, other=0.0)
        gathered = tl.load(
            table + row_ids[:, None] * table_stride + hidden[None, :],
            mask=occupied[:, None] & in_row[None, :],
            other=0.0,
        )
        total += tl.sum(weights[:, None] * gathered.to(total.dtype), 0)
    if out.dtype.element_ty.primitive_bitwidth < 32:
        # From 64 bits in two steps: Triton's interpreter cannot do it in one.
        total = total.to(tl.float32)
    tl.store(out + row * HIDDEN_SIZE + hidden, total.to(out.dtype.element_ty), mask=in_row)
