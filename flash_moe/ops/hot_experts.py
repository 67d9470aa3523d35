"""Pairs whose experts so many tokens use that matrix products do them faster than gathering.

T tokens of K slots, E experts, N = T K pairs. An expert is hot when `threshold` tokens use it:
N / threshold experts at most, which bounds every array without reading anything back. Hot
experts have places 0, 1, ... in ascending order of their ids. Each token's pairs are ordered

    cold pairs | one pair of each hot expert | further pairs of the same hot experts | empty slots

by ascending expert in each part; hot pairs carry -2 - expert in place of the expert's id.

    pair_counts  (T, 3)          int32  pairs of the first three parts
    places       (E,)            int32  place of an expert, -1 if it is cold
    experts      (most,)         int32  expert at each place
    num_hot      (1,)            int32  how many places are taken
    words        (T, words)      int64  for 32 places each, as far as places are taken: bit b of
                                        the lower half says whether the token has a pair of the
                                        expert at place 32 w + b; the upper half is the sum of
                                        the positions within the token of the first such pairs
                                        of each expert

These positions follow one another, so the sum and the number of bits tell them all.

Example: K = 4, one token with experts [7, 2, 7, 5], of which 2 and 7 are hot (places 0 and 1):
ids become [5, -4, -9, -9], pair_counts [1, 2, 1], words [[3 + (1 + 2 << 32)]].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.ops.hot_experts_kernels import (
    count_hot_kernel,
    place_hot_kernel,
    set_hot_apart_kernel,
)
from flash_moe.ops.triton_launch import cdiv, launch, next_power_of_2

BLOCK_EXPERTS = 1024
# Places are gone through in blocks of which this is a multiple.
WIDTH = 128
# Parts of the workspace begin on multiples of 16 bytes.
ALIGNMENT = 4


@dataclass(frozen=True)
class HotPairs:
    """See the head of this file."""

    pair_counts: Tensor
    places: Tensor
    experts: Tensor
    num_hot: Tensor
    words: Tensor

    @classmethod
    def in_workspace(
        cls, workspace: Tensor, num_tokens: int, num_experts: int, most: int
    ) -> "HotPairs":
        """Views of one int32 tensor of `workspace_size` elements."""
        num_words = _num_words(most)
        sizes = _part_sizes(num_tokens, num_experts, most)
        places, words, num_hot, experts, pair_counts = workspace.split(sizes)
        return cls(
            pair_counts[: num_tokens * 3].view(num_tokens, 3),
            places[:num_experts],
            experts[:most],
            num_hot[:1],
            words[: num_tokens * num_words * 2].view(torch.int64).view(num_tokens, num_words),
        )


def workspace_size(num_tokens: int, num_experts: int, most: int) -> int:
    """int32 elements that hold the arrays of `HotPairs`."""
    return sum(_part_sizes(num_tokens, num_experts, most))


def most_hot_experts(num_pairs: int, num_experts: int, threshold: int) -> int:
    """How many experts `threshold` tokens each can use."""
    return min(num_experts, num_pairs // threshold)


def zero_counts(hot: HotPairs) -> Tensor:
    """The (E,) counters of tokens, which become the places, at zero."""
    return hot.places.zero_()


def set_hot_apart(
    hot: HotPairs, ids_N: Tensor, order_N: Tensor, slots: int, threshold: int
) -> None:
    """Fill `hot`, whose `places` hold the tokens of each expert, and reorder the pairs in place.

    Args:
        ids_N, order_N: as `flash_moe.ops.indices` gives them, sorted within each token.
    """
    num_experts = hot.places.shape[0]
    blocks = cdiv(num_experts, BLOCK_EXPERTS)
    totals = torch.empty(blocks, device=ids_N.device, dtype=torch.int32)
    num_tokens, num_words = hot.words.shape
    block = next_power_of_2(slots)
    limits = (num_experts, threshold)
    launch(count_hot_kernel, (blocks,), hot.places, totals, *limits, BLOCK=BLOCK_EXPERTS)
    launch(
        place_hot_kernel,
        (blocks,),
        hot.places,
        totals,
        hot.experts,
        hot.num_hot,
        *limits,
        BLOCK=BLOCK_EXPERTS,
    )
    launch(
        set_hot_apart_kernel,
        (num_tokens,),
        ids_N,
        order_N,
        hot.places,
        hot.num_hot,
        hot.pair_counts,
        hot.words,
        num_words,
        SLOTS=slots,
        BLOCK=block,
        WIDTH=WIDTH,
        num_warps=_apart_warps(block),
    )


def _apart_warps(block: int) -> int:
    return max(1, min(32, block // 256 if block < 2048 else block // 128))


def _num_words(most: int) -> int:
    return max(1, -(-most // 32))


def _part_sizes(num_tokens: int, num_experts: int, most: int) -> list[int]:
    sizes = [num_experts, num_tokens * _num_words(most) * 2, 1, most, num_tokens * 3]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
