"""Gradients of tables that stay factored into pairs, for optimizers that sum them row by row.

T tokens, H hidden size, E experts, N pairs. The gradient of table row e is the sum over the pairs
of expert e of value * row of the pair's token. As a dense gradient it takes E H numbers; as pairs,
N values beside the rows of the tokens, which the backward pass has anyway.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.backends import torch_sparse
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.row_updates import has_row_kernels, row_squares

# Numbers that are summed into rows at a time; on CPUs as many as stay in the caches.
CHUNK_NUMBERS, CHUNK_NUMBERS_CPU = 2**24, 2**17


@dataclass(frozen=True)
class PairGrad:
    """A table's gradient from one backward pass, or from several.

    pairs: the pattern.
    values: (N,) in the dtype of sums.
    rows: (T, H), hidden states or gradients of outputs.
    """

    pairs: Pairs
    values: Tensor
    rows: Tensor

    @classmethod
    def joined(cls, grads: "list[PairGrad]") -> "PairGrad":
        """Return several as one over all their tokens, the earlier ones first."""
        if len(grads) == 1:
            return grads[0]
        return cls(
            Pairs.joined([grad.pairs for grad in grads]),
            torch.cat([grad.values for grad in grads]),
            torch.cat([grad.rows for grad in grads]),
        )


class RowGrads(NamedTuple):
    """Gradients of some rows of a table.

    rows: (U,) int64, which rows; ascending and all different.
    grads: (U, H) in the dtype of sums.
    """

    rows: Tensor
    grads: Tensor


class PairGrads:
    """Gradients of a table since they were last cleared, as `PairGrad`s, times a common factor.

    factor: tensor of shape () on the device of the table; None for 1.
    num_optimizers: optimizers that take the gradients.
    """

    def __init__(self) -> None:
        self.num_optimizers = 0
        self.factor: Tensor | None = None
        self._grads: list[PairGrad] = []

    def add(self, grad: PairGrad) -> None:
        """Add the gradient of a backward pass.

        Raises:
            RuntimeError: the gradients were scaled already, by clipping.
        """
        if self.factor is not None:
            raise RuntimeError(
                "gradients of a table must be added before they are clipped: got a backward pass "
                "after clip_grad_norm_, without optimizer.step() or zero_grad() between"
            )
        self._grads.append(grad)

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients, if there are any, by a tensor of shape ()."""
        if self._grads:
            self.factor = factor if self.factor is None else self.factor * factor

    def __reduce__(self) -> tuple[type["PairGrads"], tuple[()]]:
        # A saved model has no gradients.
        return PairGrads, ()

    def clear(self) -> None:
        self._grads, self.factor = [], None

    def joined(self) -> PairGrad | None:
        """Return the gradients of all backward passes as one, without the factor."""
        if not self._grads:
            return None
        # Once, also where clipping sums them before the step does.
        self._grads = [PairGrad.joined(self._grads)]
        return self._grads[0]

    def row_grads(self) -> Iterator[RowGrads]:
        """Sum the pairs of each touched row, some rows at a time, in ascending order of rows.

        Waits for the device.
        """
        joined = self.joined()
        if joined is None:
            return
        rows, bounds, order, token_ids = joined.pairs.touched
        dtype = accumulator_dtype(joined.values.dtype, joined.rows.dtype)
        token_rows, values = joined.rows.to(dtype), joined.values[order].to(dtype)
        if self.factor is not None:
            values = values * self.factor.to(dtype)
        # On the host, as it decides how many rows are summed at a time.
        for chunk in _chunks(bounds.tolist(), *_chunk_limits(token_rows)):
            pairs = slice(chunk.first_pair, chunk.last_pair)
            offsets = bounds[chunk.first : chunk.last + 1] - chunk.first_pair
            sums = _row_sums(token_rows, token_ids[pairs], values[pairs], offsets)
            yield RowGrads(rows[chunk.first : chunk.last], sums)

    def sum_of_squares(self, device: torch.device) -> Tensor:
        """Sum of the squares of all elements: () float64."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        joined = self.joined()
        if joined is None:
            return total
        if has_row_kernels(joined.values, joined.rows):
            squares = row_squares(joined.values, joined.rows, joined.pairs)
            factor = 1.0 if self.factor is None else self.factor.double()
            return squares.sum(dtype=torch.float64) * factor**2
        for _, grads in self.row_grads():
            total += grads.double().square_().sum()
        return total


def _uses_embedding_bag(rows_TH: Tensor) -> bool:
    return rows_TH.is_cpu and rows_TH.dtype == torch.float32 and rows_TH.shape[1] > 0


def _row_sums(rows_TH: Tensor, token_ids: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Sum consecutive pairs, from each of offsets (U + 1,) to the next, into rows (U, H)."""
    if _uses_embedding_bag(rows_TH):
        return torch_sparse.sums_of_rows(rows_TH, token_ids, offsets, values)
    terms = rows_TH.index_select(0, token_ids) * values.unsqueeze(1)
    return torch.segment_reduce(terms, "sum", offsets=offsets, axis=0)


class _Chunk(NamedTuple):
    """Bounds of consecutive rows, and of their pairs."""

    first: int
    last: int
    first_pair: int
    last_pair: int


def _chunk_limits(rows_TH: Tensor) -> tuple[int, int]:
    """Most rows, and most pairs, that are summed at a time."""
    at_a_time = max(1, CHUNK_NUMBERS // max(1, rows_TH.shape[1]))
    if _uses_embedding_bag(rows_TH):
        # Pairs take no memory there, and rows stay in the caches.
        return max(1, CHUNK_NUMBERS_CPU // max(1, rows_TH.shape[1])), sys.maxsize
    return at_a_time, at_a_time


def _chunks(bounds: list[int], most_rows: int, most_pairs: int) -> Iterator[_Chunk]:
    """Yield chunks of whole rows within both limits, or of one row with more pairs.

    bounds: (U + 1), first pair of each row, and the number of all pairs.
    """
    first = 0
    while first < len(bounds) - 1:
        last = bisect_right(bounds, bounds[first] + most_pairs) - 1
        last = min(max(first + 1, last), first + most_rows)
        yield _Chunk(first, last, bounds[first], bounds[last])
        first = last


# Attribute of a parameter that an optimizer holds: `torch.compile` can tell whether it is there.
COLLECTION = "_pair_grads"


def collect_pair_grads(table: Tensor) -> PairGrads:
    """Have backward passes give gradients of `table` as pairs, and none in `.grad`.

    Returns the collection, the same at each call.
    """
    if not hasattr(table, COLLECTION):
        setattr(table, COLLECTION, PairGrads())
    found: PairGrads = getattr(table, COLLECTION)
    return found


def pair_grads_of(table: Tensor) -> PairGrads | None:
    """Return the collection of a table, None if its gradient is dense.

    A table that was saved with a collection, and loaded without its optimizer, has a dense one.
    """
    found: PairGrads | None = getattr(table, COLLECTION, None)
    return found if found is not None and found.num_optimizers > 0 else None


def reaches_table(node: Any) -> bool:
    """Whether the backward pass that is running gives a gradient to a table.

    As dense gradients: not if only gradients of other tensors are asked for.

    Args:
        node: `next_functions` of the op's node, where the table's gradient goes.

    Raises:
        RuntimeError: torch.autograd.grad was asked for the table's gradient, which is not formed.
    """
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:
        raise RuntimeError(
            "torch.autograd.grad must not be asked for gradients of tables that an optimizer of "
            "flash_moe.optim holds, as they are never formed: call backward"
        ) from error


def stop_collecting(tables: list[Tensor]) -> None:
    """Make gradients dense again where the last optimizer that takes pairs is gone."""
    for table in tables:
        collected = collect_pair_grads(table)
        collected.num_optimizers -= 1
        if collected.num_optimizers == 0:
            delattr(table, COLLECTION)
