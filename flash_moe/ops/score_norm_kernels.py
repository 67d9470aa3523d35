"""Kernels of batch normalization of key scores: one read of the scores for each of the four.

T tokens, N keys; grid (blocks of tokens, blocks of keys). Sums are those of a block of tokens, so
that adding them up in order gives the same bits in every run.
"""

# Triton's language has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from flash_moe.ops.backends.kernel_utils import store_rounded


@triton.jit
def _tile(num_tokens, num_keys, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens, keys, and which are present of a program's tile."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = (tokens < num_tokens)[:, None] & (keys < num_keys)[None, :]
    return tokens[:, None], keys[None, :], present


@triton.jit
def moments_kernel(
    scores, sums, num_tokens, num_keys, stride, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store each block's number of tokens, sums of x and of x^2: (blocks, 1 + 2 N) float64."""
    tokens, keys, present = _tile(num_tokens, num_keys, BLOCK_T, BLOCK_N)
    x = tl.load(scores + tokens * stride + keys, mask=present, other=0.0).to(tl.float32)
    block = tl.program_id(0).to(tl.int64)
    count = tl.minimum(BLOCK_T, num_tokens - block * BLOCK_T)
    mean = tl.sum(x, axis=0) / count
    # About the block's mean, as the squares of float32 would lose a spread that is small beside it.
    away = tl.where(present, x - mean[None, :], 0.0)
    squares = tl.sum(away * away, axis=0).to(tl.float64)
    mean = mean.to(tl.float64)
    row = sums + block * (1 + 2 * num_keys)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = columns < num_keys
    tl.store(row, count.to(tl.float64))
    tl.store(row + 1 + columns, mean * count, mask=is_key)
    tl.store(row + 1 + num_keys + columns, squares + mean * mean * count, mask=is_key)


@triton.jit
def statistics_kernel(sums, mean, scale, num_keys, eps, BLOCK_N: tl.constexpr):
    """Store mean and 1 / sqrt(variance + eps) (N,) of sums (1 + 2 N,). Grid (blocks of keys,)."""
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = keys < num_keys
    count = tl.load(sums)
    first = tl.load(sums + 1 + keys, mask=is_key, other=0.0)
    second = tl.load(sums + 1 + num_keys + keys, mask=is_key, other=0.0)
    divisor = tl.maximum(count, 1.0)
    average = first / divisor
    variance = tl.maximum(second / divisor - average * average, 0.0)
    tl.store(mean + keys, average.to(tl.float32), mask=is_key)
    tl.store(scale + keys, (1 / tl.sqrt(variance + eps)).to(tl.float32), mask=is_key)


@triton.jit
def _normalized(scores, mean, scale, tokens, keys, present, num_keys, stride):
    """Return (x - mean) scale of a tile, and scale (1, BLOCK_N), in float32."""
    is_key = keys < num_keys
    x = tl.load(scores + tokens * stride + keys, mask=present, other=0.0).to(tl.float32)
    scales = tl.load(scale + keys, mask=is_key, other=0.0)
    return (x - tl.load(mean + keys, mask=is_key, other=0.0)) * scales, scales


@triton.jit
def normalize_kernel(
    scores,
    mean,
    scale,
    normalized,
    num_tokens,
    num_keys,
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store (x - mean) scale: (T, N) float32."""
    tokens, keys, present = _tile(num_tokens, num_keys, BLOCK_T, BLOCK_N)
    y, _ = _normalized(scores, mean, scale, tokens, keys, present, num_keys, stride)
    tl.store(normalized + tokens * num_keys + keys, y, mask=present)


@triton.jit
def grad_sums_kernel(
    scores,
    mean,
    scale,
    grads,
    sums,
    num_tokens,
    num_keys,
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store each block's sums of g and of g y, with g the gradients of y: (blocks, 2 N) float32."""
    tokens, keys, present = _tile(num_tokens, num_keys, BLOCK_T, BLOCK_N)
    y, _ = _normalized(scores, mean, scale, tokens, keys, present, num_keys, stride)
    g = tl.load(grads + tokens * num_keys + keys, mask=present, other=0.0)
    row = sums + tl.program_id(0).to(tl.int64) * 2 * num_keys
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_key = columns < num_keys
    tl.store(row + columns, tl.sum(g, axis=0), mask=is_key)
    tl.store(row + num_keys + columns, tl.sum(g * y, axis=0), mask=is_key)


@triton.jit
def score_grads_kernel(
    scores,
    mean,
    scale,
    grads,
    sums,
    moments,
    score_grads,
    num_tokens,
    num_keys,
    stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the gradients of x, scale (g - mean(g) - y mean(g y)).

    sums: of g and of g y over all tokens (2 N,). moments: their number first.
    """
    tokens, keys, present = _tile(num_tokens, num_keys, BLOCK_T, BLOCK_N)
    y, scales = _normalized(scores, mean, scale, tokens, keys, present, num_keys, stride)
    g = tl.load(grads + tokens * num_keys + keys, mask=present, other=0.0)
    per_token = 1 / tl.maximum(tl.load(moments), 1.0).to(tl.float32)
    is_key = keys < num_keys
    offset = tl.load(sums + keys, mask=is_key, other=0.0) * per_token
    slope = tl.load(sums + num_keys + keys, mask=is_key, other=0.0) * per_token
    store_rounded(
        score_grads + tokens * num_keys + keys, scales * (g - offset - y * slope), present
    )
