"""CUDA tensors: experts that many tokens use by matrix products, the others by gathered rows.

Values of pairs are rounded to the dtype of the tables before a product; products are summed in
float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import MATRIX_ELEMENTS
from flash_moe.ops.backends import gather
from flash_moe.ops.backends.hot_cold_kernels import (
    fill_matrix_kernel,
    fill_rest_kernel,
    hot_sddmm_kernel,
    hot_spmm_kernel,
    hot_spmm_t_kernel,
)
from flash_moe.ops.hot_experts import WIDTH, HotPairs
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.side_stream import SideStream
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2


@dataclass(frozen=True)
class ProductConfig:
    """Tile of a matrix product; programs: how many run on a multiprocessor at one time."""

    block_tokens: int
    block_experts: int
    block_hidden: int
    num_warps: int
    num_stages: int
    programs: int


HOT_SDDMM = ProductConfig(128, 128, 64, num_warps=8, num_stages=4, programs=1)
HOT_SPMM = ProductConfig(128, 64, 128, num_warps=4, num_stages=3, programs=2)
# One on a multiprocessor leaves room for the gathers that run beside it.
HOT_SPMM_T = ProductConfig(64, 128, 128, num_warps=4, num_stages=3, programs=1)
MAX_PIECES = 16
FILL_PROGRAMS = 1024
FILL_WORDS = 64
REST_BLOCK = 256


def sddmm(rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor:
    rows_TH, table_EH = gather.contiguous_rows(rows_TH), gather.contiguous_rows(table_EH)
    out_N = gather.sddmm(rows_TH, table_EH, pairs)
    _hot_sddmm_into(out_N, rows_TH, table_EH, pairs)
    return out_N


def _hot_sddmm_into(out_N: Tensor, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> None:
    hot = _hot(pairs)
    num_tokens, hidden_size = rows_TH.shape
    config = HOT_SDDMM
    block_hidden = _block(config.block_hidden, hidden_size)
    blocks = cdiv(num_tokens, config.block_tokens)
    blocks *= cdiv(hot.experts.shape[0], config.block_experts)
    if blocks > 0:
        launch(
            hot_sddmm_kernel,
            (min(blocks, _programs(rows_TH.device, config)),),
            rows_TH,
            table_EH,
            hot.experts,
            hot.num_hot,
            hot.words,
            out_N,
            rows_TH.stride(0),
            table_EH.stride(0),
            num_tokens,
            hot.words.shape[1],
            pairs.slots,
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=config.block_tokens,
            BLOCK_EXPERTS=config.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    launch(
        fill_rest_kernel,
        (num_tokens,),
        out_N,
        pairs.expert_ids,
        hot.places,
        hot.words,
        hot.pair_counts,
        hot.words.shape[1],
        pairs.slots,
        BLOCK=REST_BLOCK,
    )


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    hot = _hot(pairs)
    table_EH = gather.contiguous_rows(table_EH)
    num_tokens, hidden_size = pairs.num_tokens, table_EH.shape[1]
    config = HOT_SPMM
    block_hidden = _block(config.block_hidden, hidden_size)
    token_blocks = cdiv(num_tokens, config.block_tokens)
    hidden_blocks = cdiv(hidden_size, block_hidden)
    programs = _programs(table_EH.device, config)
    pieces = max(1, min(MAX_PIECES, programs // (token_blocks * hidden_blocks)))
    sums_PTH = torch.empty(
        (pieces, num_tokens, hidden_size), device=table_EH.device, dtype=torch.float32
    )
    for begin, matrix_TC in _filled(values_N, pairs, table_EH.dtype):
        launch(
            hot_spmm_kernel,
            (
                token_blocks,
                hidden_blocks,
                pieces,
            ),
            matrix_TC,
            table_EH,
            hot.experts,
            hot.num_hot,
            sums_PTH,
            table_EH.stride(0),
            num_tokens,
            begin,
            CHUNK=matrix_TC.shape[1],
            PIECES=pieces,
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=config.block_tokens,
            BLOCK_EXPERTS=config.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return gather.spmm(values_N, table_EH, pairs, out_dtype, sums_PTH)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    out = torch.empty(pairs.num_experts, rows_TH.shape[1], device=rows_TH.device, dtype=out_dtype)
    _sum_for_experts([(values_N, rows_TH, out)], pairs, scale)
    return out


def spmm_t_both(
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    pairs: Pairs,
    out_dtypes: tuple[torch.dtype, torch.dtype],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    shape = (pairs.num_experts, rows_2TH[0].shape[1])
    first, second = (
        torch.empty(shape, device=rows_2TH[0].device, dtype=dtype) for dtype in out_dtypes
    )
    _sum_for_experts(list(zip(values_2N, rows_2TH, (first, second), strict=True)), pairs, scale)
    return first, second


def _sum_for_experts(sums: list[tuple[Tensor, Tensor, Tensor]], pairs: Pairs, scale: float) -> None:
    """Rows of hot and of cold experts side by side."""
    # Read aside: this stream may not have its memory back before it waits.
    matrix = list(pairs.kept)
    aside = SideStream(sums[0][2].device)
    with aside:
        for values_N, rows_TH, out_EH in sums:
            _sum_for_hot_experts(values_N, rows_TH, out_EH, pairs, scale)
    gather.sum_for_experts(sums, pairs, scale)
    aside.wait()
    del matrix


def _sum_for_hot_experts(
    values_N: Tensor, rows_TH: Tensor, out_EH: Tensor, pairs: Pairs, scale: float
) -> None:
    hot = _hot(pairs)
    rows_TH = gather.contiguous_rows(rows_TH)
    num_tokens, hidden_size = rows_TH.shape
    config = HOT_SPMM_T
    block_hidden = _block(config.block_hidden, hidden_size)
    programs = _programs(rows_TH.device, config)
    for begin, matrix_TC in _filled(values_N, pairs, rows_TH.dtype):
        blocks = cdiv(matrix_TC.shape[1], config.block_experts)
        blocks *= cdiv(hidden_size, block_hidden)
        launch(
            hot_spmm_t_kernel,
            (min(blocks, programs),),
            matrix_TC,
            rows_TH,
            hot.experts,
            hot.num_hot,
            out_EH,
            rows_TH.stride(0),
            num_tokens,
            begin,
            scale,
            CHUNK=matrix_TC.shape[1],
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=config.block_tokens,
            BLOCK_EXPERTS=config.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _filled(values_N: Tensor, pairs: Pairs, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First place, and values as a matrix (T, places), of one chunk of places after the other.

    Where one chunk does, the matrix of the last values is kept for the next primitive.
    """
    hot = _hot(pairs)
    num_tokens, most = pairs.num_tokens, hot.experts.shape[0]
    if num_tokens == 0 or most == 0:
        return
    widest = max(1, MATRIX_ELEMENTS // num_tokens // WIDTH) * WIDTH
    chunk = min(widest, cdiv(most, WIDTH) * WIDTH)
    if pairs.kept and pairs.kept[0] is values_N:
        yield 0, pairs.kept[1]
        return
    pairs.kept.clear()
    matrix_TC = torch.empty((num_tokens, chunk), device=values_N.device, dtype=dtype)
    programs = cdiv(FILL_PROGRAMS, num_tokens)
    for begin in range(0, most, chunk):
        launch(
            fill_matrix_kernel,
            (
                num_tokens,
                programs,
            ),
            values_N,
            pairs.expert_ids,
            hot.places,
            hot.words,
            hot.pair_counts,
            hot.num_hot,
            matrix_TC,
            hot.words.shape[1],
            begin,
            SLOTS=pairs.slots,
            BLOCK_REPEATS=REST_BLOCK,
            CHUNK=chunk,
            WIDTH=WIDTH,
            BLOCK_WORDS=FILL_WORDS,
        )
        if chunk >= most:
            pairs.kept.extend((values_N, matrix_TC))
        yield begin, matrix_TC


def _hot(pairs: Pairs) -> HotPairs:
    assert pairs.hot is not None
    return pairs.hot


def _block(most: int, hidden_size: int) -> int:
    # A matrix product takes blocks of 16 or more.
    return max(16, min(most, next_power_of_2(max(1, hidden_size))))


def _programs(device: torch.device, config: ProductConfig) -> int:
    return _multiprocessors(device) * config.programs


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
