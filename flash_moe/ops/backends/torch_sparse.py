"""CPU tensors through torch.sparse CSR: nothing of size N x H is ever built.

float32 and float64 with a PyTorch built with MKL; everything else goes to the reference
backend, whose memory is bounded too.
"""

import warnings
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backends import accumulator_dtype, reference, spmm_t_in_turn
from flash_moe.ops.pairs import Pairs


def sddmm(rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor:
    # sampled_addmm refuses a pattern of more entries than the matrix has places.
    crowded = pairs.num_pairs > pairs.num_tokens * pairs.num_experts
    if crowded or not _supported(rows_TH, table_EH):
        return reference.sddmm(rows_TH, table_EH, pairs)
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    rows_TH, table_EH = rows_TH.to(dtype).contiguous(), table_EH.to(dtype).contiguous()
    full, kept = pairs.occupied
    zeros = torch.zeros(full.num_pairs, dtype=dtype)
    # The larger operand is read once, in order; rows of the smaller, from cache, many times.
    if full.num_tokens < full.num_experts:
        token_ids = full.token_ids[full.expert_order]
        pattern_ET = _csr(full.expert_offsets, token_ids, zeros, full.num_tokens)
        products = torch.sparse.sampled_addmm(pattern_ET, table_EH, rows_TH.t(), beta=0.0)
        places = full.expert_order if kept is None else kept[full.expert_order]
    else:
        pattern_TE = _csr(full.row_offsets, full.expert_ids, zeros, full.num_experts)
        products = torch.sparse.sampled_addmm(pattern_TE, rows_TH, table_EH.t(), beta=0.0)
        if kept is None:
            # A copy: a view would keep the whole matrix, its indices too, alive until backward.
            return products.values().clone()
        places = kept
    return torch.zeros(pairs.num_pairs, dtype=dtype).index_copy_(0, places, products.values())


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    if not _supported(table_EH):
        return reference.spmm(values_N, table_EH, pairs, out_dtype)
    dtype = accumulator_dtype(values_N.dtype, table_EH.dtype)
    full, kept = pairs.occupied
    values = values_N.to(dtype) if kept is None else values_N[kept].to(dtype)
    matrix_TE = _csr(full.row_offsets, full.expert_ids, values, full.num_experts)
    return _product(matrix_TE, table_EH.to(dtype)).to(out_dtype)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    if not _supported(rows_TH):
        return reference.spmm_t(values_N, rows_TH, pairs, out_dtype, scale)
    dtype = accumulator_dtype(values_N.dtype, rows_TH.dtype)
    full, kept = pairs.occupied
    values = values_N.to(dtype) if kept is None else values_N[kept].to(dtype)
    values = values if scale == 1 else values * scale
    matrix_ET = _csr(
        full.expert_offsets,
        full.token_ids[full.expert_order],
        values[full.expert_order],
        full.num_tokens,
    )
    return _product(matrix_ET, rows_TH.to(dtype)).to(out_dtype)


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def _product(matrix: Tensor, dense: Tensor) -> Tensor:
    # With its own output: `matrix @ dense` first adds to a matrix of zeros, which for a table's
    # gradient took seven times as long and twice the memory.
    out = torch.empty(matrix.shape[0], dense.shape[1], dtype=dense.dtype)
    return torch.addmm(out, matrix, dense.contiguous(), beta=0, out=out)


def _supported(*tensors: Tensor) -> bool:
    return torch.backends.mkl.is_available() and all(
        tensor.dtype in (torch.float32, torch.float64) for tensor in tensors
    )


def _csr(offsets: Tensor, ids: Tensor, values: Tensor, num_columns: int) -> Tensor:
    # MKL works on int32; wider indices would be converted at every product.
    fits = max(ids.shape[0], offsets.shape[0], num_columns) < 2**31
    index_dtype = torch.int32 if fits else torch.int64
    return torch.sparse_csr_tensor(
        offsets.to(index_dtype),
        ids.to(index_dtype),
        values,
        size=(offsets.shape[0] - 1, num_columns),
        check_invariants=False,
    )


# PyTorch says once in a process that CSR is in beta; said here, it does not reach the user.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _csr(torch.zeros(2), torch.zeros(0), torch.zeros(0), 1)
