"""Triton kernels that gather table rows.

One program computes one output row, a split of one, or one block of one token's pairs. Sums stay in
registers and run in a fixed order, so results are bitwise repeatable. Every index that meets a
stride is 64 bits wide.

    rows, table, out    (rows, HIDDEN_SIZE), last dimension contiguous, any row stride
    row_offsets         (T+1,)   pairs of token t are row_offsets[t]:row_offsets[t+1]; where
                                 TOP_K > 0, TOP_K*t:TOP_K*(t+1) instead, and this is not read
    pair_counts         (T, 3)   if HAS_HOT: only the first pair_counts[t, 0] of them are used
    expert_ids          (N,)     -1: empty slot; <= -2: a pair of hot expert -2 - id, which
                                 hot_cold computes
    expert_order        (N,)     pair positions sorted by expert
    tokens_by_expert    (N,)     tokens of the pairs in that order; not read where TOP_K > 0
    expert_offsets      (E+1,)   pairs of expert e are expert_order[offsets[e]:offsets[e+1]]
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import row_range, store_rounded


@triton.jit
def sddmm_kernel(
    rows,
    table,
    row_offsets,
    pair_counts,
    expert_ids,
    out,
    rows_stride,
    table_stride,
    num_pairs,
    TOP_K: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PAIRS_PER_PROGRAM: tl.constexpr,
):
    """Store out[i, n] = <rows[token of n], table[expert_ids[n]]> over the i-th SLICE of a row.

    grid (tokens, blocks of a token's pairs, slices).
    """
    slice_begin = 0
    if SLICE < HIDDEN_SIZE:
        slice_begin = tl.program_id(2) * SLICE
        out += tl.program_id(2).to(tl.int64) * num_pairs
    token = tl.program_id(0).to(tl.int64)
    row_begin, row_end = row_range(token, row_offsets, pair_counts, TOP_K, HAS_HOT)
    length = tl.full([], PAIRS_PER_PROGRAM, tl.int64)
    if HAS_HOT:
        # Equal shares of the cold pairs: concurrent programs then read a narrow part of the table.
        shares = tl.num_programs(1) * BLOCK_PAIRS
        length = tl.maximum(tl.cdiv(row_end - row_begin, shares), 1) * BLOCK_PAIRS
    first = row_begin + tl.program_id(1) * length
    for program_begin in range(first, row_end, tl.num_programs(1) * length):
        program_end = tl.minimum(program_begin + length, row_end)
        for block_begin in range(program_begin, program_end, BLOCK_PAIRS):
            pairs = block_begin + tl.arange(0, BLOCK_PAIRS)
            in_block = pairs < program_end
            ids = tl.load(expert_ids + pairs, mask=in_block, other=-1).to(tl.int64)
            products = tl.zeros([BLOCK_PAIRS, BLOCK_HIDDEN], dtype=out.dtype.element_ty)
            for hidden_begin in tl.static_range(0, SLICE, BLOCK_HIDDEN):
                hidden = slice_begin + hidden_begin + tl.arange(0, BLOCK_HIDDEN)
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
def spmm_kernel(
    values,
    table,
    row_offsets,
    pair_counts,
    expert_ids,
    hot_sums,
    num_hot,
    addends,
    out,
    table_stride,
    TOP_K: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HOT_SPLITS: tl.constexpr,
    NUM_ADDENDS: tl.constexpr,
    OWN_INDEX: tl.constexpr,
):
    """Sum values[n] * table[expert_ids[n]] over a split of a token's pairs.

    If HAS_HOT and there are hot experts, adds hot_sums (HOT_SPLITS, tokens, HIDDEN_SIZE). If
    NUM_ADDENDS > 0, stores the sum over addends (NUM_ADDENDS, tokens, HIDDEN_SIZE), in order, with
    this sum in place of addends[OWN_INDEX]; SPLIT_K is 1 then.
    out (SPLIT_K, tokens, HIDDEN_SIZE); grid (tokens, blocks of HIDDEN_SIZE, SPLIT_K).
    """
    token = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_row = hidden < HIDDEN_SIZE
    begin, end = row_range(token, row_offsets, pair_counts, TOP_K, HAS_HOT)
    if SPLIT_K > 1:
        length = tl.cdiv(end - begin, SPLIT_K * BLOCK_PAIRS) * BLOCK_PAIRS
        begin += tl.program_id(2) * length
        end = tl.minimum(begin + length, end)
    total = tl.zeros([BLOCK_HIDDEN], dtype=values.dtype.element_ty)
    if HAS_HOT:
        # Without hot experts, hot_sums was not written.
        hot_splits = tl.where(tl.load(num_hot) > 0, HOT_SPLITS, 0)
        for split in range(hot_splits):
            row = split * tl.num_programs(0).to(tl.int64) + token
            total += tl.load(hot_sums + row * HIDDEN_SIZE + hidden, mask=in_row, other=0.0)
    for block_begin in range(begin, end, BLOCK_PAIRS):
        pairs = block_begin + tl.arange(0, BLOCK_PAIRS)
        ids = tl.load(expert_ids + pairs, mask=pairs < end, other=-1).to(tl.int64)
        weights = tl.load(values + pairs, mask=ids >= 0, other=0.0)
        experts = tl.load(
            table + ids[:, None] * table_stride + hidden[None, :],
            mask=(ids >= 0)[:, None] & in_row[None, :],
            other=0.0,
        )
        total += tl.sum(weights[:, None] * experts.to(total.dtype), 0)
    if NUM_ADDENDS > 0:
        # Rounded as if it had been stored among the addends.
        own = total.to(addends.dtype.element_ty)
        total = tl.zeros([BLOCK_HIDDEN], dtype=addends.dtype.element_ty)
        for index in tl.static_range(NUM_ADDENDS):
            if index == OWN_INDEX:
                total += own
            else:
                row = tl.cast(index, tl.int64) * tl.num_programs(0) + token
                total += tl.load(addends + row * HIDDEN_SIZE + hidden, mask=in_row, other=0.0)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + token
    store_rounded(out + row * HIDDEN_SIZE + hidden, total, in_row)


@triton.jit
def add_partial_sums_kernel(
    partial_sums, out, num_elements, NUM_PARTIAL_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum partial_sums (NUM_PARTIAL_SUMS, num_elements) over the first dimension, in order.

    out (num_elements,); grid (blocks of elements,).
    """
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < num_elements
    total = tl.zeros([BLOCK], dtype=partial_sums.dtype.element_ty)
    for index in range(NUM_PARTIAL_SUMS):
        begin = tl.cast(index, tl.int64) * num_elements
        total += tl.load(partial_sums + begin + elements, mask=inside, other=0.0)
    store_rounded(out + elements, total, inside)


@triton.jit
def _pair_and_token(expert_order, tokens_by_expert, position, end, TOP_K: tl.constexpr):
    """Load the pair at a position in the order by expert, and its token; 0 from the end on."""
    inside = position < end
    pair = tl.load(expert_order + position, mask=inside, other=0).to(tl.int64)
    if TOP_K > 0:
        token = pair // TOP_K
    else:
        token = tl.load(tokens_by_expert + position, mask=inside, other=0).to(tl.int64)
    return pair, token


@triton.jit
def token_sums(
    begin,
    end,
    expert_order,
    tokens_by_expert,
    values_0,
    rows_0,
    stride_0,
    values_1,
    rows_1,
    stride_1,
    hidden,
    in_row,
    total_0,
    total_1,
    TOP_K: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Add values[n] * rows[token of n] for the pairs from begin to end in the order by expert."""
    pair, token = _pair_and_token(expert_order, tokens_by_expert, begin, end, TOP_K)
    for position in range(begin, end):
        # Loaded one step ahead, since a row's address depends on its token.
        next_pair, next_token = _pair_and_token(
            expert_order, tokens_by_expert, position + 1, end, TOP_K
        )
        gathered = tl.load(rows_0 + token * stride_0 + hidden, mask=in_row, other=0.0)
        total_0 += tl.load(values_0 + pair) * gathered.to(total_0.dtype)
        if TABLES == 2:
            gathered = tl.load(rows_1 + token * stride_1 + hidden, mask=in_row, other=0.0)
            total_1 += tl.load(values_1 + pair) * gathered.to(total_1.dtype)
        pair, token = next_pair, next_token
    return total_0, total_1


@triton.jit
def token_ids_kernel(row_offsets, token_ids, BLOCK: tl.constexpr):
    """Store token_ids (N,), the token of each pair; grid (tokens, blocks of a token's pairs)."""
    token = tl.program_id(0)
    begin = tl.load(row_offsets + token).to(tl.int64)
    end = tl.load(row_offsets + token + 1).to(tl.int64)
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        pairs = block + tl.arange(0, BLOCK)
        tl.store(token_ids + pairs, token, mask=pairs < end)


@triton.jit
def store_partial_sums(
    split,
    values_0,
    rows_0,
    stride_0,
    values_1,
    rows_1,
    stride_1,
    partial_sums,
    expert_ids,
    tokens_by_expert,
    expert_order,
    expert_offsets,
    num_pairs,
    hidden,
    in_row,
    zeros,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Sum a split's pairs of experts that have more than SPLIT: see `spmm_t_kernel`."""
    split_begin = split * SPLIT
    split_end = tl.minimum(split_begin + SPLIT, num_pairs)
    first = tl.load(expert_ids + tl.load(expert_order + split_begin))
    last = tl.load(expert_ids + tl.load(expert_order + split_end - 1))
    for side in range(2):
        expert = tl.where(side == 0, first, last)
        if (expert >= 0) & ((side == 0) | (first != last)):
            begin = tl.load(expert_offsets + expert)
            end = tl.load(expert_offsets + expert + 1)
            if end - begin > SPLIT:
                total_0, total_1 = token_sums(
                    tl.maximum(begin, split_begin),
                    tl.minimum(end, split_end),
                    expert_order,
                    tokens_by_expert,
                    values_0,
                    rows_0,
                    stride_0,
                    values_1,
                    rows_1,
                    stride_1,
                    hidden,
                    in_row,
                    zeros,
                    zeros,
                    TOP_K,
                    TABLES,
                )
                offset = (split * 2 + side) * TABLES * HIDDEN_SIZE + hidden
                tl.store(partial_sums + offset, total_0, mask=in_row)
                if TABLES == 2:
                    tl.store(partial_sums + offset + HIDDEN_SIZE, total_1, mask=in_row)


@triton.jit
def add_partial_sums_of_expert(
    partial_sums,
    split,
    begin,
    end,
    table,
    hidden,
    in_row,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Add up what `store_partial_sums` stored for the expert of the pairs from begin to end.

    split: where its pairs begin.
    """
    side = tl.where(begin > split * SPLIT, 1, 0)
    stride = TABLES * HIDDEN_SIZE
    source = partial_sums + table * HIDDEN_SIZE + hidden
    total = tl.load(source + (split * 2 + side) * stride, mask=in_row, other=0.0)
    splits_end = tl.cdiv(end, SPLIT)
    for block in range(split + 1, splits_end, BLOCK_SPLITS):
        splits = block + tl.arange(0, BLOCK_SPLITS)
        loaded = tl.load(
            source[None, :] + (splits * 2 * stride)[:, None],
            mask=(splits < splits_end)[:, None] & in_row[None, :],
            other=0.0,
        )
        total += tl.sum(loaded, 0)
    return total


@triton.jit
def spmm_t_kernel(
    values_0,
    rows_0,
    stride_0,
    out_0,
    values_1,
    rows_1,
    stride_1,
    out_1,
    partial_sums,
    expert_ids,
    tokens_by_expert,
    expert_order,
    expert_offsets,
    hot_index,
    scale,
    num_pairs,
    num_splits,
    TOP_K: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Sum values[n] * rows[token of n] over each expert's pairs, times scale, for one table or two.

    The order by expert is cut into splits of SPLIT pairs. An expert of more than SPLIT pairs is
    summed split by split, into partial_sums (num_splits, 2, TABLES, HIDDEN_SIZE). A split has pairs
    of at most two such experts: the expert of its first pair (side 0) and that of its last (side
    1). Experts with hot_index >= 0 are skipped.
    grid (num_splits + experts, blocks of HIDDEN_SIZE).
    """
    program = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_row = hidden < HIDDEN_SIZE
    zeros = tl.zeros([BLOCK_HIDDEN], dtype=values_0.dtype.element_ty)
    if program >= num_splits:
        expert = program - num_splits
        begin = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        mine = end - begin <= SPLIT
        if HAS_HOT:
            mine = mine & (tl.load(hot_index + expert) < 0)
        if mine:
            total_0, total_1 = token_sums(
                begin,
                end,
                expert_order,
                tokens_by_expert,
                values_0,
                rows_0,
                stride_0,
                values_1,
                rows_1,
                stride_1,
                hidden,
                in_row,
                zeros,
                zeros,
                TOP_K,
                TABLES,
            )
            store_rounded(out_0 + expert * HIDDEN_SIZE + hidden, total_0 * scale, in_row)
            if TABLES == 2:
                store_rounded(out_1 + expert * HIDDEN_SIZE + hidden, total_1 * scale, in_row)
    else:
        store_partial_sums(
            program,
            values_0,
            rows_0,
            stride_0,
            values_1,
            rows_1,
            stride_1,
            partial_sums,
            expert_ids,
            tokens_by_expert,
            expert_order,
            expert_offsets,
            num_pairs,
            hidden,
            in_row,
            zeros,
            TOP_K,
            HIDDEN_SIZE,
            SPLIT,
            TABLES,
        )


@triton.jit
def spmm_t_splits_kernel(
    partial_sums,
    out_0,
    out_1,
    expert_ids,
    expert_order,
    expert_offsets,
    scale,
    num_pairs,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Add up the partial sums of `spmm_t_kernel`, and scale; grid (splits, blocks of H, TABLES).

    A program serves the expert whose pairs begin in its split and continue in the next.
    """
    split = tl.program_id(0).to(tl.int64)
    split_begin = split * SPLIT
    split_end = tl.minimum(split_begin + SPLIT, num_pairs)
    expert = tl.load(expert_ids + tl.load(expert_order + split_end - 1))
    if expert >= 0:
        begin = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        if (begin >= split_begin) & (end - begin > SPLIT):
            table = tl.program_id(2)
            hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
            in_row = hidden < HIDDEN_SIZE
            total = add_partial_sums_of_expert(
                partial_sums,
                split,
                begin,
                end,
                table,
                hidden,
                in_row,
                HIDDEN_SIZE,
                BLOCK_SPLITS,
                SPLIT,
                TABLES,
            )
            offset = expert.to(tl.int64) * HIDDEN_SIZE + hidden
            if table == 0:
                store_rounded(out_0 + offset, total * scale, in_row)
            else:
                store_rounded(out_1 + offset, total * scale, in_row)
