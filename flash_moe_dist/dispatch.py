"""Tokens to the ranks that own their experts, and partial sums back.

T local tokens, K experts per token, H hidden size, W ranks of the ep group, E experts in all;
R rows and M pairs received, S rows and P pairs sent, by this rank.

Routing is by rank, not by expert. A token's hidden row crosses to a rank once, however many
of that rank's experts it uses, with a list of (local expert id, routing weight); the owner
returns one partial sum for it, and the token's rank adds these up.

Pairs travel by all-to-all, ordered as `flash_moe_dist.routing` says. Two ways for the rows:

    AllToAllDispatcher    a row goes to the ranks that own some of its experts, and only there
    AllGatherDispatcher   every row goes to every rank, sums come back by reduce-scatter; rows of
                          no pairs fill up where ranks have fewer tokens than others
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.backends import default_backend, load_backend, ragged_backend
from flash_moe.ops.pairs import Pairs
from flash_moe_dist.collectives import all_gather_rows, all_to_all_rows, reduce_scatter_rows
from flash_moe_dist.counts import Settings, agree_on_counts
from flash_moe_dist.routing import Routing
from flash_moe_dist.volume import DispatcherName, Load


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back, and the backward pass, need to know of a `dispatch`.

    rows_sent, rows_received, pairs_sent, pairs_received (W,): to and from each rank.
    num_tokens, most_tokens: T here, and on the rank that has most.
    slots_P (P,): place in (T, K) of each pair sent; shape_TK: that shape.
    tokens_S (S,), sent_TW (T, W): as `Routing.rows`; None where rows are gathered.
    """

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    num_tokens: int
    most_tokens: int
    shape_TK: torch.Size
    slots_P: Tensor | None
    tokens_S: Tensor | None = None
    sent_TW: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.slots_P, self.tokens_S, self.sent_TW

    def with_tensors(self, *tensors: Tensor | None) -> "DispatchMetadata":
        """The same with these in place of `tensors()`, so that autograd can keep them."""
        slots_P, tokens_S, sent_TW = tensors or (None, None, None)
        return replace(self, slots_P=slots_P, tokens_S=tokens_S, sent_TW=sent_TW)

    @property
    def load(self) -> Load:
        return Load(
            sum(self.rows_sent),
            sum(self.rows_received),
            sum(self.pairs_sent),
            sum(self.pairs_received),
            self.most_tokens,
        )


@dataclass(frozen=True)
class ReceivedTokens:
    """Tokens at the owner of their experts, in the form `ragged_flash_expert_func` takes.

    hidden_RH (R, H); row_offsets (R+1,); expert_ids_M (M,) int32, local; weights_M (M,).
    """

    hidden_RH: Tensor
    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor


class TokenDispatcher(ABC):
    """Dispatch and combine over the ranks of `group`, without autograd.

    A forward pass is `dispatch`, the experts, `combine`. A backward pass is the mirror image:
    `dispatch_rows` of the output's gradient, the experts, `combine` of the hidden states'
    gradient and `return_pairs` of the routing weights'. The forward pass reads the counts of an
    exchange on the host, its only host sync; the backward pass has none.

    Args:
        group: the expert-parallel ranks. Every rank calls every method equally often, with any
            number of tokens, zero included.
    """

    name: DispatcherName

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ep_size = dist.get_world_size(group)

    def dispatch(
        self, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor, settings: Settings
    ) -> tuple[ReceivedTokens, DispatchMetadata]:
        """Send each token to the owners of its experts.

        Args:
            hidden_TH, indices_TK, weights_TK: as `triton_flash_expert_func` takes them.
            settings: what all ranks must agree on.

        Raises:
            TypeError, ValueError: on every rank alike, if any rank's input is wrong or the
                ranks' settings differ.
        """
        rows = (hidden_TH, indices_TK, weights_TK)
        routing, counts = agree_on_counts(*rows, settings, self.ep_size, self.group)
        local_ids_P, slots_P = routing.pairs(sum(counts.pairs_sent))
        metadata = DispatchMetadata(
            counts.rows_sent,
            counts.rows_received,
            counts.pairs_sent,
            counts.pairs_received,
            indices_TK.shape[0],
            counts.most_tokens,
            indices_TK.shape,
            slots_P,
        )
        metadata, pairs_per_row_R = self._send_row_pairs(routing, metadata)
        pairs = (counts.pairs_sent, counts.pairs_received, self.group)
        received = ReceivedTokens(
            hidden_RH=self.dispatch_rows(hidden_TH, metadata),
            row_offsets=torch.nn.functional.pad(pairs_per_row_R.cumsum(0), (1, 0)),
            expert_ids_M=all_to_all_rows(local_ids_P, *pairs),
            weights_M=all_to_all_rows(weights_TK.reshape(-1).index_select(0, slots_P), *pairs),
        )
        return received, metadata

    def return_pairs(self, values_M: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Values of the pairs received back to (T, K) of the ranks that sent them, 0 elsewhere."""
        assert metadata.slots_P is not None
        values_P = all_to_all_rows(
            values_M, metadata.pairs_received, metadata.pairs_sent, self.group
        )
        returned = values_P.new_zeros(metadata.shape_TK)
        returned.view(-1).index_copy_(0, metadata.slots_P, values_P)
        return returned

    @abstractmethod
    def dispatch_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Rows (T, H) of the tokens to the owners of their experts, as (R, H)."""

    @abstractmethod
    def combine(self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype) -> Tensor:
        """Return partial sums (R, H) to their tokens' ranks; add them up to (T, H) in `dtype`.

        Added in the dtype of the partial sums and in a fixed order, and rounded once.
        """

    @abstractmethod
    def _send_row_pairs(
        self, routing: Routing, metadata: DispatchMetadata
    ) -> tuple[DispatchMetadata, Tensor]:
        """Metadata with what rows need, and how many pairs each row received has: (R,) int32."""


class AllToAllDispatcher(TokenDispatcher):
    """A row goes once to each rank that owns some of its experts."""

    name = "all_to_all"

    def dispatch_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Tensor:
        assert metadata.tokens_S is not None
        rows_SH = rows_TH.index_select(0, metadata.tokens_S)
        return all_to_all_rows(rows_SH, metadata.rows_sent, metadata.rows_received, self.group)

    def combine(self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype) -> Tensor:
        assert metadata.sent_TW is not None
        returned_SH = all_to_all_rows(
            partial_RH, metadata.rows_received, metadata.rows_sent, self.group
        )
        return sum_copies(returned_SH, metadata.sent_TW, dtype)

    def _send_row_pairs(
        self, routing: Routing, metadata: DispatchMetadata
    ) -> tuple[DispatchMetadata, Tensor]:
        tokens_S, pairs_per_row_S, sent_TW = routing.rows(sum(metadata.rows_sent))
        received = all_to_all_rows(
            pairs_per_row_S, metadata.rows_sent, metadata.rows_received, self.group
        )
        return replace(metadata, tokens_S=tokens_S, sent_TW=sent_TW), received


class AllGatherDispatcher(TokenDispatcher):
    """Every row goes to every rank: static shapes, nothing packed."""

    name = "all_gather"

    def dispatch_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> Tensor:
        return all_gather_rows(_filled_up(rows_TH, metadata.most_tokens), self.group)

    def combine(self, partial_RH: Tensor, metadata: DispatchMetadata, dtype: torch.dtype) -> Tensor:
        summed_XH = reduce_scatter_rows(partial_RH, self.group)
        return summed_XH[: metadata.num_tokens].to(dtype)

    def _send_row_pairs(
        self, routing: Routing, metadata: DispatchMetadata
    ) -> tuple[DispatchMetadata, Tensor]:
        pairs_TW = routing.pairs_WT.t().to(torch.int32)
        pairs_WX = _filled_up(pairs_TW, metadata.most_tokens).t().flatten()
        splits = [metadata.most_tokens] * self.ep_size
        return metadata, all_to_all_rows(pairs_WX, splits, splits, self.group)


DISPATCHERS: dict[DispatcherName, type[TokenDispatcher]] = {
    one.name: one for one in (AllToAllDispatcher, AllGatherDispatcher)
}


def sum_copies(rows_SH: Tensor, sent_TW: Tensor, dtype: torch.dtype) -> Tensor:
    """For each token the sum of its rows among (S, H), in the order of the ranks, as (T, H)."""
    pattern = Pairs.from_slots(sent_TW, rows_SH.shape[0])
    ones_N = torch.ones(pattern.num_pairs, device=rows_SH.device)
    primitives = load_backend(ragged_backend(default_backend(rows_SH.device)))
    return primitives.spmm(ones_N, rows_SH, pattern, dtype)


def _filled_up(rows: Tensor, num_rows: int) -> Tensor:
    """With rows of zeros at the end, up to `num_rows`."""
    missing = num_rows - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
