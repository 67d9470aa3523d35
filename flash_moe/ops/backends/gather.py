"""CUDA tensors by Triton kernels that gather table rows: launchers and their tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.deprecated import resolve_old_names
from flash_moe.ops.backends.gather_kernels import (
    add_partial_sums_kernel,
    sddmm_kernel,
    spmm_kernel,
    spmm_t_kernel,
    spmm_t_splits_kernel,
    token_ids_kernel,
)
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.overlap import InputChunk, OutputChunk, Outputs, wait_for_rows
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe.ops.tuning import Tuning

MAX_GRID_Y = 65_535
SUM_BLOCK = 1024
TOKEN_IDS_BLOCK = 256
# Rows of at least this many bytes are long for an spmm, longer ones for an sddmm.
LONG_BYTES = 2048
# Up to this many pairs per token a program sweeps the table quickly, so that narrow slices of its
# columns stay in L2 while all programs read them.
LOW_TOP_K, VERY_LOW_TOP_K = 128, 32


@dataclass(frozen=True)
class SddmmTiles:
    """Tile shapes of an sddmm.

    A program holds block_pairs table rows of block_bytes at a time, few enough for the dot product
    to stay in one warp. Longer rows are processed in slices of slice_bytes, one after the other. A
    program gets min_pairs to max_pairs pairs: so few that the part of the table which `programs`
    concurrent programs read stays in a cache of cached_bytes.
    """

    slice_bytes: int
    block_pairs: int
    block_bytes: int = 1024
    num_warps: int = 1
    min_pairs: int = 8
    max_pairs: int = 64
    programs: int = 4224
    cached_bytes: int = 45_000_000


@dataclass(frozen=True)
class SpmmTiles:
    """Tile shape of an spmm: a program holds block_pairs table rows of block_bytes at a time."""

    block_pairs: int
    block_bytes: int
    num_warps: int = 1


SDDMM = SddmmTiles(slice_bytes=LONG_BYTES, block_pairs=8)
SDDMM_IN_SLICES = SddmmTiles(slice_bytes=1024, block_pairs=4)
SDDMM_IN_NARROW_SLICES = SddmmTiles(slice_bytes=512, block_pairs=8, block_bytes=512)
SPMM = SpmmTiles(block_pairs=8, block_bytes=512)
SPMM_LONG = SpmmTiles(block_pairs=32, block_bytes=256)


@dataclass(frozen=True)
class GatherConfig:
    """Limits by which sums are divided among programs.

    With fewer than spmm_min_programs programs, an spmm splits each token's pairs into up to
    spmm_max_splits splits of at least spmm_min_split_pairs pairs.

    An spmm_t splits the pairs of experts that have more than spmm_t_split_pairs. It sums
    spmm_t_max_hidden to spmm_t_min_hidden elements of a row at a time, spmm_t_warp_hidden in a
    warp: so few that what it reads of all token rows stays in a cache of spmm_t_cached_bytes,
    together with the sums that it writes. Where not even spmm_t_min_hidden do, and experts have
    spmm_t_narrow_min_pairs to spmm_t_narrow_max_pairs pairs on average, it sums
    spmm_t_narrow_hidden at a time.
    """

    spmm_min_programs: int = 4096
    spmm_max_splits: int = 64
    spmm_min_split_pairs: int = 16
    spmm_t_split_pairs: int = 1024
    spmm_t_max_hidden: int = 2048
    spmm_t_min_hidden: int = 512
    spmm_t_warp_hidden: int = 512
    spmm_t_cached_bytes: int = 24_000_000
    spmm_t_narrow_hidden: int = 256
    spmm_t_narrow_min_pairs: int = 8
    spmm_t_narrow_max_pairs: int = 64


tuning = Tuning(GatherConfig())


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
) -> Tensor:
    """See `Backend.sddmm`; leaves the values of partitioned hot pairs unwritten."""
    if len(inputs) == 1 and inputs[0].source is None:
        # All rows arrive at once.
        inputs[0].wait()
        inputs = ()
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    num_tokens, hidden_size = rows_TH.shape
    element_bytes = table_EH.element_size()
    tile_pairs = pairs.tile_pairs
    in_slices = hidden_size * element_bytes > LONG_BYTES or tile_pairs <= LOW_TOP_K
    tiles = SDDMM_IN_SLICES if in_slices else SDDMM
    if tile_pairs <= VERY_LOW_TOP_K:
        tiles = SDDMM_IN_NARROW_SLICES
    width = min(tiles.slice_bytes // element_bytes, next_power_of_2(max(1, hidden_size)))
    slices = max(1, cdiv(hidden_size, width))
    out_SN = torch.empty((slices, pairs.num_pairs), device=rows_TH.device, dtype=dtype)
    if hidden_size == 0 or pairs.num_pairs == 0:
        wait_for_rows(inputs)
        return out_SN.zero_()[0]
    table_EH = contiguous_rows(table_EH)
    # Programs serve all tokens before their next pairs, which are further down the table.
    read_at_once = tiles.programs / num_tokens * pairs.num_experts * width * element_bytes
    pairs_per_program = tiles.max_pairs
    while (
        pairs_per_program > tiles.min_pairs
        and read_at_once * pairs_per_program > tiles.cached_bytes * tile_pairs
    ):
        pairs_per_program //= 2
    # Enough programs for a token with the mean number of pairs; others are walked in strides.
    blocks = min(cdiv(tile_pairs, pairs_per_program), MAX_GRID_Y)
    for chunk in inputs or (InputChunk(slice(0, num_tokens)),):
        chunk.wait()
        chunk_TH = rows_TH[chunk.rows] if chunk.source is None else chunk.source
        chunk_TH = contiguous_rows(chunk_TH)
        if len(chunk_TH) == 0:
            continue
        launch(
            sddmm_kernel,
            (len(chunk_TH), blocks, slices),
            chunk_TH,
            table_EH,
            *_row_pointers(pairs, chunk.rows.start),
            pairs.expert_ids,
            out_SN,
            chunk_TH.stride(0),
            table_EH.stride(0),
            pairs.num_pairs,
            TOP_K=pairs.top_k or 0,
            HAS_HOT=pairs.hot is not None,
            HIDDEN_SIZE=hidden_size,
            SLICE=width,
            BLOCK_HIDDEN=min(tiles.block_bytes // element_bytes, width),
            BLOCK_PAIRS=tiles.block_pairs,
            PAIRS_PER_PROGRAM=pairs_per_program,
            num_warps=tiles.num_warps,
        )
    return add_partial_sums(out_SN, dtype)


def spmm(
    values_N: Tensor,
    table_EH: Tensor,
    pairs: Pairs,
    outputs: Outputs,
    hot_sums_PTH: Tensor | None = None,
) -> None:
    """See `Backend.spmm`; adds hot_sums_PTH (P, T, H), the sums over partitioned hot pairs."""
    chunks = outputs()
    hidden_size = table_EH.shape[1]
    accumulator = accumulator_dtype(values_N.dtype, table_EH.dtype)
    row_bytes = hidden_size * table_EH.element_size()
    is_long = row_bytes >= LONG_BYTES and pairs.tile_pairs > VERY_LOW_TOP_K
    tiles = SPMM_LONG if is_long else SPMM
    block_hidden = tiles.block_bytes // table_EH.element_size()
    block_hidden = min(block_hidden, next_power_of_2(max(1, hidden_size)))
    blocks = cdiv(hidden_size, block_hidden)
    splits = spmm_splits(pairs, blocks) if hot_sums_PTH is None else 1
    values_N = values_N.to(accumulator).contiguous()
    table_EH = contiguous_rows(table_EH)
    for chunk in chunks:
        out, accumulate_with = chunk.out, chunk.accumulate_with
        if splits > 1:
            out = torch.empty((splits, *out.shape), device=out.device, dtype=accumulator)
            accumulate_with = None
        if out.numel() > 0:
            launch(
                spmm_kernel,
                (chunk.out.shape[0], blocks, splits),
                values_N,
                table_EH,
                *_row_pointers(pairs, chunk.rows.start),
                pairs.expert_ids,
                values_N if hot_sums_PTH is None else hot_sums_PTH,
                pairs.expert_ids if pairs.hot is None else pairs.hot.num_hot,
                values_N if accumulate_with is None else accumulate_with,
                out,
                table_EH.stride(0),
                TOP_K=pairs.top_k or 0,
                HAS_HOT=pairs.hot is not None,
                HIDDEN_SIZE=hidden_size,
                BLOCK_HIDDEN=block_hidden,
                BLOCK_PAIRS=tiles.block_pairs,
                SPLIT_K=splits,
                HOT_SPLITS=0 if hot_sums_PTH is None else hot_sums_PTH.shape[0],
                NUM_ADDENDS=0 if accumulate_with is None else len(accumulate_with),
                OWN_INDEX=0 if accumulate_with is None else chunk.own_index,
                num_warps=tiles.num_warps,
            )
            if splits > 1:
                _add_splits(out, chunk)
        chunk.on_written()


def spmm_splits(pairs: Pairs, blocks: int) -> int:
    """Number of splits of a token's pairs in an spmm over so many blocks of the hidden size."""
    config = tuning.config
    programs = pairs.num_tokens * blocks
    if programs == 0:
        return 1
    splits = min(config.spmm_min_programs // programs, config.spmm_max_splits)
    return max(1, min(splits, pairs.tile_pairs // config.spmm_min_split_pairs))


def _add_splits(partial_sums: Tensor, chunk: OutputChunk) -> None:
    addends, dtype = chunk.accumulate_with, chunk.out.dtype
    if addends is None:
        add_partial_sums(partial_sums, dtype, chunk.out)
        return
    add_partial_sums(partial_sums, addends.dtype, addends[chunk.own_index])
    add_partial_sums(addends, dtype, chunk.out)


def add_partial_sums(
    partial_sums: Tensor, out_dtype: torch.dtype, total: Tensor | None = None
) -> Tensor:
    """Sum over the first dimension, in order, in the dtype of the partial sums, rounded once.

    Args:
        partial_sums: (P, ...) contiguous. If P is 1 and there is no `total`, it is returned as is.
        out_dtype: dtype of the result.
        total: where to write the result.
    """
    if len(partial_sums) == 1 and total is None:
        return partial_sums[0]
    if total is None:
        total = torch.empty(partial_sums.shape[1:], device=partial_sums.device, dtype=out_dtype)
    launch(
        add_partial_sums_kernel,
        (cdiv(total.numel(), SUM_BLOCK),),
        partial_sums,
        total,
        total.numel(),
        NUM_PARTIAL_SUMS=len(partial_sums),
        BLOCK=SUM_BLOCK,
    )
    return total


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """See `Backend.spmm_t`."""
    out = torch.empty(pairs.num_experts, rows_TH.shape[1], device=rows_TH.device, dtype=out_dtype)
    spmm_t_into([TableSum(values_N, rows_TH, out)], pairs, scale)
    return out


def spmm_t_both(
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    pairs: Pairs,
    out_dtypes: tuple[torch.dtype, torch.dtype],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `Backend.spmm_t_both`: both tables in one launch."""
    sums = two_table_sums(values_2N, rows_2TH, pairs.num_experts, out_dtypes)
    spmm_t_into(sums, pairs, scale)
    return sums[0].out, sums[1].out


class TableSum(NamedTuple):
    """One spmm_t: values (N,) and rows (T, H) to sum, and where the sums (E, H) go."""

    values: Tensor
    rows: Tensor
    out: Tensor


def two_table_sums(
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    num_experts: int,
    out_dtypes: tuple[torch.dtype, torch.dtype],
) -> list[TableSum]:
    """Allocate the outputs of `spmm_t_both`."""
    shape = (num_experts, rows_2TH[0].shape[1])
    outs = [torch.empty(shape, device=rows_2TH[0].device, dtype=dtype) for dtype in out_dtypes]
    return [TableSum(*one) for one in zip(values_2N, rows_2TH, outs, strict=True)]


class _TableArguments(NamedTuple):
    """Arguments of `spmm_t_kernel` for one table, in their order."""

    values: Tensor
    rows: Tensor
    row_stride: int
    out: Tensor


def spmm_t_into(sums: Sequence[TableSum], pairs: Pairs, scale: float) -> None:
    """Compute the sums of one table or two, without the rows of partitioned hot experts."""
    out = sums[0].out
    if out.numel() == 0:
        return
    config = tuning.config
    hidden_size = out.shape[1]
    accumulator = accumulator_dtype(*(one.dtype for pair in sums for one in pair[:2]))
    tables: list[_TableArguments] = []
    for values_N, rows_TH, out_EH in sums:
        rows_TH = contiguous_rows(rows_TH)
        values_N = values_N.to(accumulator).contiguous()
        if accumulator == torch.float64:
            # As a kernel argument, the scale would be rounded to float32.
            values_N = values_N * scale
        tables.append(
            _TableArguments(values=values_N, rows=rows_TH, row_stride=rows_TH.stride(0), out=out_EH)
        )
    scale = 1.0 if accumulator == torch.float64 else scale
    num_splits = cdiv(pairs.num_pairs, config.spmm_t_split_pairs)
    # With a single split, no expert has more pairs than one program sums.
    num_splits = 0 if num_splits == 1 else num_splits
    partial_sums = torch.empty(
        (num_splits, 2, len(sums), hidden_size), device=out.device, dtype=accumulator
    )
    row_bytes = sum(table.rows.element_size() for table in tables)
    block_hidden = spmm_t_block_hidden(pairs, hidden_size, row_bytes)
    blocks = cdiv(hidden_size, block_hidden)
    shared = {
        "HIDDEN_SIZE": hidden_size,
        "BLOCK_HIDDEN": block_hidden,
        "SPLIT": config.spmm_t_split_pairs,
        "TABLES": len(sums),
    }
    launch(
        spmm_t_kernel,
        (num_splits + pairs.num_experts, blocks),
        *tables[0],
        *tables[-1],
        partial_sums,
        pairs.expert_ids,
        pairs.expert_ids if pairs.top_k else tokens_by_expert(pairs),
        pairs.expert_order,
        pairs.expert_offsets,
        pairs.expert_ids if pairs.hot is None else pairs.hot.hot_index,
        scale,
        pairs.num_pairs,
        num_splits,
        TOP_K=pairs.top_k or 0,
        HAS_HOT=pairs.hot is not None,
        num_warps=max(1, block_hidden // config.spmm_t_warp_hidden),
        **shared,
    )
    if num_splits > 0:
        launch(
            spmm_t_splits_kernel,
            (num_splits, blocks, len(sums)),
            partial_sums,
            sums[0].out,
            sums[-1].out,
            pairs.expert_ids,
            pairs.expert_order,
            pairs.expert_offsets,
            scale,
            pairs.num_pairs,
            BLOCK_SPLITS=4,
            **shared,
        )


def spmm_t_block_hidden(pairs: Pairs, hidden_size: int, element_bytes: int) -> int:
    """Number of elements of a row that an spmm_t sums at a time.

    Args:
        pairs: the pattern.
        hidden_size: H.
        element_bytes: bytes of one element of the rows, added up if two tables are summed.
    """
    config = tuning.config
    column_bytes = pairs.num_tokens * element_bytes
    block_hidden = config.spmm_t_max_hidden
    while (
        block_hidden > config.spmm_t_min_hidden
        and column_bytes * block_hidden > config.spmm_t_cached_bytes
    ):
        block_hidden //= 2
    mean_pairs = pairs.num_pairs / pairs.num_experts
    if (
        config.spmm_t_narrow_min_pairs <= mean_pairs <= config.spmm_t_narrow_max_pairs
        and column_bytes * block_hidden > config.spmm_t_cached_bytes
    ):
        block_hidden = config.spmm_t_narrow_hidden
    return min(block_hidden, next_power_of_2(hidden_size))


def prepare_table_grads(pairs: Pairs) -> None:
    """Compute the tokens by expert of ragged rows; other kernels divide by K."""
    if pairs.top_k is None:
        tokens_by_expert(pairs)


def tokens_by_expert(pairs: Pairs) -> Tensor:
    """Compute `Pairs.token_ids` of a ragged pattern in the order by expert, once per pattern.

    [1, 1, 0, 1] in the example of `Pairs`, where the order is [2, 1, 0, 3].
    """
    scratch = pairs.scratch
    if scratch.tokens_by_expert is None:
        # Not by the kernel that finds token ids, which would wait for the order first.
        scratch.tokens_by_expert = _find_token_ids(pairs).index_select(0, pairs.expert_order)
    return scratch.tokens_by_expert


def _find_token_ids(pairs: Pairs) -> Tensor:
    # Wrong offsets are reported late on CUDA: until then no token may be out of range.
    found = torch.zeros_like(pairs.expert_ids)
    if pairs.num_pairs > 0:
        blocks = min(cdiv(pairs.tile_pairs, TOKEN_IDS_BLOCK), MAX_GRID_Y)
        launch(
            token_ids_kernel,
            (pairs.num_tokens, blocks),
            pairs.row_offsets,
            found,
            BLOCK=TOKEN_IDS_BLOCK,
            num_warps=1,
        )
    return found


def _row_pointers(pairs: Pairs, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """row_offsets and pair_counts for kernels, or any tensor where they do not read them."""
    return (
        pairs.expert_ids if pairs.top_k else pairs.row_offsets[first_row:],
        pairs.expert_ids if pairs.hot is None else pairs.hot.pair_counts,
    )


def contiguous_rows(table: Tensor) -> Tensor:
    """Return the table with contiguous rows, as a copy if need be."""
    return table if table.stride(-1) == 1 else table.contiguous()


resolve_old_names(__name__)
