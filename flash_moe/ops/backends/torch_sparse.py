"""CPU tensors by torch.sparse CSR products and `embedding_bag`, without anything of size N x H.

For float32 and float64 with a PyTorch built with MKL; everything else goes to the reference
backend, whose memory is bounded too.
"""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backends import reference
from flash_moe.ops.backends.defaults import fill_chunks, memory_for_sums, spmm_t_in_turn
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.overlap import InputChunk, Outputs, wait_for_rows
from flash_moe.ops.pairs import Pairs

prepare_table_grads = None


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
) -> Tensor:
    """See `Backend.sddmm`."""
    wait_for_rows(inputs)
    # sampled_addmm refuses a pattern with more entries than the matrix has elements.
    crowded = pairs.num_pairs > pairs.num_tokens * pairs.num_experts
    if crowded or not is_supported(rows_TH, table_EH):
        return reference.sddmm(rows_TH, table_EH, pairs)
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    rows_TH, table_EH = rows_TH.to(dtype).contiguous(), table_EH.to(dtype).contiguous()
    full, positions = pairs.occupied
    zeros = torch.zeros(full.num_pairs, device=rows_TH.device, dtype=dtype)
    # The larger operand is read once, in order; rows of the smaller, from cache, many times. Where
    # most experts have no pairs, nothing as long as all experts is made.
    if full.num_tokens < full.num_experts <= full.num_pairs:
        token_ids = full.token_ids[full.expert_order]
        pattern_ET = csr_matrix(full.expert_offsets, token_ids, zeros, full.num_tokens)
        products = torch.sparse.sampled_addmm(pattern_ET, table_EH, rows_TH.t(), beta=0.0)
        order = full.expert_order
        targets = order if positions is None else positions[order]
    else:
        pattern_TE = csr_matrix(full.row_offsets, full.expert_ids, zeros, full.num_experts)
        products = torch.sparse.sampled_addmm(pattern_TE, rows_TH, table_EH.t(), beta=0.0)
        if positions is None:
            # A view would hold the whole matrix, with its indices, until the backward pass.
            return products.values().clone()
        targets = positions
    scores_N = torch.zeros(pairs.num_pairs, device=rows_TH.device, dtype=dtype)
    return scores_N.index_copy_(0, targets, products.values())


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, outputs: Outputs) -> None:
    """See `Backend.spmm`."""
    if not is_supported(table_EH):
        return reference.spmm(values_N, table_EH, pairs, outputs)
    dtype = accumulator_dtype(values_N.dtype, table_EH.dtype)
    full, positions = pairs.occupied
    values = (values_N if positions is None else values_N[positions]).to(dtype)
    chunks = outputs()
    if dtype == torch.float32 and table_EH.shape[1] > 0:
        table_EH = table_EH.to(dtype)
        fill_chunks(sums_of_rows(table_EH, full.expert_ids, full.row_offsets, values), chunks)
        return
    matrix_TE = csr_matrix(full.row_offsets, full.expert_ids, values, full.num_experts)
    shape = (pairs.num_tokens, table_EH.shape[1])
    sums_TH = memory_for_sums(chunks, shape, dtype, table_EH.device)
    multiply_into(matrix_TE, table_EH.to(dtype), sums_TH)
    fill_chunks(sums_TH, chunks)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """See `Backend.spmm_t`."""
    if not is_supported(rows_TH):
        return reference.spmm_t(values_N, rows_TH, pairs, out_dtype, scale)
    dtype = accumulator_dtype(values_N.dtype, rows_TH.dtype)
    full, positions = pairs.occupied
    values = (values_N if positions is None else values_N[positions]).to(dtype)
    values = values if scale == 1 else values * scale
    matrix_ET = csr_matrix(
        full.expert_offsets,
        full.token_ids[full.expert_order],
        values[full.expert_order],
        full.num_tokens,
    )
    shape = (pairs.num_experts, rows_TH.shape[1])
    sums_EH = torch.empty(shape, device=rows_TH.device, dtype=dtype)
    multiply_into(matrix_ET, rows_TH.to(dtype), sums_EH)
    return sums_EH.to(out_dtype)


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def sums_of_rows(table_RH: Tensor, ids: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    """Sum values[n] * table[ids[n]] over n from offsets[i] to offsets[i + 1]; float32.

    Faster than a product with a CSR matrix where rows are scattered (findings/op_cpu.md).

    Args:
        table_RH: (R, H), H > 0; values: (N,), ids: (N,) integers in [0, R).
        offsets: (S + 1,) integers, ascending from 0 to N.

    Returns:
        (S, H).
    """
    sums: Tensor = torch.nn.functional.embedding_bag(
        ids.to(offsets.dtype),
        table_RH,
        offsets,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )
    return sums


def multiply_into(matrix: Tensor, dense: Tensor, out: Tensor) -> None:
    """Write matrix @ dense into `out`."""
    # `matrix @ dense` would first add to a matrix of zeros, which for a table's gradient took seven
    # times as long and twice the memory.
    torch.addmm(out, matrix, dense.contiguous(), beta=0, out=out)


def is_supported(*tensors: Tensor) -> bool:
    return torch.backends.mkl.is_available() and all(
        tensor.dtype in (torch.float32, torch.float64) for tensor in tensors
    )


def csr_matrix(offsets: Tensor, ids: Tensor, values: Tensor, num_columns: int) -> Tensor:
    # MKL works on int32 and would convert wider indices at every product.
    fits = max(ids.shape[0], offsets.shape[0], num_columns) < 2**31
    index_dtype = torch.int32 if fits else torch.int64
    return torch.sparse_csr_tensor(
        offsets.to(index_dtype),
        ids.to(index_dtype),
        values,
        size=(offsets.shape[0] - 1, num_columns),
        check_invariants=False,
    )


# PyTorch warns once in a process that CSR is in beta; provoked here, the warning is suppressed.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    offsets, nothing = torch.zeros(2, device="cpu"), torch.zeros(0, device="cpu")
    csr_matrix(offsets, nothing, nothing, 1)
