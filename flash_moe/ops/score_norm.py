"""Batch normalization of key scores over the tokens of all ranks, forward and backward.

T tokens of this rank, N keys. In torch.compile these are operations of PyTorch, which it fuses.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_moe.ops.backend_choice import default_backend, uses_triton
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.observation import is_observed
from flash_moe.ops.sum_over_ranks import SumOverRanks
from flash_moe.ops.triton_launch import cdiv, launch

BLOCK_TOKENS, BLOCK_KEYS = 64, 128


class Statistics(NamedTuple):
    """Statistics of each key's scores over all tokens: mean and 1 / sqrt(variance + eps), (N,).

    moments: number of tokens, and their sums of x and of x^2: (1 + 2 N,) float64.
    """

    mean: Tensor
    scale: Tensor
    moments: Tensor


@torch.no_grad()
def batch_statistics(scores: Tensor, eps: float, sum_over_ranks: SumOverRanks | None) -> Statistics:
    """Compute the statistics of scores (T, N) over the tokens of all ranks.

    sum_over_ranks: None for this rank alone.
    """
    moments = _moments(dense_rows(scores))
    if sum_over_ranks is not None:
        sum_over_ranks(moments)
    num_keys = scores.shape[1]
    if _has_kernels(scores):
        from flash_moe.ops.score_norm_kernels import statistics_kernel

        mean, scale = torch.empty(2, num_keys, dtype=torch.float32, device=scores.device)
        launch(
            statistics_kernel,
            (cdiv(num_keys, BLOCK_KEYS),),
            moments,
            mean,
            scale,
            num_keys,
            eps,
            BLOCK_N=BLOCK_KEYS,
        )
        return Statistics(mean, scale, moments)
    mean, variance = mean_and_variance(moments)
    wide = accumulator_dtype(scores.dtype)
    return Statistics(mean.to(wide), (variance + eps).rsqrt().to(wide), moments)


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, each (N,) float64, of moments (1 + 2 N,); 0 of no tokens."""
    mean, mean_square = (moments[1:] / moments[0].clamp(min=1)).chunk(2)
    return mean, (mean_square - mean.square()).clamp(min=0)


def normalize(
    scores: Tensor, statistics: Statistics, sum_over_ranks: SumOverRanks | None
) -> Tensor:
    """Normalize scores (T, N) by their own statistics, through which gradients flow.

    Returns:
        (x - mean) scale in float32, or float64 if the scores are.
    """
    normalized: Tensor = _Normalize.apply(dense_rows(scores), *statistics, sum_over_ranks)
    return normalized


class _Normalize(torch.autograd.Function):
    """Normalizes scores by their statistics, and differentiates through these.

    With y the result, g its gradient, and means over the tokens of all ranks, the gradient of x
    is scale (g - mean(g) - y mean(g y)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        mean: Tensor,
        scale: Tensor,
        moments: Tensor,
        sum_over_ranks: SumOverRanks | None,
    ) -> Tensor:
        ctx.save_for_backward(scores, mean, scale, moments)
        ctx.sum_over_ranks = sum_over_ranks
        if not _has_kernels(scores):
            return (scores - mean) * scale
        from flash_moe.ops.score_norm_kernels import normalize_kernel

        normalized = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        _launch_tiles(normalize_kernel, scores, mean, scale, normalized)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, mean, scale, moments = ctx.saved_tensors
        if not _has_kernels(scores):
            normalized = (scores - mean) * scale
            sums = torch.stack([grads.sum(0), (grads * normalized).sum(0)])
            if ctx.sum_over_ranks is not None:
                ctx.sum_over_ranks(sums)
            offset, slope = sums / moments[0].clamp(min=1).to(sums.dtype)
            score_grads = scale * (grads - offset - normalized * slope)
            return score_grads.to(scores.dtype), None, None, None, None
        from flash_moe.ops.score_norm_kernels import grad_sums_kernel, score_grads_kernel

        grads = grads.contiguous()
        num_tokens, num_keys = scores.shape
        partial = grads.new_empty(cdiv(num_tokens, BLOCK_TOKENS), 2 * num_keys)
        _launch_tiles(grad_sums_kernel, scores, mean, scale, grads, partial)
        sums = partial.sum(0)
        if ctx.sum_over_ranks is not None:
            ctx.sum_over_ranks(sums)
        score_grads = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        _launch_tiles(score_grads_kernel, scores, mean, scale, grads, sums, moments, score_grads)
        return score_grads, None, None, None, None


def _moments(scores: Tensor) -> Tensor:
    """Moments of this rank's tokens, as in `Statistics`."""
    num_tokens, num_keys = scores.shape
    if num_tokens == 0:
        return torch.zeros(1 + 2 * num_keys, dtype=torch.float64, device=scores.device)
    if _has_kernels(scores):
        from flash_moe.ops.score_norm_kernels import moments_kernel

        shape = (cdiv(num_tokens, BLOCK_TOKENS), 1 + 2 * num_keys)
        partial = torch.empty(shape, dtype=torch.float64, device=scores.device)
        _launch_tiles(moments_kernel, scores, partial)
        return partial.sum(0)
    wide = scores.to(accumulator_dtype(scores.dtype))
    variance, mean = (one.double() for one in torch.var_mean(wide, dim=0, correction=0))
    sums = torch.cat([torch.ones_like(mean[:1]), mean, variance + mean.square()])
    return sums * num_tokens


def dense_rows(scores: Tensor) -> Tensor:
    return scores if scores.stride(1) == 1 else scores.contiguous()


def _has_kernels(scores: Tensor) -> bool:
    return (
        not is_observed()
        # Fake tensors and those on the meta device have no values.
        and type(scores) is Tensor
        and not scores.is_meta
        and scores.dtype != torch.float64
        and uses_triton(default_backend(scores.device))
    )


def _launch_tiles(kernel: Any, scores: Tensor, *tensors: Tensor) -> None:
    """Launch a kernel over the tiles of scores (T, N) with dense rows."""
    num_tokens, num_keys = scores.shape
    if num_tokens == 0:
        return
    launch(
        kernel,
        (cdiv(num_tokens, BLOCK_TOKENS), cdiv(num_keys, BLOCK_KEYS)),
        scores,
        *tensors,
        num_tokens,
        num_keys,
        scores.stride(0),
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_N=BLOCK_KEYS,
        num_warps=8,
    )
