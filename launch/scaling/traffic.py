"""Rows and pairs that every rank sends to every other, and the bytes of each message.

W ranks, H hidden size, E experts; matrices (W, W) say what rank i sends to rank j, i = j included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe_dist.routing import Routing
from flash_moe_dist.volume import COUNTS, DispatcherName, Widths

ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER = "all_to_all", "all_gather", "reduce_scatter"


@dataclass(frozen=True)
class Traffic:
    """rows_WW, pairs_WW: float64, on the CPU; most_tokens: of any rank."""

    rows_WW: Tensor
    pairs_WW: Tensor
    most_tokens: float

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
    counts_2W = Routing.of(indices_TK, num_experts, ranks).counts_2W().double().cpu()
    return counts_2W[0], counts_2W[1]


def busiest(sent_WW: Tensor) -> float:
    """Most that any rank sends or receives."""
    return float(torch.maximum(sent_WW.sum(0), sent_WW.sum(1)).max())


@dataclass(frozen=True)
class Message:
    """bytes_WW: handed over by rank i for rank j; of an all-gather each row is the same."""

    collective: str
    bytes_WW: Tensor


def messages(dispatcher: DispatcherName, widths: Widths, traffic: Traffic) -> list[Message]:
    """Of a forward and a backward pass; bytes as `flash_moe_dist.volume` has them."""
    rows_WW, pairs_WW = traffic.rows_WW, traffic.pairs_WW
    hidden_row = widths.hidden_size * widths.hidden_bytes
    sum_row = widths.hidden_size * widths.sum_bytes
    if dispatcher == "all_gather":
        rows_WW = torch.full_like(rows_WW, traffic.most_tokens)
        rows = Message(ALL_GATHER, rows_WW * hidden_row)
        sums = Message(REDUCE_SCATTER, rows_WW * sum_row)
    else:
        rows = Message(ALL_TO_ALL, rows_WW * hidden_row)
        sums = Message(ALL_TO_ALL, rows_WW.t() * sum_row)
    forward = [
        Message(ALL_TO_ALL, torch.full_like(rows_WW, 8 * COUNTS)),
        Message(ALL_TO_ALL, rows_WW * 4),
        Message(ALL_TO_ALL, pairs_WW * 4),
        Message(ALL_TO_ALL, pairs_WW * widths.weight_bytes),
        rows,
        sums,
    ]
    backward = [rows, sums, Message(ALL_TO_ALL, pairs_WW.t() * widths.weight_bytes)]
    return forward + backward
