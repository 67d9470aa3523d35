"""Batch normalization of key scores over the tokens of all data-parallel ranks.

T tokens of this rank, N keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_moe.layers.statistics import StatisticsModule, SumOverRanks, is_recomputing
from flash_moe.ops.dtypes import accumulator_dtype

EPS = 1e-5
# Weight of a step in the running statistics, as in torch.nn.BatchNorm1d.
MOMENTUM = 0.1


class ScoreNorm(StatisticsModule):
    """Normalizes the scores of each key: (x - mean) / sqrt(variance + 1e-5), without affine part.

    In training, mean and variance are over the tokens of a forward pass on all data-parallel
    ranks; gradients flow through them. In evaluation, they are the running statistics. These are
    updated once for each optimizer step, by mean and unbiased variance of all tokens since the last
    step: micro-batches that accumulate gradients count as one batch. (Ioffe and Szegedy 2015,
    arXiv:1502.03167; of a product-key memory's queries: Lample et al. 2019, arXiv:1907.05242.)

    Args:
        num_keys: N.
        device: where the statistics live.
    """

    running_mean: Tensor
    running_var: Tensor
    moments: Tensor

    def __init__(self, num_keys: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_keys = num_keys
        zeros = torch.zeros(num_keys, dtype=torch.float32, device=device)
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", torch.ones_like(zeros))
        # Number of tokens since the last step, and their sums of x and of x^2.
        moments = torch.zeros(self.num_sums, dtype=torch.float64, device=device)
        self.register_buffer("moments", moments, persistent=False)

    @property
    def num_sums(self) -> int:
        """Numbers that a forward pass in training sums over the ranks."""
        return 1 + 2 * self.num_keys

    def reset_parameters(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.moments.zero_()

    def forward(self, scores: Tensor, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
        """Normalize scores (T, N); the result is in float32, or float64 if the scores are."""
        wide = scores.to(accumulator_dtype(scores.dtype))
        if not self.training:
            mean, scale = self.running_mean, (self.running_var + EPS).rsqrt()
            return (wide - mean.to(wide.dtype)) * scale.to(wide.dtype)
        with torch.no_grad():
            moments = _moments(wide)
            if sum_over_ranks is not None:
                sum_over_ranks(moments)
            if not is_recomputing():
                self.moments += moments
            count, mean, variance = self._statistics(moments)
            scale = (variance + EPS).rsqrt()
        normalized: Tensor = _Normalize.apply(
            wide, mean.to(wide.dtype), scale.to(wide.dtype), count, sum_over_ranks
        )
        return normalized

    def _statistics(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and variance in float64; of no tokens 0, 0 and 0."""
        count = moments[0]
        mean, mean_square = (moments[1:] / count.clamp(min=1)).split(self.num_keys)
        return count, mean, (mean_square - mean.square()).clamp(min=0)

    @torch.no_grad()
    def update(self) -> None:
        """Take what was added up since the last update into the running statistics."""
        count, mean, variance = self._statistics(self.moments)
        # One token has no variance.
        momentum = MOMENTUM * (count > 1).to(count.dtype)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(mean.to(dtype), momentum.to(dtype))
        self.running_var.lerp_(unbiased.to(dtype), momentum.to(dtype))
        self.moments.zero_()

    def extra_repr(self) -> str:
        return f"num_keys={self.num_keys}"


def _moments(scores: Tensor) -> Tensor:
    """Number of tokens, and their sums of x and of x^2: (1 + 2 N,) float64."""
    num_tokens, num_keys = scores.shape
    if num_tokens == 0:
        return torch.zeros(1 + 2 * num_keys, dtype=torch.float64, device=scores.device)
    variance, mean = (one.double() for one in torch.var_mean(scores, dim=0, correction=0))
    sums = torch.cat([torch.ones_like(mean[:1]), mean, variance + mean.square()])
    return sums * num_tokens


class _Normalize(torch.autograd.Function):
    """(x - mean) scale, with mean and scale as functions of x of all ranks in the backward pass.

    With y the result, g its gradient and means over the tokens of all ranks, the gradient of x is
    scale (g - mean(g) - y mean(g y)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        mean: Tensor,
        scale: Tensor,
        count: Tensor,
        sum_over_ranks: SumOverRanks | None,
    ) -> Tensor:
        normalized = (scores - mean) * scale
        ctx.save_for_backward(normalized, scale, count)
        ctx.sum_over_ranks = sum_over_ranks
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalized, scale, count = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * normalized).sum(0)])
        if ctx.sum_over_ranks is not None:
            ctx.sum_over_ranks(sums)
        mean, slope = sums / count.clamp(min=1).to(sums.dtype)
        return scale * (grad - mean - normalized * slope), None, None, None, None
