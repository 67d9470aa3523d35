"""Routing by product keys: the best of E experts from two lists of about sqrt(E) key scores."""

import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flash_moe.arguments import (
    check_dense,
    check_fits,
    check_parameter_device,
    check_parameter_dtype,
    checked_int,
    checked_number,
)
from flash_moe.layers.key_bias import KeyBias
from flash_moe.layers.optimizer_hook import UpdatedAfterSteps
from flash_moe.layers.recomputation import is_in_backward, refuse_repetition
from flash_moe.layers.router_loss import KeepsLosses, balancing_loss, num_loss_sums
from flash_moe.layers.score_norm import ScoreNorm
from flash_moe.ops.key_load import count_keys
from flash_moe.ops.product_keys import product_key_topk
from flash_moe.ops.sum_over_ranks import SumOverRanks

ScoreNormName = Literal["batch"] | None
# As much as needed for even loads without a loss of quality (findings/router_balance.md).
BIAS_UPDATE_RATE = 0.001


CHECKPOINTING = (
    "aux_loss_coef and z_loss_coef need activation checkpointing with use_reentrant=False, and "
    "torch.compile around it, not within: else a router's losses are lost or count twice"
)


class PassCounts(NamedTuple):
    """What a forward pass adds to a router's statistics; None: nothing.

    moments: see `ScoreNorm`. load: see `KeyBias`. loss: see `balancing_loss`.
    """

    moments: Tensor | None = None
    load: Tensor | None = None
    loss: Tensor | None = None


class ProductKeyRouter(UpdatedAfterSteps, KeepsLosses):
    """Scores an expert (i, j) of a key grid by the sum of two log-probabilities.

    Expert i * grid[1] + j has log-probability log_softmax(a)_i + log_softmax(b)_j, where a and b
    are the token's scores for the keys of the two axes, so the probabilities of all experts sum to
    one. The K best sums are found without computing all of them (`flash_moe.ops.product_keys`); of
    equal ones the expert with the lowest index is better. Memory is O(T (K + grid[0] + grid[1]))
    for T tokens on a GPU. Probabilities are computed in float32 at least. (Product keys: Lample et
    al. 2019, arXiv:1907.05242.)

    Four options keep the load of the experts even, each by itself. Their sums are over the tokens
    of all data-parallel ranks: those of the mesh of the experts' tables in a `FlashMoE` to which
    `flash_moe_dist.ExpertParallel` was applied, else those given to `flash_moe_dist.sync_routers`,
    else of this process. All of these ranks must then call the router alike, with any number of
    tokens. Statistics and biases change at the end of a step of the optimizer that holds the keys
    (any of PyTorch's), and are in the state dict. The forward passes of a `FlashMoE` count once its
    experts have succeeded.

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
        score_norm: "batch" normalizes the scores of each key over the tokens
            (`flash_moe.layers.score_norm`); None leaves them as they are, as versions before 0.3.0
            did.
        aux_loss_coef, z_loss_coef: coefficients of the load-balancing loss and of the z-loss, which
            `flash_moe.router_loss(model)` gives to a training loop (formulas:
            `flash_moe.layers.router_loss`).
        bias_update_rate: change of a key's bias for the choice of experts in a step
            (`flash_moe.layers.key_bias`); 0 for no biases.
        force_load_balance: choose experts evenly at random, as if the scores were independent
            normal numbers, with gradients as if they were the router's own: to measure the speed
            of a model whose router is balanced.

    Raises:
        TypeError: a size is no integer, a coefficient or rate no number, norm_topk_prob or
            force_load_balance no bool, or dtype no float dtype of the op.
        ValueError: score_norm is neither of these; a coefficient or rate is negative; H is
            negative; E is less than 1; K is not in [1, E]; the product of key_grid is not E;
            PyTorch knows no device of that name; or no key_grid was given and E has no two factors
            near each other (a large prime, say), so that there would be nearly as many keys as
            experts.
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
        *,
        score_norm: ScoreNormName = "batch",
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = BIAS_UPDATE_RATE,
        force_load_balance: bool = False,
    ) -> None:
        super().__init__()
        check_parameter_device(device)
        check_parameter_dtype(dtype)
        switches = {"norm_topk_prob": norm_topk_prob, "force_load_balance": force_load_balance}
        for name, switch in switches.items():
            if not isinstance(switch, bool):
                raise TypeError(f"{name} must be True or False, got {switch!r}")
        if score_norm not in ("batch", None):
            raise ValueError(f"score_norm must be 'batch' or None, got {score_norm!r}")
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
        self.register_load_state_dict_pre_hook(_note_older_version)
        self.aux_loss_coef = checked_number("aux_loss_coef", aux_loss_coef, 0)
        self.z_loss_coef = checked_number("z_loss_coef", z_loss_coef, 0)
        rate = checked_number("bias_update_rate", bias_update_rate, 0)
        self.force_load_balance = force_load_balance
        device = self.keys.weight.device
        self.score_norm = ScoreNorm(sum(self.key_grid), device) if score_norm else None
        self.key_bias = KeyBias(self.key_grid, rate, device) if rate else None
        self.sum_over_ranks: SumOverRanks | None = None
        # A layer whose pass may still fail calls `count_pass` itself.
        self.counts_passes = True
        self._counts = PassCounts()
        self._sums_made, self._sums_failed = 0, False
        self._has_kept_losses = False
        self.call_after_steps()

    def reset_parameters(self) -> None:
        """Do nothing: modules with values are reset by themselves, and `grid` holds none."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            hidden_states: (..., H).

        Returns:
            indices (..., K) int64, in descending order of scores and biases, and routing_weights
            (..., K), the experts' probabilities (scaled to sum to one if `norm_topk_prob`) in the
            dtype of the key scores.

        Raises:
            TypeError: `hidden_states` is no dense tensor, or has another dtype than the keys
                outside of autocast.
            ValueError: its last dimension is not `hidden_size`, or it is on another device.
            RuntimeError: the router has losses, and activation checkpointing repeats the pass in a
                way that loses them or counts them twice.
        """
        self._counts, self._sums_made, self._sums_failed = PassCounts(), 0, False
        self.check_input(hidden_states)
        key_scores = self.keys(hidden_states)
        shape = (*key_scores.shape[:-1], self.num_experts_per_tok)
        scores, moments = key_scores.reshape(-1, sum(self.key_grid)), None
        if self.score_norm is not None:
            scores, moments = self.score_norm(scores, self._sum_of_pass, self.sum_over_ranks)
        if self.force_load_balance:
            scores = scores + (torch.randn_like(scores) - scores).detach()
        first, second = scores.split(self.key_grid, dim=-1)
        biases = (None, None) if self.key_bias is None else self.key_bias.bias.split(self.key_grid)
        indices, chosen = product_key_topk(
            first,
            second,
            self.num_experts_per_tok,
            first_bias=biases[0],
            second_bias=biases[1],
        )
        load = loss = None
        moves_biases = self.key_bias is not None and not self.force_load_balance
        if self.training and (moves_biases or self._has_loss()):
            counts = count_keys(indices, *self.key_grid)
            load = counts if moves_biases else None
            if self._has_loss():
                coefficients = (self.aux_loss_coef, self.z_loss_coef)
                loss = balancing_loss(
                    (first, second), indices, counts, *coefficients, self._sum_of_pass
                )
        self._counts, self._sums_made = PassCounts(moments, load, loss), 0
        if self.counts_passes:
            self.count_pass()
        if self.norm_topk_prob:
            weights = chosen.softmax(dim=-1)
        else:
            wide = chosen.dtype
            total = first.to(wide).logsumexp(-1) + second.to(wide).logsumexp(-1)
            weights = (chosen - total.unsqueeze(-1)).exp()
        return indices.view(shape), weights.to(key_scores.dtype).view(shape)

    def count_pass(self) -> None:
        """Add the last forward pass to statistics, load and losses, unless it was repeated."""
        (moments, load, loss), self._counts = self._counts, PassCounts()
        if moments is not None and self.score_norm is not None:
            self.score_norm.add(moments)
        if load is not None and self.key_bias is not None:
            self.key_bias.add(load)
        if loss is None:
            return
        if not is_in_backward():
            self.keep_loss(refuse_repetition(loss, CHECKPOINTING))
            self._has_kept_losses = True
        elif not self._has_kept_losses:
            raise RuntimeError(CHECKPOINTING)

    def check_input(self, hidden_states: Tensor) -> None:
        """Raise unless a forward pass can take `hidden_states`.

        Raises:
            TypeError, ValueError: see `forward`.
        """
        check_dense("hidden_states", hidden_states)
        if hidden_states.ndim == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must have rows of hidden_size = {self.hidden_size}, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        check_fits(hidden_states, self.keys)

    def complete_sums(self) -> bool:
        """Take part, without tokens, in the sums over ranks that a failed pass did not reach.

        Returns whether the other ranks go on: not after a sum that failed, which fails on all.
        """
        sizes = []
        if self.training and self.score_norm is not None:
            sizes.append(self.score_norm.num_sums)
        if self._has_loss():
            sizes.append(num_loss_sums(self.key_grid))
        left, failed = sizes[self._sums_made :], self._sums_failed
        self._counts, self._sums_made, self._sums_failed = PassCounts(), 0, False
        if self.sum_over_ranks is not None and not failed:
            for size in left:
                self.sum_over_ranks(torch.zeros(size, dtype=torch.float64, device=self.grid.device))
        return not failed

    def _sum_of_pass(self, sums: Tensor) -> None:
        if self.sum_over_ranks is not None:
            try:
                self.sum_over_ranks(sums)
            except Exception:
                self._sums_failed = True
                raise
        self._sums_made += 1

    def _has_loss(self) -> bool:
        has_coefficient = self.aux_loss_coef > 0 or self.z_loss_coef > 0
        return has_coefficient and self.training and torch.is_grad_enabled()

    def after_optimizer_step(self) -> None:
        """Update statistics and biases; collective if there are biases and ranks."""
        if not self.training:
            return
        if self.score_norm is not None:
            self.score_norm.update()
        if self.key_bias is not None:
            self.key_bias.update(self.sum_over_ranks)
        self._has_kept_losses = False
        if self.take_loss() is not None:
            warnings.warn(
                "aux_loss_coef and z_loss_coef have no effect: a router's losses were not taken by "
                "loss = loss + flash_moe.router_loss(model) before the optimizer's step",
                stacklevel=2,
            )

    def forget_batch(self) -> None:
        """Drop what forward passes added up since the last step, for a step that is skipped."""
        if self.score_norm is not None:
            self.score_norm.moments.zero_()
        if self.key_bias is not None:
            self.key_bias.load.zero_()
        self._has_kept_losses = False
        self.take_loss()

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a history cannot be copied.
        return self.__dict__ | {"_loss": None, "_counts": PassCounts()}

    def train(self, mode: bool = True) -> "ProductKeyRouter":
        """Set the mode; evaluation begins with statistics of all passes in training."""
        if not mode and self.training and self.score_norm is not None:
            self.score_norm.update()
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"key_grid={self.key_grid}, norm_topk_prob={self.norm_topk_prob}, "
            f"aux_loss_coef={self.aux_loss_coef}, z_loss_coef={self.z_loss_coef}, "
            f"force_load_balance={self.force_load_balance}"
        )


def _note_older_version(
    router: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Warn of a state dict made with the defaults of an older version; add a missing `grid`."""
    if f"{prefix}keys.weight" not in state_dict:
        return
    added = ("score_norm.running_mean", "key_bias.bias")
    own = router.state_dict()
    if any(name in own and f"{prefix}{name}" not in state_dict for name in added):
        warnings.warn(
            "the state dict is of a router without normalized scores or key biases, as the "
            "defaults were before 0.3.0: a model that used them must be built with "
            "score_norm=None and bias_update_rate=0",
            stacklevel=2,
        )
    if f"{prefix}grid" not in state_dict:
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
