"""Optimizers of expert tables: formulas for touched rows.

U touched rows, H hidden size; g is the gradient of a row, w its weights, t its number of touches.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flash_moe.optim.table_optimizer import StateTensor, TableOptimizer, TouchedRows


class RowwiseAdam(TableOptimizer):
    """Adam with one second moment for each row.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) mean(g^2), t = t + 1, and
    w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w), of touched rows
    alone. t counts the row's own touches: by the steps of the table, a row first touched late would
    move by a multiple of lr. (Kingma and Ba 2015, arXiv:1412.6980; one second moment for each row:
    "partial row-wise Adam" of FBGEMM; decay: Loshchilov and Hutter 2019, arXiv:1711.05101.)

    Args:
        params: tables, or groups of them.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root.
        weight_decay: decoupled decay of touched rows.
        max_row_norm: see `TableOptimizer`.
        moment_dtype: of the first moment, bfloat16 or float32.
        stochastic_rounding, seed: see `TableOptimizer`.

    Raises:
        TypeError, ValueError: see `TableOptimizer`; a number is out of range.
    """

    settings = (*TableOptimizer.settings, "moment_dtype")
    first_moment, second_moment = "exp_avg", "exp_avg_sq"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_row_norm: float | None = None,
        moment_dtype: torch.dtype = torch.bfloat16,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if moment_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"moment_dtype must be bfloat16 or float32, got {moment_dtype}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_row_norm": max_row_norm,
        }
        self.moment_dtype = moment_dtype
        super().__init__(params, defaults, stochastic_rounding, seed)

    def state_of(self, num_rows: int, hidden_size: int) -> dict[str, StateTensor]:
        shape = (num_rows, hidden_size)
        return {
            "exp_avg": StateTensor(shape, self.moment_dtype),
            "exp_avg_sq": StateTensor(self.second_moment_shape(*shape), torch.float32),
            "touches": StateTensor((num_rows,), torch.int32),
        }

    def second_moment_shape(self, num_rows: int, hidden_size: int) -> tuple[int, ...]:
        return (num_rows,)

    def update(self, touched: TouchedRows, group: dict[str, Any]) -> None:
        weights, grads, norms, state = touched
        first, second = group["betas"]
        is_rowwise = state["exp_avg_sq"].ndim == 1
        squares = norms.square() / grads.shape[1] if is_rowwise else grads.square()
        touches = state["touches"] + 1
        average = state["exp_avg"].to(grads.dtype).lerp_(grads, 1 - first)
        variance = state["exp_avg_sq"].to(grads.dtype).lerp_(squares, 1 - second)
        state.update(touches=touches, exp_avg=average, exp_avg_sq=variance)
        root = variance.view(len(grads), -1) / _bias_correction(second, touches, grads)
        root.sqrt_().add_(group["eps"]).mul_(_bias_correction(first, touches, grads))
        step = average.div(root)
        _decay(weights, group).sub_(step.mul_(group["lr"]))


class LazyAdam(RowwiseAdam):
    """Adam with both moments for each element: `RowwiseAdam` with v = b2 v + (1 - b2) g^2.

    As `torch.optim.SparseAdam`, but for the count of touches. Arguments as `RowwiseAdam`.
    """

    def second_moment_shape(self, num_rows: int, hidden_size: int) -> tuple[int, ...]:
        return (num_rows, hidden_size)


class RowwiseAdagrad(TableOptimizer):
    """Adagrad with one sum of squares for each row.

    v = v + mean(g^2) and w = w - lr (g / (sqrt(v) + eps) + weight_decay w), of touched rows alone.
    (Duchi et al. 2011, JMLR 12; one sum for each row: "exact row-wise Adagrad" of FBGEMM.)

    Args:
        params, lr, eps, weight_decay, max_row_norm, stochastic_rounding, seed: see `RowwiseAdam`.
    """

    second_moment = "sum"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        max_row_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_row_norm": max_row_norm,
        }
        super().__init__(params, defaults, stochastic_rounding, seed)

    def state_of(self, num_rows: int, hidden_size: int) -> dict[str, StateTensor]:
        return {"sum": StateTensor((num_rows,), torch.float32)}

    def update(self, touched: TouchedRows, group: dict[str, Any]) -> None:
        weights, grads, norms, state = touched
        total = state["sum"].to(grads.dtype) + norms.square() / grads.shape[1]
        state["sum"] = total
        rate = group["lr"] / (total.sqrt() + group["eps"])
        _decay(weights, group).sub_(grads.mul_(rate.unsqueeze(1)))


class SGD(TableOptimizer):
    """Stochastic gradient descent: w = w - lr (g + weight_decay w), of touched rows alone.

    Args:
        params, lr, weight_decay, max_row_norm, stochastic_rounding, seed: see `RowwiseAdam`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        max_row_norm: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "max_row_norm": max_row_norm}
        super().__init__(params, defaults, stochastic_rounding, seed)

    def state_of(self, num_rows: int, hidden_size: int) -> dict[str, StateTensor]:
        return {}

    def update(self, touched: TouchedRows, group: dict[str, Any]) -> None:
        _decay(touched.weights, group).sub_(touched.grads.mul_(group["lr"]))


def _decay(weights: Tensor, group: dict[str, Any]) -> Tensor:
    """Decay weights in place, by lr * weight_decay of their old value."""
    if group["weight_decay"] == 0:
        return weights
    return weights.mul_(1 - group["lr"] * group["weight_decay"])


def _bias_correction(beta: float, touches: Tensor, like: Tensor) -> Tensor:
    """Compute 1 - beta^t as a column, in float64, as it cancels."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(touches.double() * log_beta).to(like.dtype).unsqueeze(1)
