"""Plain PyTorch, any device and dtype: gathered rows, a bounded block of pairs at a time."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops.backends import accumulator_dtype, spmm_t_in_turn
from flash_moe.ops.pairs import Pairs

# Elements of one gathered block: two such blocks in float32 take 32 MiB.
BLOCK_ELEMENTS = 2**22


def sddmm(rows_TH: Tensor, table_EH: Tensor, pairs: Pairs) -> Tensor:
    dtype = accumulator_dtype(rows_TH.dtype, table_EH.dtype)
    out_N = torch.zeros(pairs.num_pairs, device=rows_TH.device, dtype=dtype)
    for positions in _blocks(pairs, rows_TH.shape[1]):
        rows = rows_TH[pairs.token_ids[positions]].to(dtype)
        experts = table_EH[pairs.expert_ids[positions]].to(dtype)
        out_N[positions] = (rows * experts).sum(1)
    return out_N


def spmm(values_N: Tensor, table_EH: Tensor, pairs: Pairs, out_dtype: torch.dtype) -> Tensor:
    return _weighted_row_sum(
        values_N, table_EH, pairs.expert_ids, pairs.token_ids, pairs.num_tokens, pairs
    ).to(out_dtype)


def spmm_t(
    values_N: Tensor, rows_TH: Tensor, pairs: Pairs, out_dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    total_EH = _weighted_row_sum(
        values_N, rows_TH, pairs.token_ids, pairs.expert_ids, pairs.num_experts, pairs
    )
    return total_EH.mul_(scale).to(out_dtype)


spmm_t_both = partial(spmm_t_in_turn, spmm_t)


def _weighted_row_sum(
    values_N: Tensor,
    source: Tensor,
    source_ids: Tensor,
    target_ids: Tensor,
    num_targets: int,
    pairs: Pairs,
) -> Tensor:
    dtype = accumulator_dtype(values_N.dtype, source.dtype)
    out = torch.zeros(num_targets, source.shape[1], device=source.device, dtype=dtype)
    for positions in _blocks(pairs, source.shape[1]):
        rows = source[source_ids[positions]].to(dtype)
        rows.mul_(values_N[positions].to(dtype).unsqueeze(1))
        out.index_add_(0, target_ids[positions], rows)
    return out


def _blocks(pairs: Pairs, hidden_size: int) -> Iterator[Tensor]:
    """Positions of the pairs that are no empty slot, a bounded number at a time."""
    positions = (pairs.expert_ids >= 0).nonzero().squeeze(1)
    yield from positions.split(max(1, BLOCK_ELEMENTS // max(1, hidden_size)))
