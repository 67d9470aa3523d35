"""Triton kernel that measures the rate of gathered table rows."""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    table,
    ids,
    out,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Sum all words of the gathered rows: out[t, p] = sum table[ids[t, p PAIRS : (p + 1) PAIRS]].

    table (rows, WORDS) int32, ids (tokens, SLOTS) int32, out (tokens, SLOTS // PAIRS) int32,
    wrapping. Grid (tokens, SLOTS // PAIRS). ROWS divides PAIRS, which divides SLOTS; BLOCK_WORDS
    divides WORDS.
    """
    token = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    pairs = token * SLOTS + run * PAIRS + tl.arange(0, ROWS)
    total = tl.zeros([BLOCK_WORDS], dtype=tl.int32)
    for step in range(0, PAIRS, ROWS):
        rows = tl.load(ids + pairs + step).to(tl.int64)
        for begin in tl.static_range(0, WORDS, BLOCK_WORDS):
            words = begin + tl.arange(0, BLOCK_WORDS)
            # Only one addition for every four bytes, so that loads bound the time.
            total += tl.sum(tl.load(table + rows[:, None] * WORDS + words[None, :]), 0)
    tl.store(out + token * tl.num_programs(1) + run, tl.sum(total, 0))
