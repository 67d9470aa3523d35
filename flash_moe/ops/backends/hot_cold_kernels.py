"""Triton kernels that do the pairs of hot experts by matrix products.

Tables are read through `experts`, the expert at each place (see `flash_moe.ops.hot_experts`). Each
launch does CHUNK places at most, of which `matrix` (T, CHUNK) holds the values of all pairs, zero
elsewhere. The number of places taken is on the device: programs stop there. Products are summed
in float32 in a fixed order.
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _bits_set(words):
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


@triton.jit
def _bits_and_position(words):
    """The lower half, and the first of the positions that the upper half is the sum of."""
    bits = words.to(tl.uint32)
    count = _bits_set(bits).to(tl.int32)
    total = (words >> 32).to(tl.int32)
    return bits, (total - count * (count - 1) // 2) // tl.maximum(count, 1)


@triton.jit
def hot_sddmm_kernel(
    rows,
    table,
    experts,
    num_hot,
    words,
    out,
    rows_stride,
    table_stride,
    num_tokens,
    num_words,
    slots,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out[n] = <rows[token of n], table[expert of n]> for the first pair of each hot expert.

    Every product of a block of tokens and a block of places is formed, and those of pairs are
    stored from registers. Programs go through the blocks in strides; grid (programs,).
    """
    blocks_of_tokens = tl.cdiv(num_tokens, BLOCK_TOKENS)
    taken = tl.load(num_hot)
    num_blocks = blocks_of_tokens * tl.cdiv(taken, BLOCK_EXPERTS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        tokens = (block % blocks_of_tokens) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        first_place = (block // blocks_of_tokens) * BLOCK_EXPERTS
        places = first_place + tl.arange(0, BLOCK_EXPERTS)
        ids = tl.load(experts + places, mask=places < taken, other=0).to(tl.int64)
        # What stands for tokens and places past the end is never stored.
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
        word = first_place // 32 + tl.arange(0, BLOCK_EXPERTS // 32)
        real = (tokens < num_tokens)[:, None] & (word < num_words)[None, :]
        pointers = words + read_tokens[:, None] * num_words + word[None, :]
        bits, position = _bits_and_position(tl.load(pointers, mask=real, other=0))
        first = out + read_tokens[:, None] * slots + position
        bit = tl.arange(0, 32).to(tl.uint32)[None, None, :]
        bits = tl.expand_dims(bits, 2)
        one = tl.full([1, 1, 1], 1, tl.uint32)
        chosen = ((bits >> bit) & one) != 0
        rank = _bits_set(bits & ((one << bit) - one)).to(tl.int32)
        products = tl.reshape(products, [BLOCK_TOKENS, BLOCK_EXPERTS // 32, 32])
        tl.store(tl.expand_dims(first, 2) + rank, products, mask=chosen)


@triton.jit
def _first_positions(place, words, token, num_words, mask):
    """Where in the token's row the first pair of the expert at each place stands."""
    word = tl.load(words + token * num_words + place // 32, mask=mask, other=0)
    bits, position = _bits_and_position(word)
    one = tl.full(place.shape, 1, tl.uint32)
    below = (one << (place % 32).to(tl.uint32)) - one
    return position + _bits_set(bits & below).to(tl.int32)


@triton.jit
def fill_rest_kernel(
    scores, ids, places, words, pair_counts, num_words, slots, BLOCK: tl.constexpr
):
    """Scores of further pairs of a hot expert: those of its first pair; of empty slots: 0."""
    token = tl.program_id(0).to(tl.int64)
    row = token * slots
    begin = tl.load(pair_counts + token * 3) + tl.load(pair_counts + token * 3 + 1)
    end = begin + tl.load(pair_counts + token * 3 + 2)
    for block in range(begin, slots, BLOCK):
        pairs = block + tl.arange(0, BLOCK)
        repeat = pairs < end
        experts = -2 - tl.load(ids + row + pairs, mask=repeat, other=-2)
        place = tl.load(places + experts, mask=repeat, other=0)
        first = _first_positions(place, words, token, num_words, repeat)
        copied = tl.load(scores + row + first, mask=repeat, other=0.0)
        tl.store(scores + row + pairs, copied, mask=pairs < slots)


@triton.jit
def _add_within_run(value, starts, next_value, next_starts):
    return tl.where(next_starts != 0, next_value, value + next_value), starts | next_starts


@triton.jit
def fill_matrix_kernel(
    values,
    ids,
    places,
    words,
    pair_counts,
    num_hot,
    matrix,
    num_words,
    chunk_begin,
    SLOTS: tl.constexpr,
    BLOCK_REPEATS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One token's row of `matrix`, zero up to a multiple of WIDTH places; grid (T, programs)."""
    token = tl.program_id(0).to(tl.int64)
    taken = tl.minimum(tl.load(num_hot) - chunk_begin, CHUNK)
    width = tl.cdiv(taken, WIDTH) * WIDTH
    row = values + token * SLOTS
    target = matrix + token * CHUNK
    word_row = words + token * num_words + chunk_begin // 32
    dtype = matrix.dtype.element_ty
    bit = tl.arange(0, 32).to(tl.uint32)[None, :]
    one = tl.full([1, 1], 1, tl.uint32)
    first_word = tl.program_id(1) * BLOCK_WORDS
    step = tl.num_programs(1) * BLOCK_WORDS
    for begin in range(first_word, width // 32, step):
        word = begin + tl.arange(0, BLOCK_WORDS)
        real = (word < width // 32) & (chunk_begin // 32 + word < num_words)
        bits, first = _bits_and_position(tl.load(word_row + word, mask=real, other=0))
        bits = bits[:, None]
        chosen = ((bits >> bit) & one) != 0
        position = first[:, None] + _bits_set(bits & ((one << bit) - one)).to(tl.int32)
        value = tl.load(row + position, mask=chosen, other=0.0)
        column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(target + column, value.to(dtype), mask=column < width)
    begin = tl.load(pair_counts + token * 3) + tl.load(pair_counts + token * 3 + 1)
    num_repeats = tl.load(pair_counts + token * 3 + 2)
    if num_repeats > 0:
        # What one thread wrote, another writes again.
        tl.debug_barrier()
        carried = tl.zeros([], dtype=values.dtype.element_ty)
        coded_row = ids + token * SLOTS + begin
        for block in range(0, num_repeats, BLOCK_REPEATS):
            repeats = block + tl.arange(0, BLOCK_REPEATS)
            inside = repeats < num_repeats
            coded = tl.load(coded_row + repeats, mask=inside, other=0)
            before = tl.load(coded_row + repeats - 1, mask=inside & (repeats > 0), other=0)
            after = tl.load(coded_row + repeats + 1, mask=repeats + 1 < num_repeats, other=0)
            value = tl.load(row + begin + repeats, mask=inside, other=0.0)
            starts = (coded != before).to(tl.int32)
            total, started = tl.associative_scan((value, starts), 0, _add_within_run)
            total += tl.where(started == 0, carried, 0.0)
            carried = tl.sum(tl.where(repeats == block + BLOCK_REPEATS - 1, total, 0.0), 0)
            # The last of each run of repeats stores its sum and the pair that it repeats.
            last = inside & (coded != after)
            place = tl.load(places + (-2 - coded), mask=last, other=-1)
            first = _first_positions(place, words, token, num_words, last)
            total += tl.load(row + first, mask=last, other=0.0)
            column = place - chunk_begin
            # Each program of the token, the columns that it has filled.
            mine = (column // 32 // BLOCK_WORDS) % tl.num_programs(1) == tl.program_id(1)
            mine = mine & last & (column >= 0) & (column < CHUNK)
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
    chunk_begin,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out (PIECES, T, H) = matrix @ table, in pieces of the places; later chunks add to it.

    grid (blocks of tokens, blocks of HIDDEN_SIZE, PIECES).
    """
    taken = tl.minimum(tl.load(num_hot) - chunk_begin, CHUNK)
    if taken > 0:
        piece = tl.program_id(2)
        length = tl.cdiv(taken, PIECES * BLOCK_EXPERTS) * BLOCK_EXPERTS
        begin = piece * length
        end = tl.minimum(begin + length, taken)
        tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        hidden = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        offsets = (tokens.to(tl.int64) + piece * num_tokens) * HIDDEN_SIZE
        out_pointers = out + offsets[:, None] + hidden[None, :]
        inside = (tokens < num_tokens)[:, None] & (hidden < HIDDEN_SIZE)[None, :]
        if chunk_begin > 0:
            total = tl.load(out_pointers, mask=inside, other=0.0)
        else:
            total = tl.zeros([BLOCK_TOKENS, BLOCK_HIDDEN], dtype=tl.float32)
        read_tokens = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
        matrix_pointers = matrix + read_tokens[:, None] * CHUNK
        for block in range(begin, end, BLOCK_EXPERTS):
            places = block + tl.arange(0, BLOCK_EXPERTS)
            real = places < taken
            ids = tl.load(experts + chunk_begin + places, mask=real, other=0).to(tl.int64)
            values = tl.load(matrix_pointers + places[None, :])
            mask = real[:, None]
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
    chunk_begin,
    scale,
    CHUNK: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out[experts] = scale * matrix.T @ rows. Programs stride over the blocks; grid (programs,)."""
    taken = tl.minimum(tl.load(num_hot) - chunk_begin, CHUNK)
    blocks_of_hidden = tl.cdiv(HIDDEN_SIZE, BLOCK_HIDDEN)
    num_blocks = blocks_of_hidden * tl.cdiv(taken, BLOCK_EXPERTS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        hidden = (block % blocks_of_hidden) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        places = (block // blocks_of_hidden) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
        total = tl.zeros([BLOCK_EXPERTS, BLOCK_HIDDEN], dtype=tl.float32)
        for begin in range(0, num_tokens, BLOCK_TOKENS):
            tokens = begin + tl.arange(0, BLOCK_TOKENS)
            real = tokens < num_tokens
            tokens = tokens.to(tl.int64)
            values = tl.load(
                matrix + tokens[None, :] * CHUNK + places[:, None], mask=real[None, :], other=0.0
            )
            mask = real[:, None]
            if HIDDEN_SIZE % BLOCK_HIDDEN != 0:
                mask = mask & (hidden < HIDDEN_SIZE)[None, :]
            pointers = rows + tokens[:, None] * rows_stride + hidden[None, :]
            total = tl.dot(values, tl.load(pointers, mask=mask, other=0.0), total)
        in_chunk = places < taken
        ids = tl.load(experts + chunk_begin + places, mask=in_chunk, other=0).to(tl.int64)
        tl.store(
            out + ids[:, None] * HIDDEN_SIZE + hidden[None, :],
            (total * scale).to(out.dtype.element_ty),
            mask=in_chunk[:, None] & (hidden < HIDDEN_SIZE)[None, :],
        )
