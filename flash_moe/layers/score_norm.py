"""Batch normalization of key scores over the tokens of all data-parallel ranks.

T tokens of this rank, N keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.layers.recomputation import accumulate
from flash_moe.layers.wide_buffers import WideBuffers
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.score_norm import (
    batch_statistics,
    mean_and_variance,
    normalize,
)
from flash_moe.ops.sum_over_ranks import SumOverRanks

EPS = 1e-5
# Weight of a step in the running statistics, as in torch.nn.BatchNorm1d.
MOMENTUM = 0.1


class NormalizedScores(NamedTuple):
    """Normalized scores (T, N), and the moments (1 + 2 N,) that they add; None in evaluation."""

    scores: Tensor
    moments: Tensor | None


class ScoreNorm(WideBuffers):
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
    accumulators = ("moments",)

    def __init__(self, num_keys: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_keys = num_keys
        zeros = torch.zeros(num_keys, dtype=torch.float32, device=device)
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", torch.ones_like(zeros))
        # Number of tokens since the last step, and their sums of x and of x^2.
        self.moments = torch.zeros(self.num_sums, dtype=torch.float64, device=device)

    @property
    def num_sums(self) -> int:
        """Numbers that a forward pass in training sums over the ranks."""
        return 1 + 2 * self.num_keys

    def reset_parameters(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.moments.zero_()

    def forward(
        self,
        scores: Tensor,
        sum_over_ranks: SumOverRanks | None = None,
        sum_in_backward: SumOverRanks | None = None,
    ) -> NormalizedScores:
        """Normalize scores (T, N); the result is in float32, or float64 if the scores are.

        The moments count once `add` gets them.

        Args:
            sum_over_ranks, sum_in_backward: for the forward and for the backward pass.
        """
        if not self.training:
            wide = accumulator_dtype(scores.dtype)
            scale = (self.running_var + EPS).rsqrt()
            mean = self.running_mean.to(wide)
            return NormalizedScores((scores - mean) * scale.to(wide), None)
        statistics = batch_statistics(scores.detach(), EPS, sum_over_ranks)
        normalized = normalize(scores, statistics, sum_in_backward)
        return NormalizedScores(normalized, statistics.moments)

    @torch.no_grad()
    def add(self, moments: Tensor) -> None:
        """Count the tokens of a forward pass, unless it is repeated."""
        if self.moments.device != moments.device:
            # A state dict was assigned to a module on the meta device.
            self.moments = torch.zeros_like(moments)
        accumulate(self.moments, moments)

    @torch.no_grad()
    def update(self) -> None:
        """Take what was added up since the last update into the running statistics."""
        # A batch with a score that is not finite is left out.
        moments = torch.where(self.moments.isfinite().all(), self.moments, 0.0)
        count, (mean, variance) = moments[0], mean_and_variance(moments)
        # One token has no variance.
        momentum = MOMENTUM * (count > 1).to(count.dtype)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(mean.to(dtype), momentum.to(dtype))
        self.running_var.lerp_(unbiased.to(dtype), momentum.to(dtype))
        self.moments.zero_()

    def extra_repr(self) -> str:
        return f"num_keys={self.num_keys}"
