"""The pattern of (token, expert) pairs that the three primitives work over.

T tokens, K experts per token, E experts, N pairs. In general the pattern is ragged: a token may
have any number of pairs.

    row_offsets     (T+1,) int64   pairs of token t are row_offsets[t]:row_offsets[t+1]
    expert_ids      (N,)   int32   expert of each pair; -1 marks an empty slot
    token_ids       (N,)   int32   token of each pair
    expert_order    (N,)   int64   pair positions sorted by expert, stable; empty slots first
    expert_offsets  (E+1,) int64   pairs of expert e are
                                   expert_order[expert_offsets[e]:expert_offsets[e+1]]

A backend may ask for the pairs of hot experts to be partitioned: see `flash_moe.ops.hot_experts`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import partitions_hot_pairs, uses_triton
from flash_moe.ops.dtypes import accumulator_dtype
from flash_moe.ops.hot_experts import HotPairs, hot_workspace_size, partition_hot_pairs
from flash_moe.ops.indices import check_and_sort, check_ragged, order_dtype
from flash_moe.ops.side_stream import SideStream
from flash_moe.ops.tuning import Tuning


@dataclass(frozen=True)
class PairsConfig:
    """Limits of sorting pairs.

    sort_limit: pairs sorted at a time; torch.sort takes fewer than 2^31, and memory for each.
    """

    sort_limit: int = 2**30


tuning = Tuning(PairsConfig())


class SavedPairs(NamedTuple):
    """Tensors that the forward pass saves for the backward pass, in the order autograd gets them.

    scores: (N,), in the dtype of sums.
    expert_ids: (N,) int32.
    slot_order: (N,), the position in the caller's (T, K) arrays of each pair; empty: unchanged.
    row_offsets: (T+1,) int64; empty where all tokens have the same K > 0.
    hot_workspace: int32, the arrays of `HotPairs`; empty where hot pairs are not partitioned.
    """

    scores: Tensor
    expert_ids: Tensor
    slot_order: Tensor
    row_offsets: Tensor
    hot_workspace: Tensor

    def first(self, num_pairs: int) -> "SavedPairs":
        """Drop the ids and scores past `num_pairs`, the last offset of a ragged pattern."""
        return self._replace(scores=self.scores[:num_pairs], expert_ids=self.expert_ids[:num_pairs])

    @classmethod
    def fake(
        cls,
        hidden_TH: Tensor,
        down_EH: Tensor,
        ids: Tensor,
        row_offsets: Tensor | None,
        backend: str,
    ) -> "SavedPairs":
        """Build tensors of the shapes and dtypes that `Pairs.saved` returns for these arguments."""
        num_tokens, num_pairs = hidden_TH.shape[0], ids.numel()
        sum_dtype = accumulator_dtype(hidden_TH.dtype, down_EH.dtype)
        num_sorted = num_offsets = workspace_size = 0
        if row_offsets is not None:
            num_offsets = num_tokens + 1
        else:
            top_k = ids.shape[1]
            num_offsets = num_tokens + 1 if top_k == 0 else 0
            if uses_triton(backend):
                num_sorted = num_pairs
            if partitions_hot_pairs(backend):
                workspace_size = hot_workspace_size(num_tokens, top_k, down_EH.shape[0])
        return cls(
            hidden_TH.new_empty(num_pairs, dtype=sum_dtype),
            ids.new_empty(num_pairs, dtype=torch.int32),
            ids.new_empty(num_sorted, dtype=order_dtype(num_sorted)),
            ids.new_empty(num_offsets, dtype=torch.int64),
            ids.new_empty(workspace_size, dtype=torch.int32),
        )


class FilledMatrix(NamedTuple):
    """Values of pairs as a matrix of tokens and experts.

    values: (N,), which the matrix was filled from.
    matrix: (T, experts), see the backend that filled it.
    """

    values: Tensor
    matrix: Tensor


@dataclass
class Scratch:
    """Results that a backend stores with a pattern for its later primitives.

    tokens_by_expert: (N,), see `gather.tokens_by_expert`.
    filled_matrix: matrix of the last values, where one matrix holds all experts.
    """

    tokens_by_expert: Tensor | None = None
    filled_matrix: FilledMatrix | None = None


class ExpertOrder(NamedTuple):
    """Pairs sorted by expert: `expert_order` (N,) and `expert_offsets` (E+1,)."""

    order: Tensor
    offsets: Tensor


class TouchedExperts(NamedTuple):
    """Experts that have pairs, and their pairs, without empty slots.

    experts: (U,) int64, ascending.
    bounds: (U+1,) int64, pairs of the i-th are order[bounds[i]:bounds[i+1]].
    order: (M,) int64, positions of the pairs, by expert; of equal ones the earlier first.
    token_ids: (M,) int32, tokens of the pairs in that order.
    """

    experts: Tensor
    bounds: Tensor
    order: Tensor
    token_ids: Tensor


@dataclass(eq=False)
class Pairs:
    """Which experts each token uses, with arrays derived from that on first use.

    Build one with a class method below; all but `from_indices` and `from_offsets` trust their
    arguments. Example, two tokens of which the second has an empty slot:

        >>> offsets, ids = torch.tensor([0, 1, 4]), torch.tensor([2, 0, -1, 2]).int()
        >>> pairs = Pairs.from_checked_offsets(offsets, ids, num_experts=3)
        >>> pairs.token_ids.tolist()
        [0, 1, 1, 1]
        >>> pairs.expert_order.tolist(), pairs.expert_offsets.tolist()
        ([2, 1, 0, 3], [1, 2, 2, 4])

    Attributes:
        expert_ids: (N,) int32; ids of partitioned hot pairs are coded as in `hot_experts`.
        num_experts: E.
        top_k: K where all tokens have as many pairs, else None.
        tile_pairs: mean pairs per token, rounded up; selects the tile shapes of kernels.
        given_row_offsets: (T+1,), or None where K > 0 tells them.
        slot_order: see `SavedPairs`; None: unchanged.
        hot: arrays of the partitioned hot pairs, or None.
    """

    expert_ids: Tensor
    num_experts: int
    top_k: int | None
    tile_pairs: int
    given_row_offsets: Tensor | None = None
    slot_order: Tensor | None = None
    hot: HotPairs | None = None

    # Set from `start_expert_sort` to `wait_expert_sort`.
    _sorting: SideStream | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_indices(cls, indices_TK: Tensor, num_experts: int, backend: str) -> "Pairs":
        """Check ids, sort them within each token, and partition hot pairs, as the backend needs.

        Args:
            indices_TK: (T, K) int32 or int64; -1 marks an empty slot.
            num_experts: E.
            backend: the name of the backend that will work on the pattern.

        Raises:
            ValueError: an id is not in [-1, E); on CUDA, an id or offset of an earlier call.
        """
        num_tokens, top_k = indices_TK.shape
        hot = counts_E = None
        if partitions_hot_pairs(backend) and top_k > 0:
            size = hot_workspace_size(num_tokens, top_k, num_experts)
            workspace = indices_TK.new_empty(size, dtype=torch.int32)
            hot = HotPairs.in_workspace(workspace, num_tokens, top_k, num_experts)
            counts_E = hot.zero_token_counts()
        ids_N, slot_order = check_and_sort(indices_TK, num_experts, uses_triton(backend), counts_E)
        if hot is not None and slot_order is not None:
            partition_hot_pairs(hot, ids_N, slot_order, top_k)
        offsets = None if top_k else _no_pairs(num_tokens, ids_N)
        return cls(ids_N, num_experts, top_k, top_k, offsets, slot_order, hot)

    @classmethod
    def from_checked_indices(cls, expert_ids_TK: Tensor, num_experts: int) -> "Pairs":
        """Use ids (T, K), known to lie in [-1, E), in the order in which they are given."""
        num_tokens, top_k = expert_ids_TK.shape
        ids_N = expert_ids_TK.reshape(-1).to(torch.int32)
        offsets = None if top_k else _no_pairs(num_tokens, ids_N)
        return cls(ids_N, num_experts, top_k, top_k, offsets)

    @classmethod
    def from_offsets(
        cls, row_offsets: Tensor, expert_ids: Tensor, num_experts: int, backend: str
    ) -> "Pairs":
        """Check a ragged pattern.

        Args:
            row_offsets: (T+1,) int32 or int64, ascending from 0 to N.
            expert_ids: (N,) int32 or int64; -1 marks an empty slot.
            num_experts: E.
            backend: the name of the backend that will work on the pattern.

        Raises:
            ValueError: an offset or an id is wrong; on CUDA, one of an earlier call.
        """
        checked = check_ragged(row_offsets, expert_ids, num_experts, uses_triton(backend))
        return cls.from_checked_offsets(*checked, num_experts)

    @classmethod
    def from_checked_offsets(
        cls,
        row_offsets: Tensor,
        expert_ids: Tensor,
        num_experts: int,
        tile_pairs: int | None = None,
    ) -> "Pairs":
        """Use a ragged pattern that is known to be right.

        Args:
            row_offsets: (T+1,) int64.
            expert_ids: (N,) int32 in [-1, E); may be longer than the last offset, with any values
                from there on.
            num_experts: E.
            tile_pairs: see the attribute. Results are bitwise equal only for equal values, so give
                it where it must not depend on N.
        """
        if tile_pairs is None:
            tile_pairs = -(-expert_ids.shape[0] // max(1, row_offsets.shape[0] - 1))
        return cls(expert_ids, num_experts, None, tile_pairs, row_offsets)

    @classmethod
    def from_saved(
        cls,
        saved: SavedPairs,
        num_experts: int,
        top_k: int | None = None,
        tile_pairs: int | None = None,
    ) -> "Pairs":
        """Restore the pattern whose `saved` tensors these are.

        Args:
            saved: the tensors, in the forward or the backward pass.
            num_experts, top_k: E and K of the pattern.
            tile_pairs: argument of `from_checked_offsets`.
        """
        ids_N = saved.expert_ids
        if top_k is None:
            return cls.from_checked_offsets(saved.row_offsets, ids_N, num_experts, tile_pairs)
        if top_k == 0:
            return cls(ids_N, num_experts, 0, 0, saved.row_offsets)
        slot_order = saved.slot_order if saved.slot_order.shape[0] > 0 else None
        hot = None
        if saved.hot_workspace.shape[0] > 0:
            num_tokens = ids_N.shape[0] // top_k
            hot = HotPairs.in_workspace(saved.hot_workspace, num_tokens, top_k, num_experts)
        return cls(ids_N, num_experts, top_k, top_k, None, slot_order, hot)

    @classmethod
    def joined(cls, patterns: "list[Pairs]") -> "Pairs":
        """Return several patterns of the same experts as one over all their tokens, in order.

        None of them partitions hot pairs or has ids past its last offset.
        """
        ids_N = torch.cat([one.expert_ids for one in patterns])
        num_experts, top_k = patterns[0].num_experts, patterns[0].top_k
        if top_k and all(one.top_k == top_k for one in patterns):
            return cls(ids_N, num_experts, top_k, top_k)
        offsets, num_pairs = [patterns[0].row_offsets[:1]], 0
        for one in patterns:
            offsets.append(one.row_offsets[1:] + num_pairs)
            num_pairs += one.num_pairs
        return cls.from_checked_offsets(torch.cat(offsets), ids_N, num_experts)

    def saved(self, scores_N: Tensor) -> SavedPairs:
        """Collect what the backward pass needs: the scores, and this pattern."""
        ids, offsets, order = self.expert_ids, self.given_row_offsets, self.slot_order
        return SavedPairs(
            scores_N,
            ids,
            ids.new_empty(0) if order is None else order,
            ids.new_empty(0, dtype=torch.int64) if offsets is None else offsets,
            ids.new_empty(0) if self.hot is None else self.hot.workspace,
        )

    @cached_property
    def row_offsets(self) -> Tensor:
        """Bounds of the pairs of each token: (T+1,) int64."""
        if self.given_row_offsets is not None:
            return self.given_row_offsets
        assert self.top_k is not None
        tokens = torch.arange(self.num_tokens + 1, device=self.expert_ids.device)
        return tokens.mul_(self.top_k)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        if self.given_row_offsets is not None:
            return self.given_row_offsets.shape[0] - 1
        assert self.top_k is not None
        return self.num_pairs // self.top_k

    @property
    def num_pairs(self) -> int:
        """Number of pairs, N; more where ids are longer than the last offset."""
        return self.expert_ids.shape[0]

    @cached_property
    def token_ids(self) -> Tensor:
        """Token of each pair: (N,) int32."""
        positions = torch.arange(self.num_pairs, device=self.expert_ids.device)
        if self.top_k:
            return positions.div_(self.top_k, rounding_mode="floor").int()
        after = torch.searchsorted(self.row_offsets, positions, right=True, out_int32=True)
        # Wrong offsets are reported late on CUDA: until then no token may be out of range.
        return after.sub_(1).clamp_(min=0, max=max(0, self.num_tokens - 1))

    @cached_property
    def scratch(self) -> Scratch:
        """Results that a backend stores for its later primitives."""
        return Scratch()

    @property
    def expert_order(self) -> Tensor:
        """Positions of the pairs, sorted by expert: (N,) int64."""
        return self._by_expert.order

    @property
    def expert_offsets(self) -> Tensor:
        """Bounds of the pairs of each expert in `expert_order`: (E+1,) int64."""
        return self._by_expert.offsets

    def start_expert_sort(self, prepare: "Callable[[Pairs], object] | None" = None) -> None:
        """Start sorting by expert on the side stream, concurrently with the current stream.

        Must be called before `expert_order`, `expert_offsets` or what `prepare` computes is first
        read, and followed by `wait_expert_sort` before any of these is.

        Args:
            prepare: `Backend.prepare_table_grads`, called after the sort; fills
                `scratch.tokens_by_expert`, if anything.
        """
        side_stream = SideStream(self.expert_ids.device)
        with side_stream:
            self._by_expert = self._sort_by_expert()
            if prepare is not None:
                prepare(self)
        self._sorting = side_stream

    def wait_expert_sort(self) -> None:
        """Make the current stream wait for `start_expert_sort`, if that was called."""
        if self._sorting is None:
            return
        tokens = self.scratch.tokens_by_expert
        self._sorting.wait(*self._by_expert, *(() if tokens is None else (tokens,)))
        self._sorting = None

    @cached_property
    def _by_expert(self) -> ExpertOrder:
        return self._sort_by_expert()

    def _sort_by_expert(self) -> ExpertOrder:
        if self.num_pairs > tuning.config.sort_limit:
            return self._sort_by_expert_in_chunks(tuning.config.sort_limit)
        keys, first = self.expert_ids, 0
        if self.num_experts < 2**16 - 1:
            # Half as many bits to sort by.
            first = -(2**15) + 1
            keys = torch.add(keys, first, out=torch.empty_like(keys, dtype=torch.int16))
        sorted_keys, order = torch.sort(keys, stable=True)
        bounds = torch.arange(
            first, first + self.num_experts + 1, device=order.device, dtype=keys.dtype
        )
        return ExpertOrder(order, torch.searchsorted(sorted_keys, bounds))

    def _sort_by_expert_in_chunks(self, chunk_size: int) -> ExpertOrder:
        """Sort each chunk, then shift each expert's run in it to where the whole order has it."""
        # First position of each id from -1 to E-1 in each sorted chunk, and number of its pairs.
        ids = torch.arange(-1, self.num_experts + 1, device=self.expert_ids.device).int()
        chunks = self.expert_ids.clamp(min=-1).split(chunk_size)
        bounds_CB = torch.stack([torch.searchsorted(chunk.sort()[0], ids) for chunk in chunks])
        counts_CB = bounds_CB.diff(dim=1)
        ends_B = counts_CB.sum(0).cumsum(0)
        target_CB = ends_B - counts_CB.sum(0) + counts_CB.cumsum(0) - counts_CB
        order = torch.empty(self.num_pairs, device=ids.device, dtype=torch.int64)
        for number, chunk in enumerate(chunks):
            sorted_ids, positions = chunk.sort(stable=True)
            shift_B = target_CB[number] - bounds_CB[number, :-1]
            targets = shift_B[sorted_ids + 1] + torch.arange(len(chunk), device=ids.device)
            order[targets] = positions.add_(number * chunk_size)
        return ExpertOrder(order, ends_B)

    @cached_property
    def touched(self) -> TouchedExperts:
        """Experts that have pairs, in arrays that are no longer than these are many.

        The host waits for the device.
        """
        expert_ids, order = self.expert_ids.sort(stable=True)
        present = expert_ids >= 0
        order = order[present]
        experts, counts = torch.unique_consecutive(expert_ids[present], return_counts=True)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return TouchedExperts(experts.long(), bounds, order, self.token_ids[order])

    @cached_property
    def occupied(self) -> "tuple[Pairs, Tensor | None]":
        """The pattern without empty slots, and the positions of its pairs here (None: all).

        Reads from the device how many slots are empty: for CPU backends only.
        """
        is_occupied = self.expert_ids >= 0
        if bool(is_occupied.all()):
            return self, None
        positions = is_occupied.nonzero().squeeze(1)
        offsets = torch.searchsorted(positions, self.row_offsets)
        ids = self.expert_ids[positions]
        return Pairs.from_checked_offsets(offsets, ids, self.num_experts), positions


def _no_pairs(num_tokens: int, ids_N: Tensor) -> Tensor:
    """Row offsets of tokens without slots, whose number the ids do not tell."""
    return ids_N.new_zeros(num_tokens + 1, dtype=torch.int64)
