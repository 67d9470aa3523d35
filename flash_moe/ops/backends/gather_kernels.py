"""Triton kernels that gather table rows.

One program serves one output row, a piece of one, or one block of one token's pairs; sums stay
in registers and run in a fixed order, so results are bitwise repeatable. Every index that meets
a stride is 64 bits wide.

    rows, table, out    (rows, HIDDEN_SIZE), last dimension contiguous, any row stride
    row_offsets         (T+1,)   pairs of token t are row_offsets[t]:row_offsets[t+1]; where
                                 SLOTS > 0, SLOTS*t:SLOTS*(t+1) instead
    pair_counts         (T, 3)   if HAS_HOT: of these pairs the first pair_counts[t, 0] are meant
    expert_ids          (N,)     negative: no expert, or not this kernel's
    expert_order        (N,)     pair positions sorted by expert
    tokens_by_expert    (N,)     tokens of the pairs in that order; where SLOTS > 0, not read
    expert_offsets      (E+1,)   pairs of expert e are expert_order[offsets[e]:offsets[e+1]]
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _row_range(token, row_offsets, pair_counts, SLOTS: tl.constexpr, HAS_HOT: tl.constexpr):
    if SLOTS > 0:
        begin = token * SLOTS
        end = begin + SLOTS
    else:
        begin = tl.load(row_offsets + token).to(tl.int64)
        end = tl.load(row_offsets + token + 1).to(tl.int64)
    if HAS_HOT:
        end = begin + tl.load(pair_counts + token * 3)
    return begin, end


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
    SLOTS: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PAIRS_PER_PROGRAM: tl.constexpr,
):
    """out[i, n] = <rows[token of n], table[expert_ids[n]]> over the i-th SLICE of HIDDEN_SIZE.

    grid (tokens, blocks of a token's pairs, slices).
    """
    slice_begin = 0
    if SLICE < HIDDEN_SIZE:
        slice_begin = tl.program_id(2) * SLICE
        out += tl.program_id(2).to(tl.int64) * num_pairs
    token = tl.program_id(0).to(tl.int64)
    row_begin, row_end = _row_range(token, row_offsets, pair_counts, SLOTS, HAS_HOT)
    length = tl.full([], PAIRS_PER_PROGRAM, tl.int64)
    if HAS_HOT:
        # Equal shares of what is left: programs that run together read a narrow part of the table.
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
    SLOTS: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PIECES: tl.constexpr,
    HOT_PIECES: tl.constexpr,
    ADDENDS: tl.constexpr,
    PLACE: tl.constexpr,
):
    """Sum of values[n] * table[expert_ids[n]] over a piece of a token's pairs.

    If HAS_HOT and there are hot experts, hot_sums (HOT_PIECES, tokens, HIDDEN_SIZE) are added.
    If ADDENDS > 0, addends (ADDENDS, tokens, HIDDEN_SIZE) are summed in order, with this sum in
    the PLACE of one, and PIECES is 1.
    out (PIECES, tokens, HIDDEN_SIZE); grid (tokens, blocks of HIDDEN_SIZE, PIECES).
    """
    token = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_row = hidden < HIDDEN_SIZE
    begin, end = _row_range(token, row_offsets, pair_counts, SLOTS, HAS_HOT)
    if PIECES > 1:
        length = tl.cdiv(end - begin, PIECES * BLOCK_PAIRS) * BLOCK_PAIRS
        begin += tl.program_id(2) * length
        end = tl.minimum(begin + length, end)
    total = tl.zeros([BLOCK_HIDDEN], dtype=values.dtype.element_ty)
    if HAS_HOT:
        # Where no expert is hot, nobody wrote sums.
        pieces = tl.where(tl.load(num_hot) > 0, HOT_PIECES, 0)
        for piece in range(pieces):
            row = piece * tl.num_programs(0).to(tl.int64) + token
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
    if ADDENDS > 0:
        # Rounded as if it had been stored among them.
        own = total.to(addends.dtype.element_ty)
        total = tl.zeros([BLOCK_HIDDEN], dtype=addends.dtype.element_ty)
        for piece in tl.static_range(ADDENDS):
            if piece == PLACE:
                total += own
            else:
                row = tl.cast(piece, tl.int64) * tl.num_programs(0) + token
                total += tl.load(addends + row * HIDDEN_SIZE + hidden, mask=in_row, other=0.0)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + token
    _store_rounded(out + row * HIDDEN_SIZE + hidden, total, in_row)


@triton.jit
def sum_pieces_kernel(pieces, out, num_elements, NUM_PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """out (num_elements,) = sum over the first of pieces (NUM_PIECES, num_elements), in order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    total = tl.zeros([BLOCK], dtype=pieces.dtype.element_ty)
    for piece in range(NUM_PIECES):
        begin = tl.cast(piece, tl.int64) * num_elements
        total += tl.load(pieces + begin + places, mask=inside, other=0.0)
    _store_rounded(out + places, total, inside)


@triton.jit
def _pair_and_token(expert_order, tokens_by_expert, place, end, SLOTS: tl.constexpr):
    """At that place in the order by expert; 0 from the end on."""
    inside = place < end
    pair = tl.load(expert_order + place, mask=inside, other=0).to(tl.int64)
    if SLOTS > 0:
        token = pair // SLOTS
    else:
        token = tl.load(tokens_by_expert + place, mask=inside, other=0).to(tl.int64)
    return pair, token


@triton.jit
def _token_sums(
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
    SLOTS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """Add values[n] * rows[token of n] of the pairs from begin to end in the order by expert."""
    pair, token = _pair_and_token(expert_order, tokens_by_expert, begin, end, SLOTS)
    for place in range(begin, end):
        # Asked for ahead, as nothing of a row can be before its token is known.
        next_pair, next_token = _pair_and_token(
            expert_order, tokens_by_expert, place + 1, end, SLOTS
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
    """token_ids (N,): the token of each pair; grid (tokens, blocks of a token's pairs)."""
    token = tl.program_id(0)
    begin = tl.load(row_offsets + token).to(tl.int64)
    end = tl.load(row_offsets + token + 1).to(tl.int64)
    for block in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        pairs = block + tl.arange(0, BLOCK)
        tl.store(token_ids + pairs, token, mask=pairs < end)


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
    partials,
    expert_ids,
    tokens_by_expert,
    expert_order,
    expert_offsets,
    hot_places,
    scale,
    num_pairs,
    num_chunks,
    SLOTS: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLES: tl.constexpr,
):
    """scale * sum of values[n] * rows[token of n] over each expert's pairs, for one or two tables.

    An expert of more than CHUNK pairs is summed in pieces, cut where the order by expert is cut
    into chunks; a chunk holds pieces of two such experts at most, its first pair's and its last
    pair's. partials (num_chunks, 2, TABLES, HIDDEN_SIZE). Experts with hot_places >= 0 are left
    out. grid (num_chunks + experts, blocks of HIDDEN_SIZE).
    """
    program = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    in_row = hidden < HIDDEN_SIZE
    zeros = tl.zeros([BLOCK_HIDDEN], dtype=values_0.dtype.element_ty)
    if program >= num_chunks:
        expert = program - num_chunks
        begin = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        mine = end - begin <= CHUNK
        if HAS_HOT:
            mine = mine & (tl.load(hot_places + expert) < 0)
        if mine:
            total_0, total_1 = _token_sums(
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
                SLOTS,
                TABLES,
            )
            _store_rounded(out_0 + expert * HIDDEN_SIZE + hidden, total_0 * scale, in_row)
            if TABLES == 2:
                _store_rounded(out_1 + expert * HIDDEN_SIZE + hidden, total_1 * scale, in_row)
    else:
        chunk_begin = program * CHUNK
        chunk_end = tl.minimum(chunk_begin + CHUNK, num_pairs)
        first = tl.load(expert_ids + tl.load(expert_order + chunk_begin))
        last = tl.load(expert_ids + tl.load(expert_order + chunk_end - 1))
        for piece in range(2):
            expert = tl.where(piece == 0, first, last)
            if (expert >= 0) & ((piece == 0) | (first != last)):
                begin = tl.load(expert_offsets + expert)
                end = tl.load(expert_offsets + expert + 1)
                if end - begin > CHUNK:
                    total_0, total_1 = _token_sums(
                        tl.maximum(begin, chunk_begin),
                        tl.minimum(end, chunk_end),
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
                        SLOTS,
                        TABLES,
                    )
                    place = (program * 2 + piece) * TABLES * HIDDEN_SIZE + hidden
                    tl.store(partials + place, total_0, mask=in_row)
                    if TABLES == 2:
                        tl.store(partials + place + HIDDEN_SIZE, total_1, mask=in_row)


@triton.jit
def sum_chunks_kernel(
    partials,
    out_0,
    out_1,
    expert_ids,
    expert_order,
    expert_offsets,
    scale,
    num_pairs,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLES: tl.constexpr,
):
    """The rows that `spmm_t_kernel` left in pieces; grid (chunks, blocks of HIDDEN_SIZE, TABLES).

    A program does the expert whose pairs begin in its chunk and go on past its end.
    """
    chunk = tl.program_id(0).to(tl.int64)
    chunk_begin = chunk * CHUNK
    chunk_end = tl.minimum(chunk_begin + CHUNK, num_pairs)
    expert = tl.load(expert_ids + tl.load(expert_order + chunk_end - 1))
    if expert >= 0:
        begin = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        if (begin >= chunk_begin) & (end - begin > CHUNK):
            table = tl.program_id(2)
            hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
            in_row = hidden < HIDDEN_SIZE
            piece = tl.where(begin > chunk_begin, 1, 0)
            stride = TABLES * HIDDEN_SIZE
            source = partials + table * HIDDEN_SIZE + hidden
            total = tl.load(source + (chunk * 2 + piece) * stride, mask=in_row, other=0.0)
            chunks_end = tl.cdiv(end, CHUNK)
            for block in range(chunk + 1, chunks_end, BLOCK_CHUNKS):
                chunks = block + tl.arange(0, BLOCK_CHUNKS)
                loaded = tl.load(
                    source[None, :] + (chunks * 2 * stride)[:, None],
                    mask=(chunks < chunks_end)[:, None] & in_row[None, :],
                    other=0.0,
                )
                total += tl.sum(loaded, 0)
            place = expert.to(tl.int64) * HIDDEN_SIZE + hidden
            if table == 0:
                _store_rounded(out_0 + place, total * scale, in_row)
            else:
                _store_rounded(out_1 + place, total * scale, in_row)


@triton.jit
def _store_rounded(pointers, values, mask):
    if pointers.dtype.element_ty.primitive_bitwidth < 32:
        # From 64 bits in two steps: Triton's interpreter cannot do it in one.
        values = values.to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
