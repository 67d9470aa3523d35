"""CUDA tensors through Triton kernels that gather table rows: launchers and their tuning."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.ops.backends import accumulator_dtype
from flash_moe.ops.backends.gather_kernels import (
    sddmm_kernel,
    spmm_kernel,
    spmm_t_kernel,
    sum_chunks_kernel,
    sum_pieces_kernel,
    token_ids_kernel,
)
from flash_moe.ops.overlap import InputChunk, OutputChunk
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2

MAX_GRID_Y = 65_535
SUM_BLOCK = 1024
TOKEN_IDS_BLOCK = 256


@dataclass(frozen=True)
class SddmmConfig:
    """Rows held at one time are block_pairs x block_bytes; the dot product stays in a warp.

    Wider rows are done in slices of slice_bytes, one after the other, and a program gets
    least_pairs to most_pairs pairs: few enough that the `programs` which run at one time read a
    part of the table that stays in a cache of cached_bytes.
    """

    slice_bytes: int
    block_pairs: int
    block_bytes: int = 1024
    num_warps: int = 1
    least_pairs: int = 8
    most_pairs: int = 64
    programs: int = 4224
    cached_bytes: int = 45_000_000


@dataclass(frozen=True)
class SpmmConfig:
    """Rows held at one time are block_pairs x block_bytes.

    min_programs: with fewer, a token's pairs are summed in up to max_pieces pieces of least_pairs
    or more.
    """

    block_pairs: int
    block_bytes: int
    min_programs: int = 4096
    max_pieces: int = 64
    least_pairs: int = 16
    num_warps: int = 1


@dataclass(frozen=True)
class SpmmTConfig:
    """Of a row, most_hidden to least_hidden elements are summed at a time, warp_hidden in a warp.

    So few that what is read of the rows (T, H) of the tables together stays in a cache of
    cached_bytes, beside the sums that are written. Where not even least_hidden stay there, and
    experts have least_few to most_few pairs on average, few_hidden are summed at a time. chunk: an
    expert of more pairs is summed in pieces of that many.
    """

    few_hidden: int = 256
    least_few: int = 8
    most_few: int = 64
    most_hidden: int = 2048
    least_hidden: int = 512
    warp_hidden: int = 512
    cached_bytes: int = 24_000_000
    chunk: int = 1024


# Rows of this many bytes are long for an spmm, longer ones for an sddmm.
LONG_BYTES = 2048
# Tokens of this many pairs go fast through the table, and of this many very fast.
FEW_PAIRS, VERY_FEW_PAIRS = 128, 32
SDDMM = SddmmConfig(slice_bytes=LONG_BYTES, block_pairs=8)
SDDMM_IN_SLICES = SddmmConfig(slice_bytes=1024, block_pairs=4)
SDDMM_IN_NARROW_SLICES = SddmmConfig(slice_bytes=512, block_pairs=8, block_bytes=512)
SPMM = SpmmConfig(block_pairs=8, block_bytes=512)
SPMM_LONG = SpmmConfig(block_pairs=32, block_bytes=256)
SPMM_T = SpmmTConfig()


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, parts: Sequence[InputChunk] = ()
) -> Tensor:
    """As every backend's; the values of hot pairs are left to others to write.

    parts: of ragged rows, in the order in which they are read.
    """
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    num_tokens, hidden_size = rows_TH.shape
    element_bytes = table_EH.element_size()
    mean_pairs = pairs.mean_pairs
    in_slices = hidden_size * element_bytes > LONG_BYTES or mean_pairs <= FEW_PAIRS
    config = SDDMM_IN_SLICES if in_slices else SDDMM
    if mean_pairs <= VERY_FEW_PAIRS:
        config = SDDMM_IN_NARROW_SLICES
    width = min(config.slice_bytes // element_bytes, next_power_of_2(max(1, hidden_size)))
    slices = max(1, cdiv(hidden_size, width))
    out_SN = torch.empty((slices, pairs.num_pairs), device=rows_TH.device, dtype=dtype)
    if hidden_size == 0 or pairs.num_pairs == 0:
        for part in parts:
            part.wait()
        return out_SN.zero_()[0]
    table_EH = contiguous_rows(table_EH)
    # Programs go through all tokens before they go on in the table.
    read_at_once = config.programs / num_tokens * pairs.num_experts * width * element_bytes
    pairs_per_program = config.most_pairs
    while (
        pairs_per_program > config.least_pairs
        and read_at_once * pairs_per_program > config.cached_bytes * mean_pairs
    ):
        pairs_per_program //= 2
    # Enough programs for a row of average length; a longer row is walked in strides.
    blocks = min(cdiv(mean_pairs, pairs_per_program), MAX_GRID_Y)
    for part in parts or [InputChunk(slice(0, num_tokens))]:
        part.wait()
        of_part_TH = rows_TH[part.rows] if part.source is None else part.source
        of_part_TH = contiguous_rows(of_part_TH)
        if len(of_part_TH) == 0:
            continue
        launch(
            sddmm_kernel,
            (len(of_part_TH), blocks, slices),
            of_part_TH,
            table_EH,
            *_row_pointers(pairs, part.rows.start),
            pairs.expert_ids,
            out_SN,
            of_part_TH.stride(0),
            table_EH.stride(0),
            pairs.num_pairs,
            SLOTS=pairs.slots,
            HAS_HOT=pairs.hot is not None,
            HIDDEN_SIZE=hidden_size,
            SLICE=width,
            BLOCK_HIDDEN=min(config.block_bytes // element_bytes, width),
            BLOCK_PAIRS=config.block_pairs,
            PAIRS_PER_PROGRAM=pairs_per_program,
            num_warps=config.num_warps,
        )
    return sum_pieces(out_SN, dtype)


def spmm(
    values_N: Tensor,
    table_EH: Tensor,
    pairs: Pairs,
    out_dtype: torch.dtype,
    hot_sums_PTH: Tensor | None = None,
) -> Tensor:
    """As every backend's; the sums over hot pairs come from elsewhere, as (P, T, H)."""
    shape = (pairs.num_tokens, table_EH.shape[1])
    out_TH = torch.empty(shape, device=table_EH.device, dtype=out_dtype)
    whole = [OutputChunk(slice(0, pairs.num_tokens), out_TH)]
    spmm_into(values_N, table_EH, pairs, whole, hot_sums_PTH)
    return out_TH


def spmm_into(
    values_N: Tensor,
    table_EH: Tensor,
    pairs: Pairs,
    parts: Sequence[OutputChunk],
    hot_sums_PTH: Tensor | None = None,
) -> None:
    """`spmm`, of ragged rows if there are several parts, in their order."""
    hidden_size = table_EH.shape[1]
    accumulator = accumulator_dtype(values_N.dtype, table_EH.dtype)
    row_bytes = hidden_size * table_EH.element_size()
    is_long = row_bytes >= LONG_BYTES and pairs.mean_pairs > VERY_FEW_PAIRS
    config = SPMM_LONG if is_long else SPMM
    block_hidden = config.block_bytes // table_EH.element_size()
    block_hidden = min(block_hidden, next_power_of_2(max(1, hidden_size)))
    blocks = cdiv(hidden_size, block_hidden)
    pieces = _spmm_pieces(pairs, blocks, config) if hot_sums_PTH is None else 1
    values_N = values_N.to(accumulator).contiguous()
    table_EH = contiguous_rows(table_EH)
    for part in parts:
        out, addends = part.out, part.accumulate_with
        if pieces > 1:
            out = torch.empty((pieces, *out.shape), device=out.device, dtype=accumulator)
            addends = None
        if out.numel() > 0:
            launch(
                spmm_kernel,
                (part.out.shape[0], blocks, pieces),
                values_N,
                table_EH,
                *_row_pointers(pairs, part.rows.start),
                pairs.expert_ids,
                values_N if hot_sums_PTH is None else hot_sums_PTH,
                pairs.expert_ids if pairs.hot is None else pairs.hot.num_hot,
                values_N if addends is None else addends,
                out,
                table_EH.stride(0),
                SLOTS=pairs.slots,
                HAS_HOT=pairs.hot is not None,
                HIDDEN_SIZE=hidden_size,
                BLOCK_HIDDEN=block_hidden,
                BLOCK_PAIRS=config.block_pairs,
                PIECES=pieces,
                HOT_PIECES=0 if hot_sums_PTH is None else hot_sums_PTH.shape[0],
                ADDENDS=0 if addends is None else len(addends),
                PLACE=0 if addends is None else part.own_index,
                num_warps=config.num_warps,
            )
            if pieces > 1:
                _sum_with_addends(out, part)
        part.on_written()


def _sum_with_addends(pieces: Tensor, part: OutputChunk) -> None:
    addends, dtype = part.accumulate_with, part.out.dtype
    if addends is None:
        sum_pieces(pieces, dtype, part.out)
        return
    sum_pieces(pieces, addends.dtype, addends[part.own_index])
    sum_pieces(addends, dtype, part.out)


def sum_pieces(pieces: Tensor, out_dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
    """Summed over the first dimension, in order, and rounded once; into `total` if given."""
    if len(pieces) == 1 and total is None:
        return pieces[0]
    if total is None:
        total = torch.empty(pieces.shape[1:], device=pieces.device, dtype=out_dtype)
    launch(
        sum_pieces_kernel,
        (cdiv(total.numel(), SUM_BLOCK),),
        pieces,
        total,
        total.numel(),
        NUM_PIECES=len(pieces),
        BLOCK=SUM_BLOCK,
    )
    return total


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    out = torch.empty(pairs.num_experts, rows_TH.shape[1], device=rows_TH.device, dtype=out_dtype)
    sum_for_experts([(values_N, rows_TH, out)], pairs, scale)
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
    sums = list(zip(values_2N, rows_2TH, (first, second), strict=True))
    sum_for_experts(sums, pairs, scale)
    return first, second


def sum_for_experts(sums: list[tuple[Tensor, Tensor, Tensor]], pairs: Pairs, scale: float) -> None:
    """Values (N,), rows (T, H) and where their sums go (E, H), for one table or two."""
    out = sums[0][2]
    if out.numel() == 0:
        return
    hidden_size = out.shape[1]
    accumulator = accumulator_dtype(*(tensor.dtype for one in sums for tensor in one[:2]))
    tables: list[tuple[Tensor, Tensor, int, Tensor]] = []
    for values_N, rows_TH, out_EH in sums:
        rows_TH = contiguous_rows(rows_TH)
        values_N = values_N.to(accumulator).contiguous()
        if accumulator == torch.float64:
            # A number reaches a kernel in float32.
            values_N = values_N * scale
        tables.append((values_N, rows_TH, rows_TH.stride(0), out_EH))
    scale = 1.0 if accumulator == torch.float64 else scale
    num_chunks = cdiv(pairs.num_pairs, SPMM_T.chunk)
    # Nobody has more pairs than a chunk takes, if there is one chunk.
    num_chunks = 0 if num_chunks == 1 else num_chunks
    partials = torch.empty(
        (num_chunks, 2, len(sums), hidden_size), device=out.device, dtype=accumulator
    )
    few = SPMM_T.least_few <= pairs.num_pairs / pairs.num_experts <= SPMM_T.most_few
    block_hidden = _block_of_sums([rows_TH for _, rows_TH, _, _ in tables], few)
    blocks = cdiv(hidden_size, block_hidden)
    shared = {
        "HIDDEN_SIZE": hidden_size,
        "BLOCK_HIDDEN": block_hidden,
        "CHUNK": SPMM_T.chunk,
        "TABLES": len(sums),
    }
    launch(
        spmm_t_kernel,
        (
            num_chunks + pairs.num_experts,
            blocks,
        ),
        *tables[0],
        *tables[-1],
        partials,
        pairs.expert_ids,
        pairs.expert_ids if pairs.slots else tokens_by_expert(pairs),
        pairs.expert_order,
        pairs.expert_offsets,
        pairs.expert_ids if pairs.hot is None else pairs.hot.places,
        scale,
        pairs.num_pairs,
        num_chunks,
        SLOTS=pairs.slots,
        HAS_HOT=pairs.hot is not None,
        num_warps=max(1, block_hidden // SPMM_T.warp_hidden),
        **shared,
    )
    if num_chunks > 0:
        launch(
            sum_chunks_kernel,
            (
                num_chunks,
                blocks,
                len(sums),
            ),
            partials,
            tables[0][3],
            tables[-1][3],
            pairs.expert_ids,
            pairs.expert_order,
            pairs.expert_offsets,
            scale,
            pairs.num_pairs,
            BLOCK_CHUNKS=4,
            **shared,
        )


def tokens_by_expert(pairs: Pairs) -> Tensor:
    """`Pairs.token_ids` of ragged rows in the order by expert, kept.

    [1, 1, 0, 1] in the example of `Pairs`, where the order is [2, 1, 0, 3].
    """
    if not pairs.kept:
        # A kernel that put them in order would wait for the order before it can ask for a token.
        pairs.kept.append(_find_token_ids(pairs).index_select(0, pairs.expert_order))
    return pairs.kept[0]


def _find_token_ids(pairs: Pairs) -> Tensor:
    # Bad offsets are reported late on CUDA: until then no token may lie outside.
    found = torch.zeros_like(pairs.expert_ids)
    if pairs.num_pairs > 0:
        blocks = min(cdiv(pairs.mean_pairs, TOKEN_IDS_BLOCK), MAX_GRID_Y)
        launch(
            token_ids_kernel,
            (pairs.num_tokens, blocks),
            pairs.row_offsets,
            found,
            BLOCK=TOKEN_IDS_BLOCK,
            num_warps=1,
        )
    return found


def _block_of_sums(rows: list[Tensor], few: bool) -> int:
    """How many elements of a row are summed at a time."""
    num_tokens, hidden_size = rows[0].shape
    column_bytes = num_tokens * sum(rows_TH.element_size() for rows_TH in rows)
    block_hidden = SPMM_T.most_hidden
    while block_hidden > SPMM_T.least_hidden and column_bytes * block_hidden > SPMM_T.cached_bytes:
        block_hidden //= 2
    if few and column_bytes * block_hidden > SPMM_T.cached_bytes:
        block_hidden = SPMM_T.few_hidden
    return min(block_hidden, next_power_of_2(hidden_size))


def _spmm_pieces(pairs: Pairs, blocks: int, config: SpmmConfig) -> int:
    programs = pairs.num_tokens * blocks
    if programs == 0:
        return 1
    pieces = min(config.min_programs // programs, config.max_pieces)
    return max(1, min(pieces, pairs.mean_pairs // config.least_pairs))


def _row_pointers(pairs: Pairs, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """row_offsets and pair_counts, or anything where the kernels do not read them."""
    return (
        pairs.expert_ids if pairs.slots else pairs.row_offsets[first_row:],
        pairs.expert_ids if pairs.hot is None else pairs.hot.pair_counts,
    )


def contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()
