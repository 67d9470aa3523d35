"""Triton helpers that several kernels share."""

# Triton's language has no types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def row_range(token, row_offsets, pair_counts, TOP_K: tl.constexpr, HAS_HOT: tl.constexpr):
    """Begin and end of a token's pairs; if HAS_HOT, of its cold pairs.

    row_offsets (T+1,) is read where TOP_K is 0, pair_counts (T, 3) where HAS_HOT.
    """
    if TOP_K > 0:
        begin = token * TOP_K
        end = begin + TOP_K
    else:
        begin = tl.load(row_offsets + token).to(tl.int64)
        end = tl.load(row_offsets + token + 1).to(tl.int64)
    if HAS_HOT:
        end = begin + tl.load(pair_counts + token * 3)
    return begin, end


@triton.jit
def add_within_run(value, starts, next_value, next_starts):
    """Combine two elements of a scan that sums values, and begins again where starts is 1."""
    return tl.where(next_starts != 0, next_value, value + next_value), starts | next_starts


@triton.jit
def store_rounded(pointers, values, mask):
    """Round values to the dtype of the pointers and store them."""
    if pointers.dtype.element_ty.primitive_bitwidth < 32:
        # From 64 bits in two steps: Triton's interpreter cannot do it in one.
        values = values.to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
