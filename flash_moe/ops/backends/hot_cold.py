"""CUDA tensors: hot experts by matrix products, the others by gathered rows.

Values of pairs are rounded to the dtype of the tables before a product; products are summed in
float32. See `flash_moe.ops.hot_experts` for the order of the pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flash_moe.ops.backends import gather
from flash_moe.ops.backends.hot_cold_kernels import (
    copy_repeated_scores_kernel,
    fill_matrix_kernel,
    hot_sddmm_kernel,
    hot_spmm_kernel,
    hot_spmm_t_kernel,
)
from flash_moe.ops.hot_experts import BLOCK_HOT, HotPairs
from flash_moe.ops.overlap import InputChunk, Outputs, wait_for_rows
from flash_moe.ops.pairs import FilledMatrix, Pairs
from flash_moe.ops.side_stream import SideStream
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe.ops.tuning import Tuning

prepare_table_grads = gather.prepare_table_grads


@dataclass(frozen=True)
class ProductTiles:
    """Tile of a matrix product; programs: how many run concurrently on a multiprocessor."""

    block_tokens: int
    block_experts: int
    block_hidden: int
    num_warps: int
    num_stages: int
    programs: int


HOT_SDDMM = ProductTiles(128, 128, 64, num_warps=8, num_stages=4, programs=1)
HOT_SPMM = ProductTiles(128, 64, 128, num_warps=4, num_stages=3, programs=2)
# With one program per multiprocessor, concurrent gathers find free registers and shared memory.
HOT_SPMM_T = ProductTiles(64, 128, 128, num_warps=4, num_stages=3, programs=1)
MAX_SPLITS = 16


@dataclass(frozen=True)
class HotColdConfig:
    """Sizes of what is processed at a time.

    matrix_elements: elements of the (T, hot experts) matrix.
    fill_programs: programs that fill the matrix, if there are fewer tokens.
    fill_bitmaps: bitmaps that such a program reads.
    repeat_block: repeated pairs of hot experts.
    """

    matrix_elements: int = 2**27
    fill_programs: int = 1024
    fill_bitmaps: int = 64
    repeat_block: int = 256


tuning = Tuning(HotColdConfig())


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
) -> Tensor:
    """See `Backend.sddmm`."""
    wait_for_rows(inputs)
    rows_TH, table_EH = gather.contiguous_rows(rows_TH), gather.contiguous_rows(table_EH)
    out_N = gather.sddmm(rows_TH, table_EH, pairs)
    _hot_sddmm_into(out_N, rows_TH, table_EH, pairs)
    return out_N


def _hot_sddmm_into(out_N: Tensor, rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> None:
    hot = _hot(pairs)
    num_tokens, hidden_size = rows_TH.shape
    tiles = HOT_SDDMM
    block_hidden = _block(tiles.block_hidden, hidden_size)
    blocks = cdiv(num_tokens, tiles.block_tokens)
    blocks *= cdiv(hot.experts.shape[0], tiles.block_experts)
    if blocks > 0:
        launch(
            hot_sddmm_kernel,
            (min(blocks, _programs(rows_TH.device, tiles)),),
            rows_TH,
            table_EH,
            hot.experts,
            hot.num_hot,
            hot.bitmaps,
            out_N,
            rows_TH.stride(0),
            table_EH.stride(0),
            num_tokens,
            hot.bitmaps.shape[1],
            pairs.top_k or 0,
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=tiles.block_tokens,
            BLOCK_EXPERTS=tiles.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    launch(
        copy_repeated_scores_kernel,
        (num_tokens,),
        out_N,
        pairs.expert_ids,
        hot.hot_index,
        hot.bitmaps,
        hot.pair_counts,
        hot.bitmaps.shape[1],
        pairs.top_k or 0,
        BLOCK=tuning.config.repeat_block,
    )


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, outputs: Outputs) -> None:
    """See `Backend.spmm`."""
    hot = _hot(pairs)
    table_EH = gather.contiguous_rows(table_EH)
    num_tokens, hidden_size = pairs.num_tokens, table_EH.shape[1]
    tiles = HOT_SPMM
    block_hidden = _block(tiles.block_hidden, hidden_size)
    token_blocks = cdiv(num_tokens, tiles.block_tokens)
    hidden_blocks = cdiv(hidden_size, block_hidden)
    programs = _programs(table_EH.device, tiles)
    splits = max(1, min(MAX_SPLITS, programs // (token_blocks * hidden_blocks)))
    sums_PTH = torch.empty(
        (splits, num_tokens, hidden_size), device=table_EH.device, dtype=torch.float32
    )
    for begin, matrix_TM in _filled_matrices(values_N, pairs, table_EH.dtype):
        launch(
            hot_spmm_kernel,
            (token_blocks, hidden_blocks, splits),
            matrix_TM,
            table_EH,
            hot.experts,
            hot.num_hot,
            sums_PTH,
            table_EH.stride(0),
            num_tokens,
            begin,
            WIDTH=matrix_TM.shape[1],
            SPLITS=splits,
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=tiles.block_tokens,
            BLOCK_EXPERTS=tiles.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    gather.spmm(values_N, table_EH, pairs, outputs, sums_PTH)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """See `Backend.spmm_t`."""
    out = torch.empty(pairs.num_experts, rows_TH.shape[1], device=rows_TH.device, dtype=out_dtype)
    _spmm_t_into([gather.TableSum(values_N, rows_TH, out)], pairs, scale)
    return out


def spmm_t_both(
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    pairs: Pairs,
    out_dtypes: tuple[torch.dtype, torch.dtype],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `Backend.spmm_t_both`."""
    sums = gather.two_table_sums(values_2N, rows_2TH, pairs.num_experts, out_dtypes)
    _spmm_t_into(sums, pairs, scale)
    return sums[0].out, sums[1].out


def _spmm_t_into(sums: list[gather.TableSum], pairs: Pairs, scale: float) -> None:
    """Compute the rows of hot experts concurrently with those of cold experts."""
    # Read on the side stream: its memory must not be reused before this stream has waited.
    filled = pairs.scratch.filled_matrix
    side_stream = SideStream(sums[0].out.device)
    with side_stream:
        for one in sums:
            _hot_spmm_t_into(one, pairs, scale)
    gather.spmm_t_into(sums, pairs, scale)
    side_stream.wait()
    del filled


def _hot_spmm_t_into(one: gather.TableSum, pairs: Pairs, scale: float) -> None:
    hot = _hot(pairs)
    rows_TH = gather.contiguous_rows(one.rows)
    num_tokens, hidden_size = rows_TH.shape
    tiles = HOT_SPMM_T
    block_hidden = _block(tiles.block_hidden, hidden_size)
    programs = _programs(rows_TH.device, tiles)
    for begin, matrix_TM in _filled_matrices(one.values, pairs, rows_TH.dtype):
        blocks = cdiv(matrix_TM.shape[1], tiles.block_experts)
        blocks *= cdiv(hidden_size, block_hidden)
        launch(
            hot_spmm_t_kernel,
            (min(blocks, programs),),
            matrix_TM,
            rows_TH,
            hot.experts,
            hot.num_hot,
            one.out,
            rows_TH.stride(0),
            num_tokens,
            begin,
            scale,
            WIDTH=matrix_TM.shape[1],
            HIDDEN_SIZE=hidden_size,
            BLOCK_TOKENS=tiles.block_tokens,
            BLOCK_EXPERTS=tiles.block_experts,
            BLOCK_HIDDEN=block_hidden,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _filled_matrices(
    values_N: Tensor, pairs: Pairs, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Yield ranges of hot experts: first hot index, and the values as a matrix (T, hot experts).

    Where one range holds all of them, the matrix stays in `pairs.scratch` for the next primitive.
    """
    hot = _hot(pairs)
    config = tuning.config
    num_tokens, max_hot = pairs.num_tokens, hot.experts.shape[0]
    if num_tokens == 0 or max_hot == 0:
        return
    max_width = max(1, config.matrix_elements // num_tokens // BLOCK_HOT) * BLOCK_HOT
    width = min(max_width, cdiv(max_hot, BLOCK_HOT) * BLOCK_HOT)
    filled = pairs.scratch.filled_matrix
    if filled is not None and filled.values is values_N:
        yield 0, filled.matrix
        return
    # Freed before the next matrix is allocated.
    filled = pairs.scratch.filled_matrix = None
    matrix_TM = torch.empty((num_tokens, width), device=values_N.device, dtype=dtype)
    programs = cdiv(config.fill_programs, num_tokens)
    for begin in range(0, max_hot, width):
        launch(
            fill_matrix_kernel,
            (num_tokens, programs),
            values_N,
            pairs.expert_ids,
            hot.hot_index,
            hot.bitmaps,
            hot.pair_counts,
            hot.num_hot,
            matrix_TM,
            hot.bitmaps.shape[1],
            begin,
            TOP_K=pairs.top_k,
            BLOCK_REPEATS=config.repeat_block,
            WIDTH=width,
            BLOCK_HOT=BLOCK_HOT,
            BLOCK_BITMAPS=config.fill_bitmaps,
        )
        if width >= max_hot:
            pairs.scratch.filled_matrix = FilledMatrix(values_N, matrix_TM)
        yield begin, matrix_TM


def _hot(pairs: Pairs) -> HotPairs:
    assert pairs.hot is not None
    return pairs.hot


def _block(max_block: int, hidden_size: int) -> int:
    # A matrix product takes blocks of at least 16.
    return max(16, min(max_block, next_power_of_2(max(1, hidden_size))))


def _programs(device: torch.device, tiles: ProductTiles) -> int:
    return _multiprocessors(device) * tiles.programs


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
