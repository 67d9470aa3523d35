"""Plain PyTorch for any device and dtype: gathers a bounded number of rows at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backends.defaults import fill_chunks, memory_for_sums, spmm_t_in_turn
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.overlap import InputChunk, Outputs, wait_for_rows
from flash_moe.ops.pairs import Pairs
from flash_moe.ops.tuning import Tuning

prepare_table_grads = None


@dataclass(frozen=True)
class ReferenceConfig:
    """Size of what is gathered at a time.

    block_elements: elements of a block of gathered rows; two such in float32 take 32 MiB.
    """

    block_elements: int = 2**22


tuning = Tuning(ReferenceConfig())


def sddmm(
    rows_TH: Tensor, table_EH: Tensor, pairs: Pairs, inputs: Sequence[InputChunk] = ()
) -> Tensor:
    """See `Backend.sddmm`."""
    wait_for_rows(inputs)
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    out_N = torch.zeros(pairs.num_pairs, device=rows_TH.device, dtype=dtype)
    for positions in _blocks(pairs, rows_TH.shape[1]):
        rows = rows_TH[pairs.token_ids[positions]].to(dtype)
        experts = table_EH[pairs.expert_ids[positions]].to(dtype)
        out_N[positions] = (rows * experts).sum(1)
    return out_N


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, outputs: Outputs) -> None:
    """See `Backend.spmm`."""
    chunks = outputs()
    dtype = accumulator_dtype(values_N.dtype, table_EH.dtype)
    shape = (pairs.num_tokens, table_EH.shape[1])
    sums_TH = memory_for_sums(chunks, shape, dtype, table_EH.device).zero_()
    _add_weighted_rows(sums_TH, values_N, table_EH, pairs.expert_ids, pairs.token_ids, pairs)
    fill_chunks(sums_TH, chunks)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """See `Backend.spmm_t`."""
    dtype = accumulator_dtype(values_N.dtype, rows_TH.dtype)
    shape = (pairs.num_experts, rows_TH.shape[1])
    sums_EH = torch.zeros(shape, device=rows_TH.device, dtype=dtype)
    _add_weighted_rows(sums_EH, values_N, rows_TH, pairs.token_ids, pairs.expert_ids, pairs)
    return sums_EH.mul_(scale).to(out_dtype)


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def _add_weighted_rows(
    sums: Tensor,
    values_N: Tensor,
    source: Tensor,
    source_ids: Tensor,
    target_ids: Tensor,
    pairs: Pairs,
) -> None:
    """Add values[n] * source[source_ids[n]] to sums[target_ids[n]] for each occupied slot n."""
    for positions in _blocks(pairs, source.shape[1]):
        rows = source[source_ids[positions]].to(sums.dtype)
        rows.mul_(values_N[positions].to(sums.dtype).unsqueeze(1))
        sums.index_add_(0, target_ids[positions], rows)


def _blocks(pairs: Pairs, hidden_size: int) -> Iterator[Tensor]:
    """Yield the positions of occupied slots, a bounded number at a time."""
    positions = (pairs.expert_ids >= 0).nonzero().squeeze(1)
    yield from positions.split(max(1, tuning.config.block_elements // max(1, hidden_size)))
