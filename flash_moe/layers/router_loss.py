"""Losses that keep a product-key router balanced, and the function that gives them to a loop.

T tokens of this rank, A and B keys of the two axes, K experts for each token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flash_moe.arguments import check_type
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.sum_over_ranks import SumOverRanks


class KeepsLosses(nn.Module):
    """Module that adds up losses of its forward passes until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._loss: Tensor | None = None

    def keep_loss(self, loss: Tensor) -> None:
        """Add the loss of a forward pass."""
        self._loss = loss if self._loss is None else self._loss + loss

    def take_loss(self) -> Tensor | None:
        """Return the sum since the last call, None without any, and forget it."""
        taken, self._loss = self._loss, None
        return taken


def router_loss(model: nn.Module) -> Tensor:
    """Add up the auxiliary losses of all routers in `model`, with their coefficients.

        loss = cross_entropy(model(tokens), targets) + router_loss(model)

    Counts each forward pass in training, with gradients enabled, since the last call. Call it once
    for each backward pass: with gradient accumulation, for each micro-batch, scaled as its loss.
    The forward pass that activation checkpointing repeats does not count; `use_reentrant=False` is
    needed there.

    Returns:
        A scalar with a gradient; 0 if no router has `aux_loss_coef` or `z_loss_coef`.

    Raises:
        TypeError: `model` is no module.
    """
    check_type("model", model, nn.Module)
    losses = [module.take_loss() for module in model.modules() if isinstance(module, KeepsLosses)]
    kept = [loss for loss in losses if loss is not None]
    return torch.stack(kept).sum() if kept else torch.zeros(())


def num_loss_sums(key_grid: tuple[int, int]) -> int:
    """Numbers that `balancing_loss` sums over the ranks."""
    return 3 + 2 * sum(key_grid)


def balancing_loss(
    scores: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor,
    aux_loss_coef: float,
    z_loss_coef: float,
    sum_over_ranks: SumOverRanks | None,
) -> Tensor:
    """Compute the losses of a router over the tokens of all data-parallel ranks.

    aux_loss_coef * sum over both axes of N sum_i p_i f_i + z_loss_coef * mean over tokens of the
    sum over both axes of logsumexp(scores)^2, where N is the number of keys of the axis, p_i the
    mean over tokens of softmax(scores)_i, and f_i the share of the chosen (token, expert) pairs
    whose key is i. p_i and f_i are the marginals of the experts' probabilities and shares; each
    axis gives 1 if either is even. (Over experts: Fedus et al. 2021, arXiv:2101.03961, equation 4;
    z-loss: Zoph et al. 2022, arXiv:2202.08906, equation 5.)

    The value is the same on every rank. Its gradient on a rank is for a loss that is averaged over
    ranks, as FSDP and DDP do.

    Args:
        scores: (T, A) and (T, B), with gradients.
        indices: (T, K) chosen experts i * B + j.
        counts: (A + B,) chosen experts of each key, see `flash_moe.ops.key_load`.
    """
    key_grid = (scores[0].shape[1], scores[1].shape[1])
    num_keys = sum(key_grid)
    wide = accumulator_dtype(scores[0].dtype)
    scores = [one.to(wide) for one in scores]
    log_sums = [one.logsumexp(-1) for one in scores]
    shares = [
        (one - log_sum.unsqueeze(-1)).exp() for one, log_sum in zip(scores, log_sums, strict=True)
    ]
    squares = torch.stack(log_sums).square().sum()
    with torch.no_grad():
        one = torch.ones_like(squares, dtype=torch.float64)
        rest = torch.stack([squares.double(), one * indices.shape[0], one])
        sums = torch.cat([*(share.double().sum(0) for share in shares), counts, rest])
        if sum_over_ranks is not None:
            sum_over_ranks(sums)
        probabilities, counts, rest = sums.split([num_keys, num_keys, 3])
        total_squares, num_tokens, num_ranks = rest.unbind()
        num_tokens = num_tokens.clamp(min=1)
        weights = [
            (aux_loss_coef * len(count) / indices.shape[1]) * count / num_tokens
            for count in counts.split(key_grid)
        ]
        value = (torch.cat(weights) * probabilities).sum() + z_loss_coef * total_squares
        value = value / num_tokens
        scale = (num_ranks / num_tokens).to(squares.dtype)
    own = z_loss_coef * squares
    for share, weight in zip(shares, weights, strict=True):
        # No matrix product, which autocast would compute in 16 bits.
        own = own + (share * weight.to(share.dtype)).sum()
    own = own * scale
    # The value is of all ranks, the gradient of this rank's part.
    return own + (value.to(own.dtype) - own).detach()
