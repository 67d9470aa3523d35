"""Backends: each a module that supplies the three primitives of the expert op.

T tokens, E experts, H hidden size, N pairs; `pairs` is a `flash_moe.ops.pairs.Pairs`.

    sddmm(rows_TH, table_EH, pairs) -> (N,)
        the dot product of row and table row for each pair, 0 for an empty slot,
        in `accumulator_dtype(rows_TH, table_EH)`
    spmm(values_N, table_EH, pairs, out_dtype) -> (T, H)
        for each token the sum of its experts' table rows, each times its pair's value
    spmm_t(values_N, rows_TH, pairs, out_dtype) -> (E, H)
        for each expert the sum of its tokens' rows, each times its pair's value

Sums are kept in float32 (float64 where an input is float64) and rounded once, at the end.
"""

import os
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from flash_moe.ops.pairs import Pairs

BACKENDS = ("reference", "torch_sparse", "gather")


class Backend(Protocol):
    def sddmm(self, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor: ...

    def spmm(
        self, values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype
    ) -> Tensor: ...

    def spmm_t(
        self, values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype
    ) -> Tensor: ...


def load_backend(name: str) -> Backend:
    """The backend of that name, imported when first used."""
    return cast(Backend, import_module(f"{__name__}.{name}"))


def default_backend(device: torch.device) -> str:
    """Name of the backend for tensors on `device`, unless FLASH_MOE_BACKEND names one.

    Triton kernels for CUDA tensors, and for CPU tensors too when TRITON_INTERPRET=1;
    torch.sparse for other CPU tensors.
    """
    name = os.environ.get("FLASH_MOE_BACKEND")
    if name is not None:
        return name
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return "gather"
    return "torch_sparse" if device.type == "cpu" else "reference"


def check_backend(name: str, device: torch.device) -> None:
    """Raise ValueError unless there is a backend of that name and it works on `device`."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "torch_sparse" and device.type != "cpu":
        raise ValueError(f"backend 'torch_sparse' takes tensors on the CPU, got {device}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "gather" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend 'gather' takes CUDA tensors (or CPU tensors when TRITON_INTERPRET=1 is "
            f"set before Triton is imported), got {device}"
        )


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of these dtypes are summed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
