"""A feed-forward layer: routed experts in parallel with a shared gated MLP."""

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn

from flash_moe.layers.experts import FlashExperts
from flash_moe.layers.router import ProductKeyRouter

# E[silu(b)^2] for b ~ N(0, 1), and E[silu(a)^2] for a ~ N(0, 1/3).
MEAN_SQUARE_SILU, MEAN_SQUARE_SILU_THIRD = 0.3557755, 0.0997717
# Of ProductKeyRouter's scores: sums of two logits, each of variance 1/3 by nn.Linear's weights.
INITIAL_SCORE_VARIANCE = 2 / 3


class SharedMLP(nn.Module):
    """Gated MLP applied to every token: down(silu(gate(x)) * up(x)).

    (SwiGLU: Shazeer 2020, arXiv:2002.05202.)

    Args:
        hidden_size: H.
        intermediate_size: I, the width of the hidden layer.
        device, dtype: where the parameters live, and their type.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
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
        """Map (..., H) to (..., H)."""
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)


class FlashMoE(nn.Module):
    """Feed-forward layer: product-key router, routed experts, and a shared MLP in parallel.

    The outputs of the routed experts and of the shared MLP have the same standard deviation at
    first, whatever E and K: see `initial_up_std`.

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

    Raises:
        ValueError: see `ProductKeyRouter`.
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
    ) -> None:
        super().__init__()
        self.router = ProductKeyRouter(
            hidden_size,
            num_experts,
            num_experts_per_tok,
            norm_topk_prob,
            device=device,
            dtype=dtype,
        )
        up_std = initial_up_std(num_experts, num_experts_per_tok) if norm_topk_prob else 1.0
        self.experts = FlashExperts(num_experts, hidden_size, device, dtype, up_std)
        self.shared_mlp = SharedMLP(hidden_size, intermediate_size, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., H) to (..., H), in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: see `ProductKeyRouter` and `FlashExperts`.

        If experts are sharded and one rank raises any of these, all ranks do.
        """
        try:
            indices, routing_weights = self.router(hidden_states)
        except (TypeError, ValueError, RuntimeError) as error:
            # Ranks that share the experts would wait for this one.
            self.experts.fail(error)
        routed = self.experts(hidden_states, indices, routing_weights)
        return self.shared_mlp(hidden_states) + routed


def initial_up_std(num_experts: int, num_experts_per_tok: int) -> float:
    """Standard deviation of the up table at which routed and shared outputs begin alike.

    For hidden states x ~ N(0, 1), as norms give them, in the initial state:

    - `nn.Linear` draws weights of variance 1 / (3 inputs), so an element of the shared MLP's output
      has variance E[silu(a)^2] / 9 with a ~ N(0, 1/3).
    - An element of the routed sum over k of g_k silu(<x, d_k>) u_k has variance
      std^2 E[silu(b)^2] S with b ~ N(0, 1), where S is the mean of the sum over k of g_k^2.
    - The g are a softmax over the K largest of E scores ~ N(0, v). With s ~ N(0, v) and t such that
      P(s > t) = K / E, S = C / K, C = E[e^2s | s > t] / E[e^s | s > t]^2. By the moments of a
      truncated log-normal variable, C = e^v Q(t/sqrt(v) - 2 sqrt(v)) Q(t/sqrt(v)) /
      Q(t/sqrt(v) - sqrt(v))^2, with Q(z) = P(b > z): from 1 for K << E to e^v for K = E.

    Equal variances give std = sqrt(K E[silu(a)^2] / (9 C E[silu(b)^2])).
    """
    deviation = math.sqrt(INITIAL_SCORE_VARIANCE)
    below = NormalDist().cdf
    share = num_experts_per_tok / num_experts
    threshold = -NormalDist().inv_cdf(share) if share < 1 else -math.inf
    spread = math.exp(INITIAL_SCORE_VARIANCE) * below(2 * deviation - threshold) * share
    spread = min(spread / below(deviation - threshold) ** 2, num_experts_per_tok)
    shared = MEAN_SQUARE_SILU_THIRD / 9
    return math.sqrt(num_experts_per_tok * shared / (spread * MEAN_SQUARE_SILU))
