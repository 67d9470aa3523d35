"""Backends: each a module that supplies the three primitives of the expert op.

T tokens, E experts, H hidden size, N pairs. The primitives are sparse linear algebra over the
pattern of pairs, named as in that field:

    sddmm     dot products of rows and table rows, one for each pair
    spmm      weighted sums of table rows, one for each token
    spmm_t    weighted sums of token rows, one for each expert: a table's gradient

Sums are computed in float32 (float64 where an input is float64) and rounded once, at the end.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from flash_moe.ops.overlap import InputChunk, Outputs
from flash_moe.ops.pairs import Pairs


class Backend(Protocol):
    """The interface of a backend module.

    prepare_table_grads: computes, from the order by expert, what else `spmm_t` gathers by; called
        on a side stream. None: `spmm_t` does not gather in that order.
    """

    prepare_table_grads: Callable[[Pairs], None] | None

    def sddmm(
        self, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
    ) -> Tensor:
        """Compute the dot product of row and table row for each pair, 0 for an empty slot.

        Args:
            rows_TH: (T, H).
            table_EH: (E, H).
            inputs: chunks of rows_TH, several only for a ragged pattern; empty: all rows have
                arrived. A backend may wait for all of them before it reads the first.

        Returns:
            (N,) in `accumulator_dtype(rows_TH, table_EH)`.
        """

    def spmm(self, values_N: Tensor, table_EH: Tensor, pairs: Pairs, outputs: Outputs) -> None:
        """Write for each token the sum of its experts' table rows, each times its pair's value.

        Args:
            values_N: (N,).
            table_EH: (E, H).
            outputs: returns chunks that together have all T rows, several only for a ragged
                pattern. A backend may compute all rows before it writes any.
        """

    def spmm_t(
        self,
        values_N: Tensor,
        rows_TH: Tensor,
        pairs: Pairs,
        out_dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Tensor:
        """Compute for each expert the sum of its tokens' rows, each times its pair's value.

        Args:
            values_N: (N,).
            rows_TH: (T, H).
            scale: factor on the sums, before they are rounded.

        Returns:
            (E, H) in out_dtype.
        """

    def spmm_t_both(
        self,
        values_2N: tuple[Tensor, Tensor],
        rows_2TH: tuple[Tensor, Tensor],
        pairs: Pairs,
        out_dtypes: tuple[torch.dtype, torch.dtype],
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute `spmm_t` of two tables over the same pairs."""


@cache
def load_backend(name: str) -> Backend:
    """Import the backend of this name, when it is first used."""
    return cast(Backend, import_module(f"{__name__}.{name}"))
