"""Rows and pairs that every rank sends to every other, and the bytes of each message.

W ranks, H hidden size, E experts; matrices (W, W) say what rank i sends to rank j, i = j included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.ops.backend_choice import TRITON_BACKENDS, default_backend
from flash_moe_dist.dispatch.comm_volume import DispatcherName, ElementSizes
from flash_moe_dist.dispatch.header import HEADER_BYTES, Header
from flash_moe_dist.dispatch.routing import Routing

ALL_TO_ALL, ALL_GATHER = "all_to_all", "all_gather"


@dataclass(frozen=True)
class Traffic:
    """rows_WW, pairs_WW: float64, on the CPU; most_tokens: of any rank."""

    rows_WW: Tensor
    pairs_WW: Tensor
    most_tokens: float

    @property
    def load(self) -> float:
        """Pairs of the busiest rank's experts over the mean."""
        pairs_W = self.pairs_WW.sum(0)
        return float(pairs_W.max() / pairs_W.mean().clamp(min=1e-9))

    @classmethod
    def drawn_alike(
        cls, indices_TK: Tensor, num_experts: int, ranks: int, tokens: float
    ) -> "Traffic":
        """Of ranks that have so many tokens each, all of which route as these do."""
        rows_W, pairs_W = sent_by_one_rank(indices_TK, num_experts, ranks)
        scale = tokens / max(1, len(indices_TK))
        rows_WW, pairs_WW = (one.mul(scale).expand(ranks, ranks) for one in (rows_W, pairs_W))
        return cls(rows_WW, pairs_WW, tokens)


def sent_by_one_rank(indices_TK: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Rows and pairs (W,) to each rank; waits for the device."""
    header_WF = torch.zeros(ranks, len(Header), device=indices_TK.device, dtype=torch.int64)
    in_kernels = default_backend(indices_TK.device) in TRITON_BACKENDS
    routing = Routing.from_indices(indices_TK, num_experts, ranks, in_kernels)
    routing.write_header(header_WF, checksum=0)
    header_WF = header_WF.double().cpu()
    return header_WF[:, Header.ROWS], header_WF[:, Header.PAIRS]


def busiest(sent_WW: Tensor) -> float:
    """Most that any rank sends or receives."""
    return float(torch.maximum(sent_WW.sum(0), sent_WW.sum(1)).max())


@dataclass(frozen=True)
class Message:
    """bytes_WW: handed over by rank i for rank j; of an all-gather each row is the same."""

    collective: str
    bytes_WW: Tensor


def messages(dispatcher: DispatcherName, widths: ElementSizes, traffic: Traffic) -> list[Message]:
    """Of a forward and a backward pass; bytes as `flash_moe_dist.dispatch.comm_volume` has them."""
    rows_WW, pairs_WW = traffic.rows_WW, traffic.pairs_WW
    gathers = dispatcher == "all_gather"
    if gathers:
        rows_WW = torch.full_like(rows_WW, traffic.most_tokens)
    row_bytes = widths.hidden_size * widths.hidden_bytes
    rows = Message(ALL_GATHER if gathers else ALL_TO_ALL, rows_WW * row_bytes)
    sums = Message(ALL_TO_ALL, rows_WW.t() * widths.hidden_size * widths.sum_bytes)
    counts = Message(ALL_TO_ALL, torch.full_like(rows_WW, HEADER_BYTES))
    pair_bytes = 4 + max(4, widths.weight_bytes)
    pairs = Message(ALL_TO_ALL, 4 * rows_WW + pair_bytes * pairs_WW)
    weights = Message(ALL_TO_ALL, widths.weight_bytes * pairs_WW.t())
    return [counts, pairs, rows, sums, rows, sums, weights]
