"""Module that holds the two tables of experts."""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from flash_moe.arguments import (
    check_parameter_device,
    check_parameter_dtype,
    checked_int,
    checked_number,
    is_plain,
)
from flash_moe.layers.normal_rows import normal_rows_
from flash_moe.ops.flash_expert import triton_flash_expert_func

ExpertFunc = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class FlashExperts(nn.Module):
    """Experts of one row each in `down_weights` and `up_weights`, both (num_experts, hidden_size).

    The forward pass calls `self.expert_func`, by default `triton_flash_expert_func`, and
    `reset_parameters` calls `self.normal_rows_`. A parallel style may replace them on the instance
    by other functions of the same arguments.

    Args:
        num_experts: E, the rows of each table.
        hidden_size: H, the length of a row.
        device, dtype: where the tables live, and their type.
        up_std: standard deviation of the up table's initial values.

    Raises:
        TypeError: a size is no integer, up_std no number, device no device, or dtype no float
            dtype of the op.
        ValueError: a size or up_std is negative, or PyTorch knows no device of that name.
    """

    expert_func: ExpertFunc = staticmethod(triton_flash_expert_func)
    normal_rows_: Callable[[Tensor, float], None] = staticmethod(normal_rows_)

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        up_std: float = 1.0,
    ) -> None:
        super().__init__()
        check_parameter_device(device)
        check_parameter_dtype(dtype)
        self.num_experts = checked_int("num_experts", num_experts, 0)
        self.hidden_size = checked_int("hidden_size", hidden_size, 0)
        self.up_std = checked_number("up_std", up_std, 0)
        shape = (self.num_experts, self.hidden_size)
        self.down_weights = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.up_weights = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal values such that scores <x, d> of x ~ N(0, 1) have unit variance."""
        self.normal_rows_(self.down_weights, max(1, self.hidden_size) ** -0.5)
        self.normal_rows_(self.up_weights, self.up_std)

    def fail(self, error: Exception) -> NoReturn:
        """Raise `error` instead of a forward pass, on every rank if the tables are sharded."""
        fail: Callable[[Exception], NoReturn] = getattr(self.expert_func, "fail", _raised)
        fail(error)

    def sum_over_ranks(self, sums: Tensor) -> None:
        """Add up a tensor, in place, over all ranks of the mesh of the tables."""
        add_up = getattr(self.expert_func, "sum_over_ranks", None)
        if add_up is not None:
            add_up(sums, self.down_weights)

    def forward(self, hidden_states: Tensor, indices: Tensor, routing_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the chosen experts.

        Args:
            hidden_states: (..., H).
            indices: (..., K) int64 or int32, -1 for an empty slot.
            routing_weights: (..., K).

        Returns:
            (..., H) in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: see `triton_flash_expert_func`.
        """
        rows = [hidden_states, indices, routing_weights]
        # Other arguments are passed on as they are: the op raises, on all ranks if sharded.
        can_flatten = all(is_plain(one) and one.ndim not in (0, 2) for one in rows)
        if can_flatten and all(one.shape[:-1] == hidden_states.shape[:-1] for one in rows):
            rows = [one.unsqueeze(0).flatten(0, -2) for one in rows]
        out = self.expert_func(rows[0], self.down_weights, self.up_weights, rows[1], rows[2])
        # As a view, an in-place operation of the caller's would lose hooks on it, such as FSDP's.
        return torch.ops.aten._unsafe_view(out, hidden_states.shape)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"


def _raised(error: Exception) -> NoReturn:
    raise error
