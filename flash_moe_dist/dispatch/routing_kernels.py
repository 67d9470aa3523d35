"""Triton kernels that sort each token's pairs by owner and count them.

T tokens, K experts per token, W ranks that own `local_size` experts each; see `routing.py`.

ids (T, K)            int32 or int64, any values
sorted_ids (T*K,)     ids in ascending order within each token, -1 for an id that is not an expert
slots (T*K,)          the position in `ids` that each sorted id came from
begin, pairs (W, T)   where the pairs of a token with a rank begin in sorted_ids, and how many
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.indices_kernels import sorted_slots
from flash_moe_dist.dispatch.header_kernels import (
    BAD_IDS,
    CHECKSUM,
    HEADER_FIELDS,
    MAX_PAIRS,
    PAIRS,
    ROWS,
    TOKENS,
)


@triton.jit
def route_kernel(
    ids,
    sorted_ids,
    slots,
    begin,
    pairs,
    out_of_range,
    num_experts,
    local_size,
    ep_size,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY: tl.constexpr,
):
    """Sorts the ids of one token and finds each rank's run among them; grid (T,).

    Adds to out_of_range (1,) the number of ids that are neither an expert nor -1.
    """
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = token * TOP_K
    lanes = tl.arange(0, BLOCK)
    in_row = lanes < TOP_K
    loaded = tl.load(ids + row + lanes, mask=in_row, other=-1).to(tl.int64)
    outside = (loaded < -1) | (loaded >= num_experts)
    num_outside = tl.sum(outside.to(tl.int32), 0)
    if num_outside > 0:
        tl.atomic_add(out_of_range, num_outside.to(tl.int64))
    ids_of_token, slots_of_token = sorted_slots(
        tl.where(outside, -1, loaded), lanes, in_row, num_experts, BLOCK, KEY
    )
    tl.store(sorted_ids + row + lanes, ids_of_token, mask=in_row)
    positions = row + slots_of_token
    tl.store(slots + row + lanes, positions.to(slots.dtype.element_ty), mask=in_row)
    # Empty slots sort before all ranks' pairs, lanes past the row behind them.
    first = tl.sum((in_row & (ids_of_token < 0)).to(tl.int32), 0)
    for rank in range(ep_size):
        bound = (rank + 1) * local_size
        end = tl.sum((in_row & (ids_of_token < bound)).to(tl.int32), 0)
        tl.store(begin + rank * num_tokens + token, row + first)
        tl.store(pairs + rank * num_tokens + token, (end - first).to(tl.int64))
        first = end


# The checksum differs from pass to pass; specialised, a multiple of 16 would compile in training.
@triton.jit(do_not_specialize=["checksum"])
def write_header_kernel(
    pairs_end,
    rows_end,
    out_of_range,
    header,
    copy,
    copy_stride,
    num_tokens,
    checksum,
    ep_size,
    COUNT_ROWS: tl.constexpr,
):
    """Writes header (W, F) and the same into copy (W, any stride): see `Header`; grid (W,).

    pairs_end, rows_end (W*T,): as in `Routing`; ROWS is 0 unless COUNT_ROWS.
    """
    rank = tl.program_id(0).to(tl.int64)
    before, last = rank * num_tokens - 1, (rank + 1) * num_tokens - 1
    rows = tl.zeros([], tl.int64)
    if COUNT_ROWS:
        rows = tl.load(rows_end + last) - tl.load(rows_end + before, mask=rank > 0, other=0)
    pairs = tl.load(pairs_end + last) - tl.load(pairs_end + before, mask=rank > 0, other=0)
    max_pairs, end = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for other in range(ep_size):
        begin, end = end, tl.load(pairs_end + (other + 1) * num_tokens - 1)
        max_pairs = tl.maximum(max_pairs, end - begin)
    bad_ids = tl.load(out_of_range)
    for is_copy in tl.static_range(2):
        row = copy + rank * copy_stride if is_copy else header + rank * HEADER_FIELDS
        tl.store(row + ROWS, rows)
        tl.store(row + PAIRS, pairs)
        tl.store(row + BAD_IDS, bad_ids)
        tl.store(row + TOKENS, num_tokens)
        tl.store(row + CHECKSUM, checksum)
        tl.store(row + MAX_PAIRS, max_pairs)
