"""CUDA tensors by cuBLAS products of all tokens with all experts.

For routing that uses so much of the tables that computing every product of a token and an expert
is cheaper than gathering. The largest allocation is a (T, experts) matrix for as many experts at a
time as `DenseConfig` allows. Values of pairs are rounded to the dtype of the tables before a
product, which sums in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backends.defaults import fill_chunks, spmm_t_in_turn
from flash_moe.ops.backends.dense_kernels import fill_matrix_kernel, read_pairs_kernel
from flash_moe.ops.overlap import InputChunk, Outputs, wait_for_rows
from flash_moe.ops.pairs import FilledMatrix, Pairs
from flash_moe.ops.triton_launch import launch
from flash_moe.ops.tuning import Tuning

prepare_table_grads = None


@dataclass(frozen=True)
class DenseConfig:
    """Sizes of what is processed at a time.

    matrix_elements: elements of the (T, experts) matrix.
    block: pairs of a token.
    block_zeros: columns of the matrix that are set to zero.
    """

    matrix_elements: int = 2**27
    block: int = 256
    block_zeros: int = 2048


tuning = Tuning(DenseConfig())


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
) -> Tensor:
    """See `Backend.sddmm`."""
    wait_for_rows(inputs)
    out_N = torch.empty(pairs.num_pairs, device=rows_TH.device, dtype=torch.float32)
    if pairs.num_pairs == 0:
        return out_N
    for begin, end in _expert_ranges(pairs):
        products_TR = _product(rows_TH, table_EH[begin:end].t())
        launch(
            read_pairs_kernel,
            (pairs.num_tokens,),
            products_TR,
            _offsets(pairs),
            pairs.expert_ids,
            out_N,
            begin,
            RANGE=end - begin,
            TOP_K=pairs.top_k or 0,
            BLOCK=tuning.config.block,
        )
        # Freed before the next product is allocated.
        del products_TR
    return out_N


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, outputs: Outputs) -> None:
    """See `Backend.spmm`."""
    sums_TH = None
    for begin, end, matrix_TR in _matrices(values_N, pairs, table_EH.dtype):
        range_TH = _product(matrix_TR, table_EH[begin:end])
        sums_TH = range_TH if sums_TH is None else sums_TH.add_(range_TH)
    if sums_TH is None:
        sums_TH = table_EH.new_zeros((pairs.num_tokens, table_EH.shape[1]))
    fill_chunks(sums_TH, outputs())


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """See `Backend.spmm_t`."""
    shape = (pairs.num_experts, rows_TH.shape[1])
    out_EH = torch.empty(shape, device=rows_TH.device, dtype=out_dtype)
    if pairs.num_pairs == 0:
        return out_EH.zero_()
    values_N = values_N if scale == 1 else values_N * scale
    for begin, end, matrix_TR in _matrices(values_N, pairs, rows_TH.dtype):
        if out_dtype == rows_TH.dtype:
            torch.mm(matrix_TR.t(), rows_TH, out=out_EH[begin:end])
        else:
            out_EH[begin:end] = _product(matrix_TR.t(), rows_TH)
    return out_EH


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def _expert_ranges(pairs: Pairs) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each range of experts that one matrix holds."""
    length = max(1, tuning.config.matrix_elements // pairs.num_tokens)
    for begin in range(0, pairs.num_experts, length):
        yield begin, min(begin + length, pairs.num_experts)


def _matrices(
    values_N: Tensor, pairs: Pairs, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield begin and end of each range of experts, with the values as a matrix (T, experts).

    Where one range holds all experts, the matrix stays in `pairs.scratch`, since the next primitive
    may use the same values.
    """
    if pairs.num_pairs == 0:
        return
    for begin, end in _expert_ranges(pairs):
        filled = pairs.scratch.filled_matrix
        if filled is not None and filled.values is values_N:
            yield begin, end, filled.matrix
            return
        # Freed before the next matrix is allocated.
        filled = pairs.scratch.filled_matrix = None
        if begin == 0:
            elements = pairs.num_tokens * end
            buffer = torch.empty(elements, device=values_N.device, dtype=dtype)
        matrix_TR = buffer[: pairs.num_tokens * (end - begin)].view(pairs.num_tokens, -1)
        launch(
            fill_matrix_kernel,
            (pairs.num_tokens,),
            values_N,
            _offsets(pairs),
            pairs.expert_ids,
            matrix_TR,
            begin,
            RANGE=end - begin,
            TOP_K=pairs.top_k or 0,
            BLOCK=tuning.config.block,
            BLOCK_ZEROS=tuning.config.block_zeros,
        )
        if end - begin == pairs.num_experts:
            pairs.scratch.filled_matrix = FilledMatrix(values_N, matrix_TR)
        yield begin, end, matrix_TR


def _offsets(pairs: Pairs) -> Tensor:
    # Kernels do not read the offsets of tokens that all have K pairs.
    return pairs.expert_ids if pairs.top_k else pairs.row_offsets


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right in float32, without rounding to 16 bits."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())
