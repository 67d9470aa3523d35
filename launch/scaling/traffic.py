"""Rows and pairs that each rank sends to each other rank, and the bytes of each transfer.

W ranks, H hidden size, E experts. In a matrix (W, W), element [i, j] is what rank i sends to rank
j; the diagonal is what a rank sends to itself.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import default_backend, uses_triton
from flash_moe_dist.dispatch.comm_volume import DispatcherName, ElementSizes
from flash_moe_dist.dispatch.header import HEADER_BYTES, Header
from flash_moe_dist.dispatch.routing import Routing

# Kinds of collective that carry transfers. Both dispatchers use all-to-alls, so these are not
# DispatcherName, and they are not the names of PyTorch's functions.
Collective = Literal["all_to_all", "all_gather"]
COLLECTIVES: tuple[Collective, ...] = ("all_to_all", "all_gather")


@dataclass(frozen=True)
class Traffic:
    """What the ranks send each other in a pass.

    rows_WW, pairs_WW: (W, W) float64 on the CPU.
    max_tokens: most tokens of any rank.
    """

    rows_WW: Tensor
    pairs_WW: Tensor
    max_tokens: float

    @property
    def imbalance(self) -> float:
        """Pairs of the busiest rank's experts over the mean of all ranks."""
        pairs_W = self.pairs_WW.sum(0)
        return float(pairs_W.max() / pairs_W.mean().clamp(min=1e-9))

    @classmethod
    def extrapolated(
        cls, indices_TK: Tensor, num_experts: int, ranks: int, tokens: float
    ) -> "Traffic":
        """Traffic of `ranks` ranks if every one has `tokens` tokens, routed as `indices_TK`."""
        rows_W, pairs_W = sent_by_one_rank(indices_TK, num_experts, ranks)
        scale = tokens / max(1, len(indices_TK))
        rows_WW, pairs_WW = (one.mul(scale).expand(ranks, ranks) for one in (rows_W, pairs_W))
        return cls(rows_WW, pairs_WW, tokens)


def sent_by_one_rank(indices_TK: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Count the rows and the pairs, (W,) each, that go to each rank; waits for the device."""
    header_WF = torch.zeros(ranks, len(Header), device=indices_TK.device, dtype=torch.int64)
    in_kernels = uses_triton(default_backend(indices_TK.device))
    routing = Routing.from_indices(indices_TK, num_experts, ranks, in_kernels)
    routing.write_header(header_WF, checksum=0)
    header_WF = header_WF.double().cpu()
    return header_WF[:, Header.ROWS], header_WF[:, Header.PAIRS]


def busiest(sent_WW: Tensor) -> float:
    """The most that any rank sends in all, or receives in all."""
    return float(torch.maximum(sent_WW.sum(0), sent_WW.sum(1)).max())


@dataclass(frozen=True)
class Transfer:
    """One collective of a pass.

    bytes_WW: bytes that rank i hands over for rank j; equal within a row for an all-gather.
    """

    collective: Collective
    bytes_WW: Tensor


def transfers(dispatcher: DispatcherName, sizes: ElementSizes, traffic: Traffic) -> list[Transfer]:
    """List the transfers of a forward and a backward pass.

    The bytes are those in the table of `flash_moe_dist.dispatch.comm_volume`.
    """
    rows_WW, pairs_WW = traffic.rows_WW, traffic.pairs_WW
    rows_collective: Collective = "all_to_all"
    if dispatcher == "all_gather":
        rows_WW = torch.full_like(rows_WW, traffic.max_tokens)
        rows_collective = "all_gather"
    rows = Transfer(rows_collective, rows_WW * sizes.hidden_size * sizes.hidden_bytes)
    sums = Transfer("all_to_all", rows_WW.t() * sizes.hidden_size * sizes.sum_bytes)
    headers = Transfer("all_to_all", torch.full_like(rows_WW, HEADER_BYTES))
    pair_bytes = 4 + max(4, sizes.weight_bytes)
    pairs = Transfer("all_to_all", 4 * rows_WW + pair_bytes * pairs_WW)
    weights = Transfer("all_to_all", sizes.weight_bytes * pairs_WW.t())
    return [headers, pairs, rows, sums, rows, sums, weights]
