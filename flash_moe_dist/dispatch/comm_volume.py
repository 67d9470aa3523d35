"""How many bytes an expert-parallel layer moves, and which dispatcher moves fewer.

W ranks, H hidden size, K experts per token; b, a, g bytes of an element of hidden states, of a
partial sum (float32 at least) and of a routing weight; v those of a weight on its way, 4, or 8 if
it is a float64. A rank has T tokens (the most of any rank has X), sends S rows and P pairs,
receives R rows and M pairs. In bytes, it hands to collectives

                          all_to_all                all_gather
    forward   counts      48 W                      48 W
              pairs       4 S + (4 + v) P           4 W X + (4 + v) P
              rows        S H b                     X H b  (an all-gather)
              sums        R H a                     W X H a
    backward  rows        S H b                     X H b
              sums        R H a                     W X H a
              pairs       g M                       g M

Each is one message; but with static capacity (`flash_moe_dist.dispatch.capacity`), counts begin the
message of the pairs, in which there is room for more. Of what is handed to an all-to-all the part
(W - 1) / W leaves the rank, of what is handed to an all-gather W - 1 copies do.
"""

from dataclasses import dataclass
from typing import Literal

DispatcherName = Literal["all_to_all", "all_gather"]
COUNTS = 6
# Bytes that a link between ranks carries while the memory of a device copies one: NVLink between
# two H200s, 0.18 TB/s one way, over 4.2 TB/s.
LINK_TO_MEMORY = 0.04


@dataclass(frozen=True)
class ElementSizes:
    """W, H, and b, a, g above."""

    ep_size: int
    hidden_size: int
    hidden_bytes: int
    sum_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class PassVolume:
    """S, R, P, M and X above."""

    rows_sent: int
    rows_received: int
    pairs_sent: int
    pairs_received: int
    most_tokens: int


def bytes_handed(
    dispatcher: DispatcherName, widths: ElementSizes, load: PassVolume
) -> tuple[dict[str, int], dict[str, int]]:
    """The table above, forward and backward, where all gradients are needed."""
    w, h = widths.ep_size, widths.hidden_size
    if dispatcher == "all_to_all":
        row_pairs = load.rows_sent
        rows, sums = load.rows_sent, load.rows_received
    else:
        row_pairs = w * load.most_tokens
        rows, sums = load.most_tokens, w * load.most_tokens
    travelling = {"rows": rows * h * widths.hidden_bytes, "sums": sums * h * widths.sum_bytes}
    forward = {
        "counts": 8 * COUNTS * w,
        "pairs": 4 * row_pairs + (4 + max(4, widths.weight_bytes)) * load.pairs_sent,
        **travelling,
    }
    return forward, {**travelling, "pairs": widths.weight_bytes * load.pairs_received}


def expected_fan_out(ep_size: int, slots: int) -> float:
    """Ranks that own at least one of `slots` experts drawn evenly: W (1 - (1 - 1/W)^K)."""
    return ep_size * (1 - (1 - 1 / ep_size) ** slots)


def cheaper_dispatcher(widths: ElementSizes, slots: int) -> DispatcherName:
    """The dispatcher whose rows and sums take less time, if experts are drawn evenly.

    For each token, in bytes over a link: fan-out times H (b + a) + 4, of which (W - 1) / W leaves
    the rank, against (W - 1) times as much. What memory copies counts too, by LINK_TO_MEMORY: an
    all-to-all packs the rows it sends (reads and writes them), and both read sums of each rank.
    From shapes alone, so the same on every rank.
    """
    w, h, b, a = widths.ep_size, widths.hidden_size, widths.hidden_bytes, widths.sum_bytes
    fan_out = expected_fan_out(w, slots)
    row = h * (b + a) + 4
    all_to_all = fan_out * (row * (w - 1) / w + LINK_TO_MEMORY * h * (2 * b + a))
    all_gather = (w - 1) * row + LINK_TO_MEMORY * w * h * a
    return "all_gather" if all_gather <= all_to_all else "all_to_all"
