"""Backends: each a module that supplies the three primitives of the expert op.

T tokens, E experts, H hidden size, N pairs; `pairs` is a `flash_moe.ops.pairs.Pairs`.

    sddmm(rows_TH, table_EH, pairs) -> (N,)
        the dot product of row and table row for each pair, 0 for an empty slot,
        in `accumulator_dtype(rows_TH, table_EH)`
    spmm(values_N, table_EH, pairs, out_dtype) -> (T, H)
        for each token the sum of its experts' table rows, each times its pair's value
    spmm_t(values_N, rows_TH, pairs, out_dtype, scale) -> (E, H)
        for each expert the sum of its tokens' rows, each times its pair's value; times scale
    spmm_t_both: two of these over the same pairs

Sums are kept in float32 (float64 where an input is float64) and rounded once, at the end.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from flash_moe.ops.pairs import Pairs


class Backend(Protocol):
    def sddmm(self, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor: ...

    def spmm(
        self, values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype
    ) -> Tensor: ...

    def spmm_t(
        self,
        values_N: Tensor,
        rows_TH: Tensor,
        pairs: Pairs,
        out_dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Tensor: ...

    def spmm_t_both(
        self,
        values_2N: tuple[Tensor, Tensor],
        rows_2TH: tuple[Tensor, Tensor],
        pairs: Pairs,
        out_dtypes: tuple[torch.dtype, torch.dtype],
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]: ...


def spmm_t_in_turn(
    spmm_t: Callable[..., Tensor],
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    pairs: Pairs,
    out_dtypes: tuple[torch.dtype, torch.dtype],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`spmm_t_both` for a backend that gains nothing by doing both at once."""
    first, second = (
        spmm_t(values_N, rows_TH, pairs, dtype, scale)
        for values_N, rows_TH, dtype in zip(values_2N, rows_2TH, out_dtypes, strict=True)
    )
    return first, second


def load_backend(name: str) -> Backend:
    """The backend of that name, imported when first used."""
    return cast(Backend, import_module(f"{__name__}.{name}"))


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of these dtypes are summed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
