"""Squared norm of a table's gradient, and its optimizer's update, row by row in Triton kernels.

T tokens, H hidden size, E experts, N pairs. Neither forms a dense gradient or waits for the device.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, uses_triton
from flash_moe.ops.backends.gather import contiguous_rows, tokens_by_expert
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.row_updates_kernels import (
    row_squares_kernel,
    row_squares_splits_kernel,
    row_update_kernel,
    row_update_splits_kernel,
)
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe.ops.tuning import Tuning

# Elements of a row for each thread, as long as there are no more than MAX_WARPS warps.
THREAD_ELEMENTS, MAX_WARPS = 8, 16
# Longer rows do not stay in registers.
MAX_HIDDEN = 8192


@dataclass(frozen=True)
class RowUpdateConfig:
    """Limits of row updates.

    split_pairs: pairs that one program sums; an expert with more is divided among programs.
    """

    split_pairs: int = 1024


tuning = Tuning(RowUpdateConfig())


class RowUpdateOptions(NamedTuple):
    """Learning rate and other numbers by which `update_rows` updates each row.

    lr: a number, or a tensor of shape () on the table's device.
    max_row_norm: largest norm of a row's gradient, which is scaled down to it; None: any.
    betas: of the averages of gradients and of their squares, where there are any.
    seed_bits: of stochastic rounding, see there; first_row: the table's row in the whole table.
    """

    lr: float | Tensor
    weight_decay: float = 0.0
    eps: float = 0.0
    max_row_norm: float | None = None
    betas: tuple[float, float] = (0.0, 0.0)
    seed_bits: int = 0
    first_row: int = 0


class RowState(NamedTuple):
    """A table and the optimizer state of its rows; None where the optimizer keeps none.

    table: (E, H) float32 or bfloat16.
    low_bits: (E, H) int16.
    first: (E, H) float32 or bfloat16.
    second: (E,) or (E, H) float32.
    touches: (E,) int32.
    """

    table: Tensor
    low_bits: Tensor | None
    first: Tensor | None
    second: Tensor | None
    touches: Tensor | None


def has_row_kernels(values_N: Tensor, rows_TH: Tensor) -> bool:
    """Whether the kernels take a table's gradient of these values and rows."""
    return (
        uses_triton(default_backend(rows_TH.device))
        and torch.float64 not in (values_N.dtype, rows_TH.dtype)
        and 0 < rows_TH.shape[1] <= MAX_HIDDEN
    )


def row_squares(values_N: Tensor, rows_TH: Tensor, pairs: Pairs) -> Tensor:
    """Compute the squared norm of each row of a table's gradient: (E,) float64, 0 if untouched."""
    squares = torch.empty(pairs.num_experts, device=rows_TH.device, dtype=torch.float64)
    kernels = (row_squares_kernel, row_squares_splits_kernel)
    _launch(kernels, values_N, rows_TH, pairs, (squares,))
    return squares


def update_rows(
    values_N: Tensor,
    rows_TH: Tensor,
    pairs: Pairs,
    factor: Tensor | None,
    state: RowState,
    options: RowUpdateOptions,
) -> None:
    """Update the touched rows of a table and their state, in place.

    Args:
        values_N: (N,), rows_TH: (T, H): the gradient of row e is the sum over the pairs of expert e
            of the value times the row of the pair's token. A row that is not finite is skipped.
        pairs: the pattern.
        factor: () on all gradients; None for 1. Nothing changes if it is not finite.
        state: the table and its state.
        options: learning rate and other numbers.
    """
    first_beta, second_beta = options.betas
    is_tensor = isinstance(options.lr, Tensor) and options.lr.device == rows_TH.device
    numbers = (
        options.lr if is_tensor else float(options.lr),
        float(options.weight_decay),
        float(options.eps),
        None if options.max_row_norm is None else float(options.max_row_norm),
        1 - first_beta,
        1 - second_beta,
        math.log(first_beta) if first_beta > 0 else -math.inf,
        math.log(second_beta) if second_beta > 0 else -math.inf,
        options.first_row,
        options.seed_bits,
    )
    table, low_bits, first, second, touches = state
    weights = 0 if table.dtype == torch.float32 else 2 if low_bits is None else 1
    bits = table if weights == 0 else table.view(torch.int16)
    _launch(
        (row_update_kernel, row_update_splits_kernel),
        values_N,
        rows_TH,
        pairs,
        (
            factor if factor is None else factor.float(),
            (bits, table.stride(0), low_bits, first, second, touches),
            numbers,
        ),
        FIRST=first is not None,
        SECOND=0 if second is None else second.ndim,
        WEIGHTS=weights,
        HAS_TOUCHES=touches is not None,
        HAS_LR_TENSOR=is_tensor,
    )


def _launch(
    kernels: tuple[Any, Any],
    values_N: Tensor,
    rows_TH: Tensor,
    pairs: Pairs,
    arguments: tuple[Any, ...],
    **constants: int,
) -> None:
    """Launch a kernel over experts, and its second one over splits, if there are several."""
    kernel, splits_kernel = kernels
    hidden_size, split_pairs = rows_TH.shape[1], tuning.config.split_pairs
    rows_TH = contiguous_rows(rows_TH)
    block_hidden = next_power_of_2(hidden_size)
    num_splits = cdiv(pairs.num_pairs, split_pairs)
    # With a single split, no expert has more pairs than one program sums.
    num_splits = 0 if num_splits == 1 else num_splits
    partial_sums = torch.empty((num_splits, 2, hidden_size), device=rows_TH.device)
    pattern = (
        values_N.float().contiguous(),
        rows_TH,
        rows_TH.stride(0),
        pairs.expert_ids,
        pairs.expert_ids if pairs.top_k else tokens_by_expert(pairs),
        pairs.expert_order,
        pairs.expert_offsets,
        pairs.num_pairs,
    )
    constants |= {
        "HIDDEN_SIZE": hidden_size,
        "BLOCK_HIDDEN": block_hidden,
        "SPLIT": split_pairs,
        "num_warps": min(MAX_WARPS, max(1, block_hidden // (32 * THREAD_ELEMENTS))),
    }
    if pairs.num_experts > 0:
        grid = (num_splits + pairs.num_experts,)
        launch(
            kernel,
            grid,
            partial_sums,
            pattern,
            num_splits,
            *arguments,
            TOP_K=pairs.top_k or 0,
            **constants,
        )
    if num_splits > 0:
        launch(
            splits_kernel,
            (num_splits,),
            partial_sums,
            pattern,
            *arguments,
            BLOCK_SPLITS=4,
            **constants,
        )
