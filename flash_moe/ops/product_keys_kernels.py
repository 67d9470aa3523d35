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
def _store_best_keys(
    best_scores,
    best_keys,
    scores,
    bias,
    num_keys,
    num_best,
    is_token,
    HAS_BIAS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
):
    """Sort the best keys of one axis: pointers (BLOCK_T, 1) to rows, and to a bias (keys,)."""
    keys = tl.arange(0, BLOCK_KEYS)
    is_key = keys < num_keys
    values = tl.load(scores + keys[None, :], mask=is_token & is_key[None, :], other=0.0)
    values = values.to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + keys, mask=is_key, other=0.0)[None, :]
    # -0 becomes 0.
    packed = _pack(_as_ordered(values + 0.0), keys[None, :])
    best = tl.topk(tl.where(is_key[None, :], packed, -(2**63)), BLOCK_BEST)
    ranks = tl.arange(0, BLOCK_BEST)[None, :]
    in_best = is_token & (ranks < num_best)
    ordered = (best >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    tl.store(best_scores + ranks, bits.to(tl.float32, bitcast=True), mask=in_best)
    tl.store(best_keys + ranks, _ids_of(best), mask=in_best)


@triton.jit
def best_keys_kernel(
    first_scores,
    second_scores,
    first_bias,
    second_bias,
    best_scores,
    best_keys,
    num_tokens,
    first_stride,
    second_stride,
    first_size,
    second_size,
    num_first,
    num_second,
    HAS_FIRST_BIAS: tl.constexpr,
    HAS_SECOND_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
):
    """Sort the best keys of both axes. Grid (blocks of tokens, 2).

    best_scores, best_keys: (T, num_first + num_second) float32, biases included, and int32.
    num_first, num_second: L of the two axes, whose sizes are A and B.
    """
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    is_token = tokens < num_tokens
    rows = tokens * (num_first + num_second)
    if tl.program_id(1) == 0:
        _store_best_keys(
            best_scores + rows,
            best_keys + rows,
            first_scores + tokens * first_stride,
            first_bias,
            first_size,
            num_first,
            is_token,
            HAS_FIRST_BIAS,
            BLOCK_KEYS,
            BLOCK_BEST,
        )
    else:
        _store_best_keys(
            best_scores + rows + num_first,
            best_keys + rows + num_first,
            second_scores + tokens * second_stride,
            second_bias,
            second_size,
            num_second,
            is_token,
            HAS_SECOND_BIAS,
            BLOCK_KEYS,
            BLOCK_BEST,
        )


@triton.jit
def _store_chosen(
    chosen,
    best_scores,
    best_keys,
    candidates,
    num_first,
    num_candidates,
    second_size,
    k,
    is_token,
    BLOCK_T: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
):
    """Store the k best candidates, packed and in no order: pointers (BLOCK_T, 1) to rows.

    candidates: ranks (2, C) int32.
    """
    ranks = tl.arange(0, BLOCK_CANDIDATES)
    is_candidate = ranks < num_candidates
    first = tl.load(candidates + ranks, mask=is_candidate, other=0)
    second = tl.load(candidates + num_candidates + ranks, mask=is_candidate, other=0)
    present = is_token & is_candidate[None, :]
    sums = tl.load(best_scores + first[None, :], mask=present, other=0.0)
    sums += tl.load(best_scores + num_first + second[None, :], mask=present, other=0.0)
    ids = tl.load(best_keys + first[None, :], mask=present, other=0) * second_size
    ids += tl.load(best_keys + num_first + second[None, :], mask=present, other=0)
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
    tl.store(chosen + places, _pack(ordered, ids), mask=is_chosen & is_token)


@triton.jit
def choose_kernel(
    chosen,
    best_scores,
    best_keys,
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

    best_scores, best_keys, num_first, num_second, second_size: as in `best_keys_kernel`.
    candidates: ranks (2, C) int32.
    """
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    rows = tokens * (num_first + num_second)
    _store_chosen(
        chosen + tokens * k,
        best_scores + rows,
        best_keys + rows,
        candidates,
        num_first,
        num_candidates,
        second_size,
        k,
        tokens < num_tokens,
        BLOCK_T,
        BLOCK_CANDIDATES,
    )


@triton.jit
def _sort_chosen(
    chosen,
    scores,
    first_scores,
    second_scores,
    second_size,
    k,
    is_token,
    BLOCK_K: tl.constexpr,
):
    """Sort the packed experts, unpack them in place, and sum their scores: pointers to rows."""
    slots = tl.arange(0, BLOCK_K)[None, :]
    is_slot = is_token & (slots < k)
    packed = tl.load(chosen + slots, mask=is_slot, other=-(2**63))
    ids = _ids_of(tl.sort(packed, descending=True))
    first = ids // second_size
    second = ids - first * second_size
    sums = tl.load(first_scores + first, mask=is_slot, other=0.0).to(tl.float32)
    sums += tl.load(second_scores + second, mask=is_slot, other=0.0).to(tl.float32)
    # Any is stored after all are loaded.
    tl.debug_barrier()
    tl.store(chosen + slots, ids.to(tl.int64), mask=is_slot)
    tl.store(scores + slots, sums, mask=is_slot)


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
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    _sort_chosen(
        chosen + tokens * k,
        scores + tokens * k,
        first_scores + tokens * first_stride,
        second_scores + tokens * second_stride,
        second_size,
        k,
        tokens < num_tokens,
        BLOCK_K,
    )


@triton.jit
def fused_choice_kernel(
    first_scores,
    second_scores,
    first_bias,
    second_bias,
    best_scores,
    best_keys,
    num_tokens,
    first_stride,
    second_stride,
    first_size,
    second_size,
    num_first,
    num_second,
    indices,
    scores,
    candidates,
    num_candidates,
    k,
    HAS_FIRST_BIAS: tl.constexpr,
    HAS_SECOND_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Do the work of `best_keys_kernel`, `choose_kernel` and `order_kernel` in one launch.

    indices, scores: (T, k) int64 and float32. Other arguments as in those.
    """
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    is_token = tokens < num_tokens
    rows = tokens * (num_first + num_second)
    first_rows = first_scores + tokens * first_stride
    second_rows = second_scores + tokens * second_stride
    _store_best_keys(
        best_scores + rows,
        best_keys + rows,
        first_rows,
        first_bias,
        first_size,
        num_first,
        is_token,
        HAS_FIRST_BIAS,
        BLOCK_KEYS,
        BLOCK_BEST,
    )
    _store_best_keys(
        best_scores + rows + num_first,
        best_keys + rows + num_first,
        second_rows,
        second_bias,
        second_size,
        num_second,
        is_token,
        HAS_SECOND_BIAS,
        BLOCK_KEYS,
        BLOCK_BEST,
    )
    # All are stored before any is loaded.
    tl.debug_barrier()
    _store_chosen(
        indices + tokens * k,
        best_scores + rows,
        best_keys + rows,
        candidates,
        num_first,
        num_candidates,
        second_size,
        k,
        is_token,
        BLOCK_T,
        BLOCK_CANDIDATES,
    )
    tl.debug_barrier()
    _sort_chosen(
        indices + tokens * k,
        scores + tokens * k,
        first_rows,
        second_rows,
        second_size,
        k,
        is_token,
        BLOCK_K,
    )


@triton.jit
def _add_same_key(value, key, next_value, next_key):
    return tl.where(key == next_key, value + next_value, next_value), next_key


@triton.jit
def axis_grads_kernel(
    score_grads,
    indices,
    first_grads,
    second_grads,
    num_tokens,
    first_size,
    second_size,
    k,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Sum the gradients (T, k) of each key: (T, A) and (T, B). Grid (blocks of tokens, 2).

    Sorted by key, and by slot below it, the gradients of a key are a run; its last element in a
    scan of sums within runs is the key's. PACKED: dtype for a key above 16 bits of a slot.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_K)
    is_token = (tokens < num_tokens)[:, None]
    is_slot = is_token & (slots < k)[None, :]
    rows = tokens[:, None] * k
    ids = tl.load(indices + rows + slots[None, :], mask=is_slot, other=0).to(tl.int32)
    if tl.program_id(1) == 0:
        keys = ids // second_size
        num_keys, grads = first_size, first_grads
    else:
        keys = ids % second_size
        num_keys, grads = second_size, second_grads
    grads += tokens[:, None] * num_keys
    every_key = tl.arange(0, BLOCK_KEYS)[None, :]
    zeros = tl.zeros([BLOCK_T, BLOCK_KEYS], tl.float32)
    store_rounded(grads + every_key, zeros, is_token & (every_key < num_keys))
    # Behind all keys.
    behind = (tl.zeros([BLOCK_T, BLOCK_K], PACKED) + num_keys) << 16
    packed = tl.sort(tl.where(is_slot, (keys.to(PACKED) << 16) | slots[None, :], behind))
    keys = packed >> 16
    present = keys < num_keys
    values = tl.load(score_grads + rows + (packed & 0xFFFF), mask=present, other=0.0)
    sums, _ = tl.associative_scan((values, keys), 1, _add_same_key)
    ones = tl.full([BLOCK_T, BLOCK_K], 1, tl.int32)
    to_end, _ = tl.associative_scan((ones, keys), 1, _add_same_key, reverse=True)
    # All zeros are written before any sum.
    tl.debug_barrier()
    store_rounded(grads + keys, sums, present & (to_end == 1))
