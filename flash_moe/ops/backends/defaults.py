"""Defaults for backends that gain nothing from chunks, or from two table gradients at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flash_moe.ops.overlap import OutputChunk
from flash_moe.ops.pairs import Pairs


def spmm_t_in_turn(
    spmm_t: Callable[..., Tensor],
    values_2N: tuple[Tensor, Tensor],
    rows_2TH: tuple[Tensor, Tensor],
    pairs: Pairs,
    out_dtypes: tuple[torch.dtype, torch.dtype],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `spmm_t_both` by calling `spmm_t` twice."""
    first, second = (
        spmm_t(values_N, rows_TH, pairs, dtype, scale)
        for values_N, rows_TH, dtype in zip(values_2N, rows_2TH, out_dtypes, strict=True)
    )
    return first, second


def memory_for_sums(
    chunks: Sequence[OutputChunk], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return where to compute the sums of all rows: in the only chunk, if that has their dtype."""
    if len(chunks) == 1 and chunks[0].accumulate_with is None and chunks[0].out.dtype == dtype:
        return chunks[0].out
    return torch.empty(shape, dtype=dtype, device=device)


def fill_chunks(sums_TH: Tensor, chunks: Sequence[OutputChunk]) -> None:
    """Copy the sums of all rows into their chunks, unless they were computed there."""
    for chunk in chunks:
        if chunk.accumulate_with is not None:
            chunk.accumulate_with[chunk.own_index] = sums_TH[chunk.rows]
            total = chunk.accumulate_with[0].clone()
            for others in chunk.accumulate_with[1:]:
                total += others
            chunk.out.copy_(total)
        elif chunk.out is not sums_TH:
            chunk.out.copy_(sums_TH[chunk.rows])
        chunk.on_written()
