"""CUDA tensors through products of all tokens with all experts, by cuBLAS.

For routing that uses so much of the tables that computing every product of a token and an expert
is cheaper than gathering. A (T, experts) matrix of MATRIX_ELEMENTS is the largest thing made.
Values of pairs are rounded to the dtype of the tables before a product, which sums in float32.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import MATRIX_ELEMENTS
from flash_moe.ops.backends import spmm_t_in_turn
from flash_moe.ops.backends.dense_kernels import fill_matrix_kernel, read_pairs_kernel
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.triton_launch import launch

BLOCK = 256
BLOCK_ZEROS = 2048


def sddmm(rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor:
    out_N = torch.empty(pairs.num_pairs, device=rows_TH.device, dtype=torch.float32)
    if pairs.num_pairs == 0:
        return out_N
    for begin, end in _chunks(pairs):
        products_TC = _product(rows_TH, table_EH[begin:end].t())
        launch(
            read_pairs_kernel,
            (pairs.num_tokens,),
            products_TC,
            _offsets(pairs),
            pairs.expert_ids,
            out_N,
            begin,
            CHUNK=end - begin,
            SLOTS=pairs.slots,
            BLOCK=BLOCK,
        )
        # Or it would stay while the next chunk's is made.
        del products_TC
    return out_N


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    sums_TH = None
    for begin, end, matrix_TC in _matrices(values_N, pairs, table_EH.dtype):
        part_TH = _product(matrix_TC, table_EH[begin:end])
        sums_TH = part_TH if sums_TH is None else sums_TH.add_(part_TH)
    if sums_TH is None:
        return table_EH.new_zeros((pairs.num_tokens, table_EH.shape[1]), dtype=out_dtype)
    return sums_TH.to(out_dtype)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    shape = (pairs.num_experts, rows_TH.shape[1])
    out_EH = torch.empty(shape, device=rows_TH.device, dtype=out_dtype)
    if pairs.num_pairs == 0:
        return out_EH.zero_()
    values_N = values_N if scale == 1 else values_N * scale
    for begin, end, matrix_TC in _matrices(values_N, pairs, rows_TH.dtype):
        if out_dtype == rows_TH.dtype:
            torch.mm(matrix_TC.t(), rows_TH, out=out_EH[begin:end])
        else:
            out_EH[begin:end] = _product(matrix_TC.t(), rows_TH)
    return out_EH


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def _chunks(pairs: Pairs) -> Iterator[tuple[int, int]]:
    """Ranges of experts."""
    chunk = max(1, MATRIX_ELEMENTS // pairs.num_tokens)
    for begin in range(0, pairs.num_experts, chunk):
        yield begin, min(begin + chunk, pairs.num_experts)


def _matrices(
    values_N: Tensor, pairs: Pairs, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Each range of experts, with the values as a matrix (T, experts).

    Where one range is all, the matrix is kept, as the next primitive may be of the same values.
    """
    if pairs.num_pairs == 0:
        return
    for begin, end in _chunks(pairs):
        if pairs.kept and pairs.kept[0] is values_N:
            yield begin, end, pairs.kept[1]
            return
        pairs.kept.clear()
        if begin == 0:
            elements = pairs.num_tokens * end
            buffer = torch.empty(elements, device=values_N.device, dtype=dtype)
        matrix_TC = buffer[: pairs.num_tokens * (end - begin)].view(pairs.num_tokens, -1)
        launch(
            fill_matrix_kernel,
            (pairs.num_tokens,),
            values_N,
            _offsets(pairs),
            pairs.expert_ids,
            matrix_TC,
            begin,
            CHUNK=end - begin,
            SLOTS=pairs.slots,
            BLOCK=BLOCK,
            BLOCK_ZEROS=BLOCK_ZEROS,
        )
        if end - begin == pairs.num_experts:
            pairs.kept.extend((values_N, matrix_TC))
        yield begin, end, matrix_TC


def _offsets(pairs: Pairs) -> Tensor:
    return pairs.expert_ids if pairs.slots else pairs.row_offsets


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, unrounded."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())
