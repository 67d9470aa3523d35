"""Triton kernels that choose the K best of all sums of two keys' scores, and their gradient.

T tokens, A and B keys of the two axes. Of each axis the L = min(K, keys) best are sorted; C
candidates, as ranks (i, j) in both sorted lists, contain the K best sums. Scores are compared as
integers in the same order. Where they are equal, the lowest key, or expert i * B + j, is better:
an id is packed below the score, inverted, so that one comparison does both. Each program serves
BLOCK_T tokens.
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import store_rounded


@triton.jit
def _as_ordered(values):
    """Map float32 to int32 in the same order; the map is its own inverse on the bits."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pack(ordered, ids):
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _ids_of(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def best_keys_kernel(
    scores,
    bias,
    best_scores,
    best_keys,
    num_tokens,
    row_stride,
    num_keys,
    num_best,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
):
    """Sort the best keys of one axis: biased scores (T, L) float32 and keys (T, L) int32."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    keys = tl.arange(0, BLOCK_KEYS)
    is_key = (keys < num_keys)[None, :]
    is_token = (tokens < num_tokens)[:, None]
    pointers = scores + tokens[:, None] * row_stride + keys[None, :]
    found = tl.load(pointers, mask=is_token & is_key, other=0.0).to(tl.float32)
    if HAS_BIAS:
        found += tl.load(bias + keys, mask=keys < num_keys, other=0.0).to(tl.float32)[None, :]
    # -0 becomes 0.
    packed = _pack(_as_ordered(found + 0.0), keys[None, :])
    packed = tl.where(is_key, packed, -(2**63))
    best = tl.topk(packed, BLOCK_BEST)
    ranks = tl.arange(0, BLOCK_BEST)
    offsets = tokens[:, None] * num_best + ranks[None, :]
    in_best = is_token & (ranks < num_best)[None, :]
    ordered = (best >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    tl.store(best_scores + offsets, bits.to(tl.float32, bitcast=True), mask=in_best)
    tl.store(best_keys + offsets, _ids_of(best), mask=in_best)


@triton.jit
def choose_kernel(
    chosen,
    first_scores,
    first_keys,
    second_scores,
    second_keys,
    candidates,
    num_tokens,
    num_first,
    num_second,
    num_candidates,
    second_size,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
):
    """Store the k best candidates of each token, packed and in no order: (T, k) int64.

    num_first, num_second: L of the two axes. second_size: B. candidates: ranks (2, C) int32.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_CANDIDATES)
    is_candidate = ranks < num_candidates
    first = tl.load(candidates + ranks, mask=is_candidate, other=0)
    second = tl.load(candidates + num_candidates + ranks, mask=is_candidate, other=0)
    is_token = (tokens < num_tokens)[:, None]
    present = is_token & is_candidate[None, :]
    first_offsets = tokens[:, None] * num_first + first[None, :]
    second_offsets = tokens[:, None] * num_second + second[None, :]
    sums = tl.load(first_scores + first_offsets, mask=present, other=0.0)
    sums += tl.load(second_scores + second_offsets, mask=present, other=0.0)
    ids = tl.load(first_keys + first_offsets, mask=present, other=0) * second_size
    ids += tl.load(second_keys + second_offsets, mask=present, other=0)
    ordered = _as_ordered(sums)
    # The largest `low` at which k candidates are no worse, or any at which exactly k are not.
    low = tl.min(tl.where(is_candidate[None, :], ordered, 0x7FFFFFFF), axis=1).to(tl.int64)
    high = tl.max(tl.where(is_candidate[None, :], ordered, -0x80000000), axis=1).to(tl.int64)
    count = tl.zeros([BLOCK_T], tl.int32) + num_candidates
    while tl.max(((low < high) & (count != k)).to(tl.int32), axis=0) > 0:
        middle = tl.where(count != k, (low + high + 1) >> 1, low)
        no_worse = is_candidate[None, :] & (ordered >= middle[:, None])
        found = tl.sum(no_worse.to(tl.int32), axis=1)
        high = tl.where(found >= k, high, middle - 1)
        low = tl.where(found >= k, middle, low)
        count = tl.where(found >= k, found, count)
    better = is_candidate[None, :] & (ordered > low[:, None])
    equal = is_candidate[None, :] & (ordered == low[:, None])
    # Of equal ones, those with the lowest ids.
    missing = k - tl.sum(better.to(tl.int32), axis=1)
    num_equal = tl.sum(equal.to(tl.int32), axis=1)
    low_id = tl.zeros([BLOCK_T], tl.int32)
    high_id = tl.zeros([BLOCK_T], tl.int32) + 0x7FFFFFFE
    while tl.max(((low_id < high_id) & (num_equal != missing)).to(tl.int32), axis=0) > 0:
        middle_id = tl.where(num_equal != missing, low_id + (high_id - low_id) // 2, high_id)
        found = tl.sum((equal & (ids <= middle_id[:, None])).to(tl.int32), axis=1)
        low_id = tl.where(found >= missing, low_id, middle_id + 1)
        high_id = tl.where(found >= missing, middle_id, high_id)
        num_equal = tl.where(found >= missing, found, num_equal)
    is_chosen = better | (equal & (ids <= high_id[:, None]))
    places = tl.cumsum(is_chosen.to(tl.int32), axis=1) - 1
    pointers = chosen + tokens[:, None] * k + places
    tl.store(pointers, _pack(ordered, ids), mask=is_chosen & is_token)


@triton.jit
def order_kernel(
    chosen,
    first_scores,
    second_scores,
    scores,
    num_tokens,
    first_stride,
    second_stride,
    second_size,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sort the packed experts of each token, unpack them in place, and sum their scores (T, k)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_K)
    is_slot = (tokens < num_tokens)[:, None] & (slots < k)[None, :]
    offsets = tokens[:, None] * k + slots[None, :]
    packed = tl.load(chosen + offsets, mask=is_slot, other=-(2**63))
    ids = _ids_of(tl.sort(packed, descending=True))
    first = ids // second_size
    second = ids - first * second_size
    sums = tl.load(first_scores + tokens[:, None] * first_stride + first, mask=is_slot, other=0.0)
    sums = sums.to(tl.float32) + tl.load(
        second_scores + tokens[:, None] * second_stride + second, mask=is_slot, other=0.0
    ).to(tl.float32)
    tl.store(chosen + offsets, ids.to(tl.int64), mask=is_slot)
    tl.store(scores + offsets, sums, mask=is_slot)


@triton.jit
def _add_same_key(value, key, next_value, next_key):
    return tl.where(key == next_key, value + next_value, next_value), next_key


@triton.jit
def axis_grads_kernel(
    score_grads,
    indices,
    grads,
    num_tokens,
    num_keys,
    second_size,
    k,
    IS_FIRST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the sum of the gradients (T, k) of each chosen key of one axis into grads (T, keys).

    Sorted by key, and by slot below it, the gradients of a key are a run; its last element in a
    scan of sums within runs is the key's. PACKED: dtype for a key above 16 bits of a slot.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_K)
    is_slot = (tokens < num_tokens)[:, None] & (slots < k)[None, :]
    rows = tokens[:, None] * k
    ids = tl.load(indices + rows + slots[None, :], mask=is_slot, other=0).to(tl.int32)
    keys = ids // second_size if IS_FIRST else ids % second_size
    packed = (keys.to(PACKED) << 16) | slots[None, :]
    behind_all = (tl.zeros([BLOCK_T, BLOCK_K], PACKED) + num_keys) << 16
    packed = tl.sort(tl.where(is_slot, packed, behind_all))
    keys = packed >> 16
    present = keys < num_keys
    values = tl.load(score_grads + rows + (packed & 0xFFFF), mask=present, other=0.0)
    sums, _ = tl.associative_scan((values, keys), 1, _add_same_key)
    ones = tl.full([BLOCK_T, BLOCK_K], 1, tl.int32)
    to_end, _ = tl.associative_scan((ones, keys), 1, _add_same_key, reverse=True)
    pointers = grads + tokens[:, None] * num_keys + keys
    store_rounded(pointers, sums, present & (to_end == 1))
