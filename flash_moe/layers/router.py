"""Routing by product keys: the best of E experts from two lists of about sqrt(E) key scores."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flash_moe.arguments import (
    check_fits,
    check_parameter_device,
    check_parameter_dtype,
    checked_int,
)
from flash_moe.ops.product_keys import product_key_topk


class ProductKeyRouter(nn.Module):
    """Scores an expert (i, j) of a key grid by the sum of two log-probabilities.

    Expert i * grid[1] + j has log-probability log_softmax(x A)_i + log_softmax(x B)_j, so the
    probabilities of all experts sum to one. The K best sums are found without computing all of
    them (`flash_moe.ops.product_keys`); of equal ones the expert with the lowest index is better.
    Memory is O(T (K + grid[0] + grid[1])) for T tokens on a GPU. Probabilities are computed in
    float32 at least. (Product keys: Lample et al. 2019, arXiv:1907.05242.)

    The grid is part of the state dict, as the shape of `grid`, (*key_grid, 0): the same keys on
    another grid choose other experts, and loading them fails. Without `grid`, a state dict made
    before it existed is loaded as one of this grid.

    Args:
        hidden_size: H.
        num_experts: E.
        num_experts_per_tok: K, at most E.
        norm_topk_prob: scale the K probabilities of a token to sum to one; False was the default
            before version 0.2.0.
        key_grid: the two numbers of keys, with product E; if None, the two closest factors of E.
        device, dtype: where the parameters live, and their type.

    Raises:
        TypeError: a size is no integer, norm_topk_prob no bool, or dtype no float dtype of the op.
        ValueError: H is negative; E is less than 1; K is not in [1, E]; the product of key_grid is
            not E; PyTorch knows no device of that name; or no key_grid was given and E has no two
            factors near each other (a large prime, say), so that there would be nearly as many
            keys as experts.
    """

    grid: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        norm_topk_prob: bool = True,
        key_grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_parameter_device(device)
        check_parameter_dtype(dtype)
        if not isinstance(norm_topk_prob, bool):
            raise TypeError(f"norm_topk_prob must be True or False, got {norm_topk_prob!r}")
        hidden_size = checked_int("hidden_size", hidden_size, 0)
        num_experts = checked_int("num_experts", num_experts, 1)
        num_experts_per_tok = checked_int("num_experts_per_tok", num_experts_per_tok, 1)
        if num_experts_per_tok > num_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in [1, num_experts = {num_experts}], "
                f"got {num_experts_per_tok}"
            )
        self.key_grid = squarest_grid(num_experts)
        if key_grid is not None:
            self.key_grid = _checked_grid(key_grid, num_experts)
        if key_grid is None and sum(self.key_grid) > max(1024, 8 * math.isqrt(num_experts)):
            side = math.isqrt(num_experts) + 1
            raise ValueError(
                f"num_experts must have two factors near each other, got {num_experts}, at best "
                f"{self.key_grid[0]} * {self.key_grid[1]}: take {side * side} = {side} * {side}, "
                "the next square (only ProductKeyRouter itself takes another key_grid)"
            )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.keys = nn.Linear(
            hidden_size, sum(self.key_grid), bias=False, device=device, dtype=dtype
        )
        # Everything that loads tensors compares their shapes.
        grid = torch.empty(*self.key_grid, 0, dtype=torch.int64, device=self.keys.weight.device)
        self.register_buffer("grid", grid)
        self.register_load_state_dict_pre_hook(_add_missing_grid)

    def reset_parameters(self) -> None:
        """Do nothing: the keys are reset by their own module, and `grid` holds no values."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: (..., H).

        Returns:
            indices (..., K) int64, best first, and routing_weights (..., K), the experts'
            probabilities (scaled to sum to one if `norm_topk_prob`) in the dtype of the key scores.

        Raises:
            TypeError: `hidden_states` is not a tensor, or has another dtype than the keys outside
                of autocast.
            ValueError: its last dimension is not `hidden_size`, or it is on another device.
        """
        if not isinstance(hidden_states, Tensor):
            raise TypeError(
                f"hidden_states must be a torch.Tensor, got {type(hidden_states).__name__}"
            )
        if hidden_states.ndim == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have rows of hidden_size = {self.hidden_size}, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        check_fits(hidden_states, self.keys)
        key_scores = self.keys(hidden_states)
        shape = (*key_scores.shape[:-1], self.num_experts_per_tok)
        first, second = key_scores.reshape(-1, sum(self.key_grid)).split(self.key_grid, dim=-1)
        indices, scores = product_key_topk(first, second, self.num_experts_per_tok)
        if self.norm_topk_prob:
            weights = scores.softmax(dim=-1)
        else:
            wide = scores.dtype
            total = first.to(wide).logsumexp(-1) + second.to(wide).logsumexp(-1)
            weights = (scores - total.unsqueeze(-1)).exp()
        return indices.view(shape), weights.to(key_scores.dtype).view(shape)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"key_grid={self.key_grid}, norm_topk_prob={self.norm_topk_prob}"
        )


def _add_missing_grid(
    router: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    if f"{prefix}keys.weight" in state_dict and f"{prefix}grid" not in state_dict:
        state_dict[f"{prefix}grid"] = router.grid
        if router.norm_topk_prob:
            warnings.warn(
                "the state dict is of a version before 0.2.0, whose default was "
                "norm_topk_prob=False: a model that used the default must be built with it",
                stacklevel=2,
            )


def _checked_grid(key_grid: Any, num_experts: int) -> tuple[int, int]:
    """Return `key_grid` as a tuple of two ints; raise unless their product is `num_experts`."""
    expected = f"key_grid must be two numbers with a product of num_experts = {num_experts}"
    try:
        grid = tuple(checked_int("key_grid", one, 1) for one in key_grid)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{expected}, got {key_grid!r}") from error
    if len(grid) != 2 or math.prod(grid) != num_experts:
        raise ValueError(f"{expected}, got {key_grid!r}")
    return grid


def squarest_grid(num_experts: int) -> tuple[int, int]:
    """Return the two factors (a, b) of `num_experts`, a <= b, that are closest to each other."""
    smaller = next(a for a in range(math.isqrt(num_experts), 0, -1) if num_experts % a == 0)
    return smaller, num_experts // smaller
