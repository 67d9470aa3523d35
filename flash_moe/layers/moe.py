"""A feed-forward layer: routed experts in parallel with a shared gated MLP."""

import math
from functools import cache
from heapq import nlargest
from random import Random
from typing import NoReturn

import torch
from torch import Tensor, nn

from flash_moe.arguments import (
    check_dense,
    check_fits,
    check_parameter_device,
    check_parameter_dtype,
    checked_int,
)
from flash_moe.layers.experts import FlashExperts
from flash_moe.layers.router import (
    BIAS_UPDATE_RATE,
    ProductKeyRouter,
    ScoreNormName,
    squarest_grid,
)
from flash_moe.ops.product_keys import candidate_ranks

# E[silu(b)^2] for b ~ N(0, 1), and E[silu(a)^2] for a ~ N(0, 1/3).
MEAN_SQUARE_SILU, MEAN_SQUARE_SILU_THIRD = 0.3557755, 0.0997717
# Variance of a key's scores as `nn.Linear` begins, for hidden states ~ N(0, 1).
SCORE_VARIANCE = 1 / 3
# Draws in `mean_square_weights`, and numbers drawn or added up in them: the error is then some 2 %.
MAX_DRAWS, MAX_NUMBERS = 2**12, 2**17


class SharedMLP(nn.Module):
    """Gated MLP applied to every token: down(silu(gate(x)) * up(x)).

    (SwiGLU: Shazeer 2020, arXiv:2002.05202.)

    Args:
        hidden_size: H.
        intermediate_size: I, the width of the hidden layer.
        device, dtype: where the parameters live, and their type.

    Raises:
        TypeError: a size is no integer, device no device, or dtype no float dtype of the op.
        ValueError: a size is negative, or PyTorch knows no device of that name.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_parameter_device(device)
        check_parameter_dtype(dtype)
        hidden_size = checked_int("hidden_size", hidden_size, 0)
        intermediate_size = checked_int("intermediate_size", intermediate_size, 0)
        self.hidden_size = hidden_size
        self.gate_proj = nn.Linear(
            hidden_size, intermediate_size, bias=False, device=device, dtype=dtype
        )
        self.up_proj = nn.Linear(
            hidden_size, intermediate_size, bias=False, device=device, dtype=dtype
        )
        self.down_proj = nn.Linear(
            intermediate_size, hidden_size, bias=False, device=device, dtype=dtype
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., H) to (..., H).

        Raises:
            TypeError, ValueError: see `check_input`.
        """
        self.check_input(hidden_states)
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)

    def check_input(self, hidden_states: Tensor) -> None:
        """Raise unless a forward pass can take `hidden_states`.

        Raises:
            TypeError: it is no dense tensor, or has another dtype than the parameters outside of
                autocast.
            ValueError: its last dimension is not H, or it is on another device.
        """
        check_dense("hidden_states", hidden_states)
        if hidden_states.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"hidden_states must have rows of hidden_size = {self.hidden_size}, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        check_fits(hidden_states, self.gate_proj)


class FlashMoE(nn.Module):
    """Feed-forward layer: product-key router, routed experts, and a shared MLP in parallel.

    With `norm_topk_prob`, the outputs of the routed experts and of the shared MLP have the same
    standard deviation at first, whatever E and K: see `initial_up_std`.

    Args:
        hidden_size: H.
        intermediate_size: width of the shared MLP.
        num_experts: E.
        num_experts_per_tok: K, at most E.
        norm_topk_prob: scale the routing weights of a token to sum to one. False was the default
            before version 0.2.0: weights are then probabilities among all E experts, whose sum of
            about K / E makes the routed experts' output, and the gradients of their tables,
            vanish beside the shared MLP's, and the up table begins with a standard deviation of 1.
            Pass False to load a model that was trained so: its parameters do not tell.
        device, dtype: where the parameters live, and their type.
        score_norm, aux_loss_coef, z_loss_coef, bias_update_rate, force_load_balance: what keeps the
            load of the experts even, see `ProductKeyRouter`.

    Raises:
        TypeError, ValueError: see `ProductKeyRouter` and `SharedMLP`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        score_norm: ScoreNormName = "batch",
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = BIAS_UPDATE_RATE,
        force_load_balance: bool = False,
    ) -> None:
        super().__init__()
        self.router = ProductKeyRouter(
            hidden_size,
            num_experts,
            num_experts_per_tok,
            norm_topk_prob,
            device=device,
            dtype=dtype,
            score_norm=score_norm,
            aux_loss_coef=aux_loss_coef,
            z_loss_coef=z_loss_coef,
            bias_update_rate=bias_update_rate,
            force_load_balance=force_load_balance,
        )
        up_std = 1.0
        if norm_topk_prob:
            score_variance = SCORE_VARIANCE if score_norm is None else 1.0
            up_std = initial_up_std(num_experts, num_experts_per_tok, score_variance)
        self.experts = FlashExperts(num_experts, hidden_size, device, dtype, up_std)
        self.router.sum_over_ranks = self.experts.sum_over_ranks
        self.router.counts_passes = False
        self.shared_mlp = SharedMLP(hidden_size, intermediate_size, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., H) to (..., H), in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: see `ProductKeyRouter`, `FlashExperts` and `SharedMLP`.

        If experts are sharded and one rank raises such an error, all ranks do; not if a shared MLP
        with hooks of its own, such as FSDP's, raises it.
        """
        try:
            check_dense("hidden_states", hidden_states)
            # With a hook, such as FSDP's, the MLP gets other parameters or hidden states than now.
            if isinstance(self.shared_mlp, SharedMLP) and not self.shared_mlp._forward_pre_hooks:
                self.shared_mlp.check_input(hidden_states)
            indices, routing_weights = self.router(hidden_states)
        except (TypeError, ValueError, RuntimeError) as error:
            self.fail(error)
        routed = self.experts(hidden_states, indices, routing_weights)
        if isinstance(self.router, ProductKeyRouter):
            # All ranks have succeeded.
            self.router.count_pass()
        return self.shared_mlp(hidden_states) + routed

    def fail(self, error: Exception) -> NoReturn:
        """Raise `error` instead of a forward pass, on every rank if the experts are sharded."""
        # Ranks that share router statistics and experts would wait for this one.
        if isinstance(self.router, ProductKeyRouter) and not self.router.complete_sums():
            raise error
        self.experts.fail(error)


def initial_up_std(
    num_experts: int, num_experts_per_tok: int, score_variance: float = SCORE_VARIANCE
) -> float:
    """Standard deviation of the up table at which routed and shared outputs begin alike.

    For hidden states x ~ N(0, 1), as norms give them, in the initial state:

    - `nn.Linear` draws weights of variance 1 / (3 inputs), so an element of the shared MLP's output
      has variance E[silu(a)^2] / 9 with a ~ N(0, 1/3).
    - An element of the routed sum over k of g_k silu(<x, d_k>) u_k has variance
      std^2 E[silu(b)^2] S with b ~ N(0, 1), where S is the mean of the sum over k of g_k^2, the g
      being scaled to sum to one (`mean_square_weights`).

    Equal variances give std = sqrt(E[silu(a)^2] / (9 E[silu(b)^2] S)).

    Args:
        score_variance: of a key's scores, over tokens: 1/3 as `nn.Linear` gives them, 1 if they are
            normalized.
    """
    weights = mean_square_weights(num_experts, num_experts_per_tok, score_variance)
    return math.sqrt(MEAN_SQUARE_SILU_THIRD / (9 * MEAN_SQUARE_SILU * weights))


@cache
def mean_square_weights(num_experts: int, num_experts_per_tok: int, score_variance: float) -> float:
    """Estimate S, the mean over tokens of the sum of squares of a token's normalised weights.

    The weights are a softmax over the K largest of the sums a_i + b_j of two keys' scores, which
    at first are a_i, b_j ~ N(0, v). S is 1 for K = 1, and approaches e^(2 v) / K for K = E and
    1 / K for K << E, both as E grows; for E in the thousands it is still up to a tenth from these,
    since sums that share a key depend on each other. There is no closed form for that, so S is
    the mean of random draws: always the same ones, which leave all other generators as they are.
    """
    grid = squarest_grid(num_experts)
    candidates = candidate_ranks(num_experts_per_tok, *grid)
    random, deviation = Random(0), math.sqrt(score_variance)
    draws = max(1, min(MAX_DRAWS, MAX_NUMBERS // (sum(grid) + len(candidates))))
    total = 0.0
    for _ in range(draws):
        a, b = (
            sorted((random.gauss(0, deviation) for _ in range(keys)), reverse=True) for keys in grid
        )
        scores = nlargest(num_experts_per_tok, (a[i] + b[j] for i, j in candidates))
        weights = [math.exp(score) for score in scores]
        total += math.fsum(one * one for one in weights) / math.fsum(weights) ** 2
    return total / draws
