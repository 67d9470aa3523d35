"""Partition of each token's pairs into those of hot experts and the others.

T tokens of K slots, E experts, N = T K pairs. An expert is hot when at least `threshold` tokens use
it, so many that a matrix product is faster than gathering. At most M = min(E, N / threshold)
experts are hot, which bounds every array without reading anything back from the device. Hot
experts are numbered 0, 1, ... (their hot index) in ascending order of their ids. Each token's
pairs are ordered

    cold pairs | one pair of each hot expert | repeated pairs of hot experts | empty slots

by ascending expert within each group. The id of a hot pair becomes -2 - expert.

    pair_counts  (T, 3)   int32   number of pairs in each of the first three groups
    hot_index    (E,)     int32   hot index of each expert, -1 if it is cold
    experts      (M,)     int32   expert of each hot index
    num_hot      (1,)     int32   number of hot experts
    bitmaps      (T, B)   int64   one element for 32 hot indices. Lower half: bit b is set if the
                                  token has a pair of the expert with hot index 32 i + b. Upper
                                  half: sum of the positions within the token of the first pairs
                                  of these experts. Only written up to num_hot, rounded up to a
                                  multiple of BLOCK_HOT.

The c first pairs of one bitmap have consecutive positions p, ..., p + c - 1, whose sum is
c p + c (c - 1) / 2; with the number c of set bits, p = (sum - c (c - 1) / 2) / c.

Example: K = 4, one token with experts [7, 2, 7, 5], of which 2 and 7 are hot (hot index 0 and 1):
ids become [5, -4, -9, -9], pair_counts [1, 2, 1], bitmaps [[3 + (1 + 2 << 32)]].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import hot_threshold
from flash_moe.ops.hot_experts_kernels import (
    count_hot_kernel,
    index_hot_kernel,
    partition_hot_pairs_kernel,
)
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2
from flash_moe.ops.tuning import Tuning

BLOCK_EXPERTS = 1024
# Kernels process hot indices in blocks of which this is a multiple.
BLOCK_HOT = 128
# Arrays in the workspace begin on multiples of 16 bytes.
ALIGNMENT = 4


@dataclass(frozen=True)
class HotConfig:
    """When an expert is hot.

    threshold: number of tokens from which on it is; None: `backend_choice.hot_threshold`.
    """

    threshold: int | None = None


tuning = Tuning(HotConfig())


@dataclass(frozen=True)
class HotPairs:
    """The arrays at the top of this file, as views of one int32 workspace."""

    workspace: Tensor
    pair_counts: Tensor
    hot_index: Tensor
    experts: Tensor
    num_hot: Tensor
    bitmaps: Tensor

    @classmethod
    def in_workspace(
        cls, workspace: Tensor, num_tokens: int, top_k: int, num_experts: int
    ) -> "HotPairs":
        """Divide a workspace of `hot_workspace_size` elements into the arrays."""
        max_hot = _max_hot_experts(num_tokens, top_k, num_experts)
        num_bitmaps = _num_bitmaps(max_hot)
        sizes = _array_sizes(num_tokens, num_experts, max_hot)
        hot_index, bitmaps, num_hot, experts, pair_counts = workspace.split(sizes)
        return cls(
            workspace,
            pair_counts[: num_tokens * 3].view(num_tokens, 3),
            hot_index[:num_experts],
            experts[:max_hot],
            num_hot[:1],
            bitmaps[: num_tokens * num_bitmaps * 2].view(torch.int64).view(num_tokens, num_bitmaps),
        )

    def zero_token_counts(self) -> Tensor:
        """Return the memory of `hot_index`, set to zero, to count the tokens of each expert in."""
        return self.hot_index.zero_()


def hot_workspace_size(num_tokens: int, top_k: int, num_experts: int) -> int:
    """Number of int32 elements that the arrays of `HotPairs` take; 0 without slots."""
    if top_k == 0:
        return 0
    max_hot = _max_hot_experts(num_tokens, top_k, num_experts)
    return sum(_array_sizes(num_tokens, num_experts, max_hot))


def partition_hot_pairs(hot: HotPairs, ids_N: Tensor, slot_order: Tensor, top_k: int) -> None:
    """Fill `hot`, and reorder the pairs of each token in place.

    Args:
        hot: arrays to fill; `hot_index` holds the number of tokens of each expert.
        ids_N, slot_order: (N,) from `indices.check_and_sort`, sorted within each token.
        top_k: K.
    """
    num_experts = hot.hot_index.shape[0]
    blocks = cdiv(num_experts, BLOCK_EXPERTS)
    totals = torch.empty(blocks, device=ids_N.device, dtype=torch.int32)
    num_tokens, num_bitmaps = hot.bitmaps.shape
    block = next_power_of_2(top_k)
    limits = (num_experts, _threshold(num_tokens))
    launch(count_hot_kernel, (blocks,), hot.hot_index, totals, *limits, BLOCK=BLOCK_EXPERTS)
    launch(
        index_hot_kernel,
        (blocks,),
        hot.hot_index,
        totals,
        hot.experts,
        hot.num_hot,
        *limits,
        BLOCK=BLOCK_EXPERTS,
    )
    launch(
        partition_hot_pairs_kernel,
        (num_tokens,),
        ids_N,
        slot_order,
        hot.hot_index,
        hot.num_hot,
        hot.pair_counts,
        hot.bitmaps,
        num_bitmaps,
        TOP_K=top_k,
        BLOCK=block,
        BLOCK_HOT=BLOCK_HOT,
        num_warps=_partition_warps(block),
    )


def _partition_warps(block: int) -> int:
    return max(1, min(32, block // 256 if block < 2048 else block // 128))


def _threshold(num_tokens: int) -> int:
    threshold = tuning.config.threshold
    return hot_threshold(num_tokens) if threshold is None else threshold


def _max_hot_experts(num_tokens: int, top_k: int, num_experts: int) -> int:
    return min(num_experts, num_tokens * top_k // _threshold(num_tokens))


def _num_bitmaps(max_hot: int) -> int:
    return max(1, -(-max_hot // 32))


def _array_sizes(num_tokens: int, num_experts: int, max_hot: int) -> list[int]:
    """Elements of hot_index, bitmaps, num_hot, experts and pair_counts, each rounded up."""
    sizes = [num_experts, num_tokens * _num_bitmaps(max_hot) * 2, 1, max_hot, num_tokens * 3]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
