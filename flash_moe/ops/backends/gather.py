"""CUDA tensors through Triton kernels that gather table rows: launchers and their tuning."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flash_moe.ops.backends import accumulator_dtype
from flash_moe.ops.backends.gather_kernels import sddmm_kernel, weighted_row_sum_kernel
from flash_moe.ops.devices import on_device
from flash_moe.ops.pairs import Pairs

MAX_GRID_Y = 65_535


@dataclass(frozen=True)
class SddmmConfig:
    """Rows held at one time are block_pairs x block_hidden; the dot product stays in a warp."""

    block_pairs: int = 4
    block_hidden: int = 512
    pairs_per_program: int = 64
    num_warps: int = 1


@dataclass(frozen=True)
class RowSumConfig:
    """Rows held at one time are block_pairs x block_hidden."""

    block_pairs: int
    block_hidden: int
    num_warps: int


# The fastest of eight to ten tried for each, or within 2% of it, on an H200 with bf16, T=4096,
# H=1024, E=102,400, K=512: 8.4, 9.0 and 8.8 TB/s of gathered rows.
SDDMM = SddmmConfig()
SPMM = RowSumConfig(block_pairs=4, block_hidden=512, num_warps=1)
SPMM_T = RowSumConfig(block_pairs=2, block_hidden=1024, num_warps=2)


def sddmm(rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor:
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    out_N = torch.empty(pairs.num_pairs, device=rows_TH.device, dtype=dtype)
    num_tokens, hidden_size = rows_TH.shape
    if hidden_size == 0:
        return out_N.zero_()
    if pairs.num_pairs == 0:
        return out_N
    rows_TH, table_EH = _contiguous_rows(rows_TH), _contiguous_rows(table_EH)
    # Enough programs for a row of average length; a longer row is walked in strides.
    mean_pairs = triton.cdiv(pairs.num_pairs, num_tokens)
    blocks = min(triton.cdiv(mean_pairs, SDDMM.pairs_per_program), MAX_GRID_Y)
    with on_device(rows_TH):
        sddmm_kernel[(num_tokens, blocks)](
            rows_TH,
            table_EH,
            pairs.row_offsets,
            pairs.expert_ids,
            out_N,
            rows_TH.stride(0),
            table_EH.stride(0),
            HIDDEN_SIZE=hidden_size,
            BLOCK_HIDDEN=min(SDDMM.block_hidden, triton.next_power_of_2(hidden_size)),
            BLOCK_PAIRS=SDDMM.block_pairs,
            PAIRS_PER_PROGRAM=SDDMM.pairs_per_program,
            num_warps=SDDMM.num_warps,
        )
    return out_N


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    return _weighted_row_sum(
        values_N, table_EH, pairs.row_offsets, pairs.expert_ids, None, out_dtype, SPMM
    )


def spmm_t(values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    return _weighted_row_sum(
        values_N,
        rows_TH,
        pairs.expert_offsets,
        pairs.token_ids,
        pairs.expert_order,
        out_dtype,
        SPMM_T,
    )


def _weighted_row_sum(
    values_N: Tensor,
    source: Tensor,
    offsets: Tensor,
    ids_N: Tensor,
    order_N: Tensor | None,
    out_dtype: torch.dtype,
    config: RowSumConfig,
) -> Tensor:
    num_rows, hidden_size = offsets.shape[0] - 1, source.shape[1]
    out = torch.empty(num_rows, hidden_size, device=source.device, dtype=out_dtype)
    if out.numel() == 0:
        return out
    source = _contiguous_rows(source)
    values_N = values_N.to(accumulator_dtype(values_N.dtype, source.dtype)).contiguous()
    block_hidden = min(config.block_hidden, triton.next_power_of_2(hidden_size))
    with on_device(source):
        weighted_row_sum_kernel[(num_rows, triton.cdiv(hidden_size, block_hidden))](
            values_N,
            source,
            offsets,
            ids_N,
            ids_N if order_N is None else order_N,
            out,
            source.stride(0),
            HIDDEN_SIZE=hidden_size,
            HAS_ORDER=order_N is not None,
            BLOCK_HIDDEN=block_hidden,
            BLOCK_PAIRS=config.block_pairs,
            num_warps=config.num_warps,
        )
    return out


def _contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()
