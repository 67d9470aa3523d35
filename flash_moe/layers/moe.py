"""A feed-forward layer: routed experts in parallel with a shared gated MLP."""

import torch
from torch import Tensor, nn

from flash_moe.layers.experts import FlashExperts
from flash_moe.layers.router import ProductKeyRouter


class SharedMLP(nn.Module):
    """Gated MLP applied to every token: down(silu(gate(x)) * up(x)).

    (SwiGLU: Shazeer 2020, arXiv:2002.05202.)

    Args:
        hidden_size: H.
        intermediate_size: I, the width of the hidden layer.
        device, dtype: of the parameters.
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

    Args:
        hidden_size: H.
        intermediate_size: width of the shared MLP.
        num_experts: E.
        num_experts_per_tok: K, at most E.
        norm_topk_prob: scale the routing weights of a token to sum to one.
        device, dtype: of the parameters.

    Raises:
        ValueError: as `ProductKeyRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = False,
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
        self.experts = FlashExperts(num_experts, hidden_size, device=device, dtype=dtype)
        self.shared_mlp = SharedMLP(hidden_size, intermediate_size, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., H) to (..., H), in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: as `ProductKeyRouter` and `FlashExperts`.
            RuntimeError: hidden_states has another dtype than the router's parameters.

        If experts are sharded and one rank raises any of these, all ranks do.
        """
        try:
            indices, routing_weights = self.router(hidden_states)
        except (TypeError, ValueError, RuntimeError) as error:
            # Ranks that share the experts would wait for this one.
            self.experts.fail(error)
        routed = self.experts(hidden_states, indices, routing_weights)
        return self.shared_mlp(hidden_states) + routed
