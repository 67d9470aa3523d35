"""Comparison of sampled table rows after two training steps with exact ones.

S sampled rows, T tokens, H hidden size, K experts per token. The gradient of a row depends on no
other row, so that the dense gradient of the sampled rows is all that the exact steps need.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.bench.cases import Inputs
from flash_moe.bench.measure import exact_results, relative_error, unobserved
from flash_moe.optim import LazyAdam, RowwiseAdagrad, RowwiseAdam
from flash_moe.optim.split_float import join
from table_optimizers.training import LayerInputs, Training

STEPS = 2
SAMPLED_ROWS = 32
# Largest relative error of the change of the rows, by the narrowest dtype of tables and moments.
# Operations are in float32, whose rounding of weights is up to 1e-4 of their change; a bfloat16 is
# off by 2^-9, or by 2^-8 where Triton's interpreter truncates it.
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2**-8}


class Sample(NamedTuple):
    """Some rows of the first layer's tables, and the tokens that use any of them.

    rows: (S,) int64, ascending.
    layer: inputs of these tokens; ids are positions in `rows`, or -1 for other experts.
    touched: (S, 1), whether any token uses a row.
    """

    rows: Tensor
    layer: LayerInputs
    touched: Tensor


def sample_rows(layer: LayerInputs, num_experts: int) -> Sample:
    """Sample rows that the first tokens use, and as many that are evenly spaced."""
    used = layer.indices.flatten()[: SAMPLED_ROWS // 2]
    spaced = torch.arange(SAMPLED_ROWS // 2, device=used.device) * num_experts
    rows = torch.cat([used, spaced // (SAMPLED_ROWS // 2)]).unique()
    position = torch.full((num_experts,), -1, device=used.device)
    position[rows] = torch.arange(len(rows), device=used.device)
    indices = position[layer.indices]
    tokens = (indices >= 0).any(1)
    touched = torch.isin(rows, layer.indices).unsqueeze(1)
    hidden_states, routing_weights, grad = (
        one.detach()[tokens] for one in (layer.hidden_states, layer.routing_weights, layer.grad)
    )
    return Sample(rows, LayerInputs(hidden_states, indices[tokens], routing_weights, grad), touched)


class ExactRows:
    """Sampled rows of one table in float64, stepped by the formulas of `flash_moe.optim`.

    weights: (S, H). first: (S, H), average of gradients. second: (S, H) or (S, 1), average or sum
    of their squares.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.first = self.second = torch.zeros_like(weights)
        self.touches = 0

    def step(self, grads: Tensor, touched: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Step the touched rows; each step touches the same ones."""
        self.touches += 1
        group = optimizer.param_groups[0]
        step = self._step_over_lr(grads, optimizer, group)
        self.weights = torch.where(touched, self.weights - group["lr"] * step, self.weights)

    def _step_over_lr(
        self, grads: Tensor, optimizer: torch.optim.Optimizer, group: dict[str, Any]
    ) -> Tensor:
        by_element = isinstance(optimizer, (LazyAdam, torch.optim.AdamW))
        squares = grads.square() if by_element else grads.square().mean(1, keepdim=True)
        if isinstance(optimizer, RowwiseAdagrad):
            self.second = self.second + squares
            return grads / (self.second.sqrt() + group["eps"])
        # AdamW, too: without decay it leaves rows as they are that no step has touched.
        if isinstance(optimizer, (RowwiseAdam, torch.optim.AdamW)):
            one, two = group["betas"]
            self.first = one * self.first + (1 - one) * grads
            self.second = two * self.second + (1 - two) * squares
            average = self.first / (1 - one**self.touches)
            variance = self.second / (1 - two**self.touches)
            return average / (variance.sqrt() + group["eps"])
        return grads


def wide_rows(optimizer: torch.optim.Optimizer, table: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a table in float64, with the bits that the optimizer keeps."""
    weights = table.detach()[rows]
    low_bits = optimizer.state[table].get("low_bits")
    if low_bits is not None:
        weights = join(weights, low_bits[rows].view(torch.int16))
    return weights.double()


def verify(training: Training) -> float:
    """Take two steps; return the largest relative error of the change of sampled rows.

    Compares both tables of the first layer. The factor of clipping follows from the norm that
    `clip_grad_norm_` returns.

    Raises:
        RuntimeError: the error is above `MAX_ERROR`.
    """
    tables, optimizer = training.tables[:2], training.optimizer
    rows, layer, touched = sample_rows(training.inputs[0], len(tables[0]))
    before = [wide_rows(optimizer, table, rows) for table in tables]
    exact = [ExactRows(weights) for weights in before]
    for _ in range(STEPS):
        down, up = (one.weights.to(tables[0].dtype) for one in exact)
        leaves = (layer.hidden_states, down, up, layer.routing_weights)
        _, _, *grads, _ = exact_results(Inputs(leaves, layer.indices, layer.grad))
        norm, _ = training.step(unobserved)
        factor = min(1.0, training.max_norm / (float(norm) + 1e-6))
        for one, grad in zip(exact, grads, strict=True):
            one.step(factor * grad, touched, optimizer)
    error = max(
        relative_error(wide_rows(optimizer, table, rows) - start, one.weights - start)
        for table, start, one in zip(tables, before, exact, strict=True)
    )
    dtypes = (tables[0].dtype, getattr(optimizer, "moment_dtype", torch.float32))
    if error > max(MAX_ERROR[dtype] for dtype in dtypes):
        raise RuntimeError(
            f"{type(optimizer).__name__} is wrong: relative error {error:.1e} of the change of "
            f"table rows in {STEPS} steps"
        )
    return error
