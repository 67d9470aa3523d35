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

import os
from collections.abc import Callable
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from flash_moe.ops.cost import MAX_SORTED_SLOTS, cheapest_backend, takes_products
from flash_moe.ops.pairs import Pairs

BACKENDS = ("reference", "torch_sparse", "gather", "hot_cold", "dense")
TRITON_BACKENDS = ("gather", "hot_cold", "dense")


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


def ragged_backend(name: str) -> str:
    """The backend for ragged rows where `name` was chosen: pairs that no kernel set apart are
    gathered, whatever the experts' load."""
    return "gather" if name in TRITON_BACKENDS else name


def choose_backend(
    backend: str | None, hidden_TH: Tensor, down_EH: Tensor, up_EH: Tensor, slots: int | None
) -> str:
    """Name of the backend that runs the op; `slots` (K) is None for ragged rows.

    `backend` if given, else FLASH_MOE_BACKEND, else by device and, on CUDA, by cost.

    Raises:
        ValueError: there is no such backend, or it does not take these tensors.
    """
    name = default_backend(hidden_TH.device) if backend is None else backend
    check_backend(name, hidden_TH.device)
    if name not in TRITON_BACKENDS or slots is None:
        return ragged_backend(name)
    (num_tokens, hidden_size), num_experts = hidden_TH.shape, down_EH.shape[0]
    dtypes = (hidden_TH.dtype, down_EH.dtype, up_EH.dtype)
    products = takes_products(num_tokens, slots, hidden_size, *dtypes)
    if backend is None and "FLASH_MOE_BACKEND" not in os.environ:
        if not products or not hidden_TH.is_cuda:
            return name
        return cheapest_backend(
            num_tokens, slots, num_experts, hidden_size, hidden_TH.element_size()
        )
    if name != "gather" and not products:
        raise ValueError(
            f"backend {name!r} takes hidden states and tables of one dtype, float16 or bfloat16, "
            f"at least one token and 1 to {MAX_SORTED_SLOTS} slots for each, got "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, {num_tokens} "
            f"tokens of hidden size {hidden_size}, {slots} slots"
        )
    if name == "hot_cold" and not hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16:
        raise ValueError(
            "backend 'hot_cold' takes float16, not bfloat16, under Triton's interpreter, which "
            "multiplies no bfloat16 matrices"
        )
    return name


def check_backend(name: str, device: torch.device) -> None:
    """Raise ValueError unless there is a backend of that name and it works on `device`."""
    if name not in BACKENDS:
        raise ValueError(
            f"backend (or FLASH_MOE_BACKEND) must be one of {', '.join(BACKENDS)}, got {name!r}"
        )
    if name == "torch_sparse" and device.type != "cpu":
        raise ValueError(f"backend 'torch_sparse' takes tensors on the CPU, got {device}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name in TRITON_BACKENDS and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend {name!r} takes CUDA tensors (or CPU tensors when TRITON_INTERPRET=1 is "
            f"set before Triton is imported), got {device}"
        )


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of these dtypes are summed."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
