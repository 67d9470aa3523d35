"""The pattern of (token, expert) pairs that the three primitives work over.

T tokens, E experts, N pairs. The pattern is ragged: a token may have any number of pairs.

    row_offsets     (T+1,) int64   pairs of token t are row_offsets[t]:row_offsets[t+1]
    expert_ids      (N,)   int32   expert of each pair; -1 marks an empty slot
    token_ids       (N,)   int32   token of each pair
    expert_order    (N,)   int64   pair positions sorted by expert, stable; empty slots first
    expert_offsets  (E+1,) int64   pairs of expert e are
                                   expert_order[expert_offsets[e]:expert_offsets[e+1]]

Pairs of experts that many tokens use may be set apart: see `flash_moe.ops.hot_experts`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flash_moe.ops.hot_experts import HotPairs
from flash_moe.ops.side_stream import SideStream

# Pairs sorted at one time: torch.sort takes fewer than 2^31, and needs memory for each.
SORT_LIMIT = 2**30


@dataclass(frozen=True)
class Pairs:
    """Which experts each token uses, with the orders derived from that when first asked for.

    Ids must already lie in [-1, num_experts), those of `hot` pairs apart. Where every token has
    the same number of pairs, `slots` says how many and `offsets` may be left out. `kept`: what a
    backend keeps from one primitive to the next. `given_mean_pairs`: `mean_pairs` where it must
    not depend on N.

    Example, two tokens of which the second has an empty slot:

        >>> pairs = Pairs(torch.tensor([0, 1, 4]), torch.tensor([2, 0, -1, 2]).int(), 3)
        >>> pairs.token_ids.tolist()
        [0, 1, 1, 1]
        >>> pairs.expert_order.tolist(), pairs.expert_offsets.tolist()
        ([2, 1, 0, 3], [1, 2, 2, 4])
    """

    offsets: Tensor | None
    expert_ids: Tensor
    num_experts: int
    slots: int = 0
    hot: HotPairs | None = None
    kept: list[Tensor] = field(default_factory=list, compare=False)
    given_mean_pairs: int | None = None

    @classmethod
    def from_slots(cls, expert_ids_TK: Tensor, num_experts: int) -> "Pairs":
        """The pattern in which every token has K slots, given as a (T, K) tensor of ids."""
        num_tokens, slots = expert_ids_TK.shape
        ids_N = expert_ids_TK.reshape(-1).to(torch.int32)
        # Without slots the ids do not tell how many tokens there are.
        offsets = None if slots else ids_N.new_zeros(num_tokens + 1, dtype=torch.int64)
        return cls(offsets, ids_N, num_experts, slots)

    @cached_property
    def row_offsets(self) -> Tensor:
        if self.offsets is not None:
            return self.offsets
        tokens = torch.arange(self.num_tokens + 1, device=self.expert_ids.device)
        return tokens.mul_(self.slots)

    @property
    def num_tokens(self) -> int:
        if self.offsets is not None:
            return self.offsets.shape[0] - 1
        return self.num_pairs // self.slots

    @property
    def num_pairs(self) -> int:
        return self.expert_ids.shape[0]

    @property
    def mean_pairs(self) -> int:
        """Of a token, rounded up, by which kernels are shaped."""
        if self.given_mean_pairs is not None:
            return self.given_mean_pairs
        return -(-self.num_pairs // max(1, self.num_tokens))

    @cached_property
    def token_ids(self) -> Tensor:
        positions = torch.arange(self.num_pairs, device=self.expert_ids.device)
        if self.slots:
            return positions.div_(self.slots, rounding_mode="floor").int()
        after = torch.searchsorted(self.row_offsets, positions, right=True, out_int32=True)
        # Bad offsets are reported late on CUDA: until then no token may lie outside.
        return after.sub_(1).clamp_(min=0, max=max(0, self.num_tokens - 1))

    @property
    def expert_order(self) -> Tensor:
        return self._by_expert[0]

    @property
    def expert_offsets(self) -> Tensor:
        return self._by_expert[1]

    def start_expert_sort(self, prepare: "Callable[[Pairs], object] | None" = None) -> SideStream:
        """Start sorting by expert beside what the current stream does until `wait_expert_sort`.

        Nobody may ask for the order before, nor for what `prepare` puts into `kept`.
        """
        aside = SideStream(self.expert_ids.device)
        with aside:
            self._by_expert  # noqa: B018
            if prepare is not None:
                prepare(self)
        return aside

    def wait_expert_sort(self, aside: SideStream) -> None:
        aside.wait(self.expert_order, self.expert_offsets, *self.kept)

    @cached_property
    def _by_expert(self) -> tuple[Tensor, Tensor]:
        if self.num_pairs > SORT_LIMIT:
            return self._by_expert_in_chunks()
        keys, first = self.expert_ids, 0
        if self.num_experts < 2**16 - 1:
            # Half as many bits to sort by.
            first = -(2**15) + 1
            keys = torch.add(keys, first, out=torch.empty_like(keys, dtype=torch.int16))
        sorted_keys, order = torch.sort(keys, stable=True)
        bounds = torch.arange(
            first, first + self.num_experts + 1, device=order.device, dtype=keys.dtype
        )
        return order, torch.searchsorted(sorted_keys, bounds)

    def _by_expert_in_chunks(self) -> tuple[Tensor, Tensor]:
        """Sort chunk by chunk, then give each chunk's run of an expert its place."""
        # Where the run of each id from -1 to E-1 begins in each sorted chunk, and its length.
        ids = torch.arange(-1, self.num_experts + 1, device=self.expert_ids.device).int()
        chunks = self.expert_ids.clamp(min=-1).split(SORT_LIMIT)
        bounds_CB = torch.stack([torch.searchsorted(chunk.sort()[0], ids) for chunk in chunks])
        counts_CB = bounds_CB.diff(dim=1)
        ends_B = counts_CB.sum(0).cumsum(0)
        place_CB = ends_B - counts_CB.sum(0) + counts_CB.cumsum(0) - counts_CB
        order = torch.empty(self.num_pairs, device=ids.device, dtype=torch.int64)
        for number, chunk in enumerate(chunks):
            sorted_ids, positions = chunk.sort(stable=True)
            shift_B = place_CB[number] - bounds_CB[number, :-1]
            places = shift_B[sorted_ids + 1] + torch.arange(len(chunk), device=ids.device)
            order[places] = positions.add_(number * SORT_LIMIT)
        return order, ends_B

    @cached_property
    def occupied(self) -> "tuple[Pairs, Tensor | None]":
        """The same pattern without empty slots, and the positions kept (None: all of them).

        Reads from the device how many slots are empty: for CPU backends only.
        """
        is_occupied = self.expert_ids >= 0
        if bool(is_occupied.all()):
            return self, None
        kept = is_occupied.nonzero().squeeze(1)
        offsets = torch.searchsorted(kept, self.row_offsets)
        return Pairs(offsets, self.expert_ids[kept], self.num_experts), kept
