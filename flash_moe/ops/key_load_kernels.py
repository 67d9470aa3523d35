"""Kernel that counts how many chosen experts each key has."""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def count_keys_kernel(
    indices,
    counts,
    num_pairs,
    first_size,
    second_size,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Add the pairs of each key to counts (A + B,) int64. Grid (blocks of pairs, 2)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = offsets < num_pairs
    ids = tl.load(indices + offsets, mask=present, other=0).to(tl.int32)
    if tl.program_id(1) == 0:
        keys = ids // second_size
        num_keys = first_size
    else:
        keys = ids % second_size
        counts += first_size
        num_keys = second_size
    # The last bin is no key's.
    found = tl.histogram(tl.where(present, keys, BINS - 1), BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + bins, found.to(tl.int64), mask=(bins < num_keys) & (found > 0))
