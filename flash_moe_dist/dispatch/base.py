"""What a dispatcher takes and gives: the types of a pass, and the protocol of both directions.

T local tokens, K experts per token, H hidden size, W ranks; R rows and M pairs received, S rows
and P pairs sent by this rank; X most tokens of any rank.

Routing is by rank, not by expert. A token's hidden row crosses to a rank once, however many of that
rank's experts it uses, with a list of (local expert id, routing weight); the owner returns one
partial sum for it, and the token's rank adds these up.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.overlap import InputChunk, OutputChunk
from flash_moe_dist.dispatch.collectives import Pending
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from flash_moe_dist.dispatch.handshake import Splits
from flash_moe_dist.dispatch.message import NO_TENSORS, MetadataTensors, UnpackedPairs


@dataclass(frozen=True)
class DispatchMetadata:
    """What combine and the backward pass need to know of a dispatch.

    rows, pairs: sent to and received from each rank; `pairs` is None in a provisional pass, until
        it is confirmed.
    num_tokens, max_tokens: T, and X.
    shape_TK: shape of the indices.
    """

    rows: Splits
    pairs: Splits | None
    num_tokens: int
    max_tokens: int
    shape_TK: torch.Size
    tensors: MetadataTensors = NO_TENSORS

    @property
    def device(self) -> torch.device:
        assert self.tensors.slots_P is not None
        return self.tensors.slots_P.device

    def with_tensors(self, tensors: MetadataTensors) -> "DispatchMetadata":
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class ReceivedTokens:
    """Tokens at the owner of their experts.

    hidden_RH: (R, H), which arrives in the chunks `inputs`.
    row_offsets: (R+1,) int64.
    expert_ids_M, weights_M: (M,) int32, local to this rank, and routing weights. Both may be longer
        than the last row offset; what follows it is undefined.
    tile_pairs: pairs per row by which kernels choose their tiles; None: M / R. Given where M is not
        known on the host, so that all ways to dispatch give the same bits.
    """

    hidden_RH: Tensor
    inputs: Sequence[InputChunk]
    row_offsets: Tensor
    expert_ids_M: Tensor
    weights_M: Tensor
    tile_pairs: int | None

    @classmethod
    def from_unpacked(
        cls, rows: "ArrivingRows", pairs: UnpackedPairs, tile_pairs: int | None
    ) -> "ReceivedTokens":
        return cls(
            hidden_RH=rows.rows_RH,
            inputs=rows.chunks,
            row_offsets=pairs.row_offsets,
            expert_ids_M=pairs.expert_ids_M,
            weights_M=pairs.weights_M,
            tile_pairs=tile_pairs,
        )


@dataclass(frozen=True)
class ArrivingRows:
    """Rows (R, H) on their way to the owners of their tokens' experts, in chunks.

    start_transfer: starts the transfer, where no collective was launched before. Called exactly
        once, after the messages of the pairs have been exchanged.
    """

    rows_RH: Tensor
    chunks: Sequence[InputChunk]
    start_transfer: Callable[[], object] = lambda: None

    @classmethod
    def from_pending(cls, pending: Pending) -> "ArrivingRows":
        """Rows of a collective that is under way, as one chunk."""
        rows_RH = pending.received
        return cls(rows_RH, [InputChunk(slice(0, rows_RH.shape[0]), pending.wait)])


class ReturningValues:
    """Values of pairs on their way back to the ranks that sent the pairs."""

    def __init__(self, pending: Pending, metadata: DispatchMetadata) -> None:
        self.pending, self.metadata = pending, metadata

    def scatter_on_side_stream(self) -> None:
        """Scatter the values to (T, K) on a side stream as they arrive, if there is one."""

    def result(self) -> Tensor:
        """Values (T, K), 0 in empty slots; the current stream waits for them."""
        self.pending.wait()
        return self.scattered()

    def scattered(self) -> Tensor:
        slots_P = self.metadata.tensors.slots_P
        assert slots_P is not None
        values_P = self.pending.received
        values_TK = values_P.new_zeros(self.metadata.shape_TK)
        values_TK.view(-1).index_copy_(0, slots_P, values_P)
        return values_TK


class Combine(ABC):
    """Partial sums (R, H) on their way to the ranks of their tokens, where they are added up.

    A pass calls `outputs`, writes every chunk, and then asks for the `result`.
    """

    @abstractmethod
    def outputs(self) -> Sequence[OutputChunk]:
        """Where to write the partial sums, in this order; the last chunk starts the transfer.

        Called once, when the partial sums are about to be written, as it may allocate memory.
        """

    @abstractmethod
    def result(self) -> Tensor:
        """Sums (T, H); the current stream waits for them.

        Added in the dtype of the partial sums, in the order of the ranks, and rounded once.
        """


class Dispatcher(ABC):
    """Moves rows to the owners of their experts and sums back, over the ranks of `group`.

    A forward pass is a dispatch (exact or with static capacity), the experts, and `combine`. A
    backward pass is the mirror image: `send_rows` of the output's gradient, the experts,
    `return_values` of the routing weights' gradient and `combine` of the hidden states', which may
    travel while the gradients of the tables are computed. No host sync in any of these methods.

    Args:
        group: the expert-parallel ranks. Every rank calls every method equally often, with any
            number of tokens, zero included.
    """

    name: DispatcherName
    sends_all_rows: bool

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ep_size = dist.get_world_size(group)

    @property
    def transport(self) -> str:
        """What carries rows and sums: the backend of the group, or "symmetric_memory"."""
        return dist.get_backend(self.group)

    @abstractmethod
    def send_rows(self, rows_TH: Tensor, metadata: DispatchMetadata) -> ArrivingRows:
        """Rows (T, H) of the tokens to the owners of their experts."""

    @abstractmethod
    def combine(
        self,
        metadata: DispatchMetadata,
        hidden_size: int,
        sum_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Combine:
        """Partial sums (R, H) in `sum_dtype` back to their tokens, summed to (T, H) `out_dtype`."""

    @abstractmethod
    def return_values(self, values_M: Tensor, metadata: DispatchMetadata) -> ReturningValues:
        """Values (M,) of the pairs received, back to the ranks that sent the pairs."""


@dataclass(frozen=True)
class Dispatched:
    """Tokens dispatched by `dispatcher`: what this rank receives, and what the way back needs."""

    received: ReceivedTokens
    metadata: DispatchMetadata
    dispatcher: Dispatcher

    def combine(self, sum_dtype: torch.dtype) -> Combine:
        """Combine of the forward pass, for partial sums in `sum_dtype`."""
        rows_RH = self.received.hidden_RH
        return self.dispatcher.combine(self.metadata, rows_RH.shape[1], sum_dtype, rows_RH.dtype)


def expected_pairs_per_row(top_k: int, ep_size: int) -> int:
    """Pairs of a token with one of the ranks, rounded up, if experts are drawn evenly."""
    return max(1, -(-top_k // ep_size))
