"""Triton kernels that compute the pairs of hot experts by matrix products.

Tables are read through `experts`, the expert of each hot index (see `flash_moe.ops.hot_experts`).
A launch covers up to WIDTH hot indices from `index_begin` on, for which `matrix` (T, WIDTH) holds
the values of all pairs, and zeros elsewhere. The number of hot experts is known on the device only:
programs stop there. Products are summed in float32 in a fixed order.
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import add_within_run


@triton.jit
def _bits_set(bitmaps):
    """Number of set bits of 32-bit numbers."""
    bitmaps = bitmaps - ((bitmaps >> 1) & 0x55555555)
    bitmaps = (bitmaps & 0x33333333) + ((bitmaps >> 2) & 0x33333333)
    bitmaps = (bitmaps + (bitmaps >> 4)) & 0x0F0F0F0F
    return (bitmaps * 0x01010101) >> 24


@triton.jit
def _bits_and_position(bitmaps):
    """Bitmaps (lower half), and the first of the positions whose sum is the upper half."""
    bits = bitmaps.to(tl.uint32)
    count = _bits_set(bits).to(tl.int32)
    total = (bitmaps >> 32).to(tl.int32)
    return bits, (total - count * (count - 1) // 2) // tl.maximum(count, 1)


@triton.jit
def hot_sddmm_kernel(
    rows,
    table,
    experts,
    num_hot,
    bitmaps,
    out,
    rows_stride,
    table_stride,
    num_tokens,
    num_bitmaps,
    top_k,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Store out[n] = <rows[token of n], table[expert of n]> for the first pair of each hot expert.

    Computes all products of a block of tokens and a block of hot experts in registers, and stores
    those that belong to pairs. Programs stride over the blocks; grid (programs,).
    """
    blocks_of_tokens = tl.cdiv(num_tokens, BLOCK_TOKENS)
    hot_count = tl.load(num_hot)
    num_blocks = blocks_of_tokens * tl.cdiv(hot_count, BLOCK_EXPERTS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        tokens = (block % blocks_of_tokens) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        first_index = (block // blocks_of_tokens) * BLOCK_EXPERTS
        indices = first_index + tl.arange(0, BLOCK_EXPERTS)
        ids = tl.load(experts + indices, mask=indices < hot_count, other=0).to(tl.int64)
        # Rows read in place of tokens past the end are never stored.
        read_tokens = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
        hidden = tl.arange(0, BLOCK_HIDDEN)
        row_pointers = rows + read_tokens[:, None] * rows_stride + hidden[None, :]
        table_pointers = table + ids[None, :] * table_stride + hidden[:, None]
        products = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], dtype=tl.float32)
        for begin in range(0, HIDDEN_SIZE, BLOCK_HIDDEN):
            if HIDDEN_SIZE % BLOCK_HIDDEN != 0:
                inside = begin + hidden < HIDDEN_SIZE
                row = tl.load(row_pointers + begin, mask=inside[None, :], other=0.0)
                expert = tl.load(table_pointers + begin, mask=inside[:, None], other=0.0)
            else:
                row = tl.load(row_pointers + begin)
                expert = tl.load(table_pointers + begin)
            products = tl.dot(row, expert, products)
        bitmap = first_index // 32 + tl.arange(0, BLOCK_EXPERTS // 32)
        valid = (tokens < num_tokens)[:, None] & (bitmap < num_bitmaps)[None, :]
        pointers = bitmaps + read_tokens[:, None] * num_bitmaps + bitmap[None, :]
        bits, position = _bits_and_position(tl.load(pointers, mask=valid, other=0))
        first = out + read_tokens[:, None] * top_k + position
        bit = tl.arange(0, 32).to(tl.uint32)[None, None, :]
        bits = tl.expand_dims(bits, 2)
        one = tl.full([1, 1, 1], 1, tl.uint32)
        chosen = ((bits >> bit) & one) != 0
        rank = _bits_set(bits & ((one << bit) - one)).to(tl.int32)
        products = tl.reshape(products, [BLOCK_TOKENS, BLOCK_EXPERTS // 32, 32])
        tl.store(tl.expand_dims(first, 2) + rank, products, mask=chosen)


@triton.jit
def _first_positions(index, bitmaps, token, num_bitmaps, mask):
    """Position within the token's row of its first pair with the expert of each hot index."""
    bitmap = tl.load(bitmaps + token * num_bitmaps + index // 32, mask=mask, other=0)
    bits, position = _bits_and_position(bitmap)
    one = tl.full(index.shape, 1, tl.uint32)
    below = (one << (index % 32).to(tl.uint32)) - one
    return position + _bits_set(bits & below).to(tl.int32)


@triton.jit
def copy_repeated_scores_kernel(
    scores, ids, hot_index, bitmaps, pair_counts, num_bitmaps, top_k, BLOCK: tl.constexpr
):
    """Copy the score of a hot expert's first pair to its repeated pairs; store 0 for empty slots.

    grid (T,).
    """
    token = tl.program_id(0).to(tl.int64)
    row = token * top_k
    begin = tl.load(pair_counts + token * 3) + tl.load(pair_counts + token * 3 + 1)
    end = begin + tl.load(pair_counts + token * 3 + 2)
    for block in range(begin, top_k, BLOCK):
        pairs = block + tl.arange(0, BLOCK)
        repeat = pairs < end
        experts = -2 - tl.load(ids + row + pairs, mask=repeat, other=-2)
        index = tl.load(hot_index + experts, mask=repeat, other=0)
        first = _first_positions(index, bitmaps, token, num_bitmaps, repeat)
        copied = tl.load(scores + row + first, mask=repeat, other=0.0)
        tl.store(scores + row + pairs, copied, mask=pairs < top_k)


@triton.jit
def fill_matrix_kernel(
    values,
    ids,
    hot_index,
    bitmaps,
    pair_counts,
    num_hot,
    matrix,
    num_bitmaps,
    index_begin,
    TOP_K: tl.constexpr,
    BLOCK_REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HOT: tl.constexpr,
    BLOCK_BITMAPS: tl.constexpr,
):
    """Fill one token's row of `matrix`, up to the number of hot experts; grid (T, programs).

    The columns that are filled are a multiple of BLOCK_HOT.
    """
    token = tl.program_id(0).to(tl.int64)
    hot_here = tl.minimum(tl.load(num_hot) - index_begin, WIDTH)
    width = tl.cdiv(hot_here, BLOCK_HOT) * BLOCK_HOT
    row = values + token * TOP_K
    target = matrix + token * WIDTH
    bitmap_row = bitmaps + token * num_bitmaps + index_begin // 32
    dtype = matrix.dtype.element_ty
    bit = tl.arange(0, 32).to(tl.uint32)[None, :]
    one = tl.full([1, 1], 1, tl.uint32)
    first_bitmap = tl.program_id(1) * BLOCK_BITMAPS
    step = tl.num_programs(1) * BLOCK_BITMAPS
    for begin in range(first_bitmap, width // 32, step):
        bitmap = begin + tl.arange(0, BLOCK_BITMAPS)
        valid = (bitmap < width // 32) & (index_begin // 32 + bitmap < num_bitmaps)
        bits, first = _bits_and_position(tl.load(bitmap_row + bitmap, mask=valid, other=0))
        bits = bits[:, None]
        chosen = ((bits >> bit) & one) != 0
        position = first[:, None] + _bits_set(bits & ((one << bit) - one)).to(tl.int32)
        value = tl.load(row + position, mask=chosen, other=0.0)
        column = bitmap[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(target + column, value.to(dtype), mask=column < width)
    begin = tl.load(pair_counts + token * 3) + tl.load(pair_counts + token * 3 + 1)
    num_repeats = tl.load(pair_counts + token * 3 + 2)
    if num_repeats > 0:
        # One thread overwrites what another has written.
        tl.debug_barrier()
        carried = tl.zeros([], dtype=values.dtype.element_ty)
        coded_row = ids + token * TOP_K + begin
        for block in range(0, num_repeats, BLOCK_REPEATS):
            repeats = block + tl.arange(0, BLOCK_REPEATS)
            inside = repeats < num_repeats
            coded = tl.load(coded_row + repeats, mask=inside, other=0)
            before = tl.load(coded_row + repeats - 1, mask=inside & (repeats > 0), other=0)
            after = tl.load(coded_row + repeats + 1, mask=repeats + 1 < num_repeats, other=0)
            value = tl.load(row + begin + repeats, mask=inside, other=0.0)
            starts = (coded != before).to(tl.int32)
            total, started = tl.associative_scan((value, starts), 0, add_within_run)
            total += tl.where(started == 0, carried, 0.0)
            carried = tl.sum(tl.where(repeats == block + BLOCK_REPEATS - 1, total, 0.0), 0)
            # The last pair of each run stores its sum, with the value of the pair that it repeats.
            last = inside & (coded != after)
            index = tl.load(hot_index + (-2 - coded), mask=last, other=-1)
            first = _first_positions(index, bitmaps, token, num_bitmaps, last)
            total += tl.load(row + first, mask=last, other=0.0)
            column = index - index_begin
            # Each program of the token stores to the columns that it has filled.
            mine = (column // 32 // BLOCK_BITMAPS) % tl.num_programs(1) == tl.program_id(1)
            mine = mine & last & (column >= 0) & (column < WIDTH)
            tl.store(target + column, total.to(dtype), mask=mine)


@triton.jit
def hot_spmm_kernel(
    matrix,
    table,
    experts,
    num_hot,
    out,
    table_stride,
    num_tokens,
    index_begin,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Compute out (SPLITS, T, H) = matrix @ table, over splits of the hot experts.

    Later launches (index_begin > 0) add to what is there.
    grid (blocks of tokens, blocks of HIDDEN_SIZE, SPLITS).
    """
    hot_here = tl.minimum(tl.load(num_hot) - index_begin, WIDTH)
    if hot_here > 0:
        split = tl.program_id(2)
        length = tl.cdiv(hot_here, SPLITS * BLOCK_EXPERTS) * BLOCK_EXPERTS
        begin = split * length
        end = tl.minimum(begin + length, hot_here)
        tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        offsets = (tokens.to(tl.int64) + split * num_tokens) * HIDDEN_SIZE
        out_pointers = out + offsets[:, None] + hidden[None, :]
        inside = (tokens < num_tokens)[:, None] & (hidden < HIDDEN_SIZE)[None, :]
        if index_begin > 0:
            total = tl.load(out_pointers, mask=inside, other=0.0)
        else:
            total = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], dtype=tl.float32)
        read_tokens = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
        matrix_pointers = matrix + read_tokens[:, None] * WIDTH
        for block in range(begin, end, BLOCK_EXPERTS):
            indices = block + tl.arange(0, BLOCK_EXPERTS)
            valid = indices < hot_here
            ids = tl.load(experts + index_begin + indices, mask=valid, other=0).to(tl.int64)
            values = tl.load(matrix_pointers + indices[None, :])
            mask = valid[:, None]
            if HIDDEN_SIZE % BLOCK_HIDDEN != 0:
                mask = mask & (hidden < HIDDEN_SIZE)[None, :]
            pointers = table + ids[:, None] * table_stride + hidden[None, :]
            total = tl.dot(values, tl.load(pointers, mask=mask, other=0.0), total)
        tl.store(out_pointers, total, mask=inside)


@triton.jit
def hot_spmm_t_kernel(
    matrix,
    rows,
    experts,
    num_hot,
    out,
    rows_stride,
    num_tokens,
    index_begin,
    scale,
    WIDTH: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Store out[experts] = scale * matrix.T @ rows.

    Programs stride over blocks of experts and hidden size; grid (programs,).
    """
    hot_here = tl.minimum(tl.load(num_hot) - index_begin, WIDTH)
    blocks_of_hidden = tl.cdiv(HIDDEN_SIZE, BLOCK_HIDDEN)
    num_blocks = blocks_of_hidden * tl.cdiv(hot_here, BLOCK_EXPERTS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        hidden = (block % blocks_of_hidden) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        indices = (block // blocks_of_hidden) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
        total = tl.zeros([BLOCK_EXPERTS, BLOCK_HIDDEN], dtype=tl.float32)
        for begin in range(0, num_tokens, BLOCK_TOKENS):
            tokens = begin + tl.arange(0, BLOCK_TOKENS)
            valid = tokens < num_tokens
            tokens = tokens.to(tl.int64)
            values = tl.load(
                matrix + tokens[None, :] * WIDTH + indices[:, None], mask=valid[None, :], other=0.0
            )
            mask = valid[:, None]
            if HIDDEN_SIZE % BLOCK_HIDDEN != 0:
                mask = mask & (hidden < HIDDEN_SIZE)[None, :]
            pointers = rows + tokens[:, None] * rows_stride + hidden[None, :]
            total = tl.dot(values, tl.load(pointers, mask=mask, other=0.0), total)
        in_range = indices < hot_here
        ids = tl.load(experts + index_begin + indices, mask=in_range, other=0).to(tl.int64)
        tl.store(
            out + ids[:, None] * HIDDEN_SIZE + hidden[None, :],
            (total * scale).to(out.dtype.element_ty),
            mask=in_range[:, None] & (hidden < HIDDEN_SIZE)[None, :],
        )
