"""How many bytes a sharded layer moves, and which dispatcher takes less time for them.

W ranks, H hidden size, K experts per token; b, a, g bytes of an element of hidden states, of a
partial sum (float32 at least) and of a routing weight; v bytes of a weight in a message: 4, or 8 if
it is a float64. This rank sends S rows and P pairs, and receives R rows and M pairs; X is the most
tokens of any rank. Bytes that a rank hands to collectives:

                          all_to_all                all_gather
    forward   headers     48 W                      48 W
              pairs       4 S + (4 + v) P           4 W X + (4 + v) P
              rows        S H b                     X H b  (an all-gather)
              sums        R H a                     W X H a
    backward  rows        S H b                     X H b
              sums        R H a                     W X H a
              pairs       g M                       g M

Each line is one transfer. With static capacity (`capacity.py`) the headers begin the messages of
the pairs, which have space for more pairs. Of what is handed to an all-to-all, the share
(W - 1) / W leaves the rank; of what is handed to an all-gather, W - 1 copies do.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flash_moe_dist.dispatch.header import HEADER_BYTES

DispatcherName = Literal["all_to_all", "all_gather"]
# Bytes that a link between ranks carries while the memory of a device copies one: NVLink between
# two H200s, 0.18 TB/s one way, over 4.2 TB/s.
LINK_TO_MEMORY = 0.04


@dataclass(frozen=True)
class ElementSizes:
    """W, H, and b, a, g of the module docstring."""

    ep_size: int
    hidden_size: int
    hidden_bytes: int
    sum_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class PassVolume:
    """S, R, P, M and X of the module docstring."""

    rows_sent: int
    rows_received: int
    pairs_sent: int
    pairs_received: int
    max_tokens: int


class BytesHanded(NamedTuple):
    """Bytes handed to collectives in each direction, by transfer."""

    forward: dict[str, int]
    backward: dict[str, int]


def bytes_handed(
    dispatcher: DispatcherName, sizes: ElementSizes, volume: PassVolume
) -> BytesHanded:
    """The table of the module docstring, where all gradients are needed."""
    w, h = sizes.ep_size, sizes.hidden_size
    if dispatcher == "all_to_all":
        rows_with_pairs = volume.rows_sent
        rows, sums = volume.rows_sent, volume.rows_received
    else:
        rows_with_pairs = w * volume.max_tokens
        rows, sums = volume.max_tokens, w * volume.max_tokens
    both_ways = {"rows": rows * h * sizes.hidden_bytes, "sums": sums * h * sizes.sum_bytes}
    forward = {
        "headers": HEADER_BYTES * w,
        "pairs": 4 * rows_with_pairs + (4 + max(4, sizes.weight_bytes)) * volume.pairs_sent,
        **both_ways,
    }
    return BytesHanded(forward, {**both_ways, "pairs": sizes.weight_bytes * volume.pairs_received})


def expected_fan_out(ep_size: int, top_k: int) -> float:
    """Number of ranks that own at least one of K experts drawn evenly: W (1 - (1 - 1/W)^K)."""
    return ep_size * (1 - (1 - 1 / ep_size) ** top_k)


def cheaper_dispatcher(sizes: ElementSizes, top_k: int) -> DispatcherName:
    """Dispatcher whose rows and sums take less time, if experts are drawn evenly.

    For each token, in bytes over a link: fan-out times H (b + a) + 4, of which (W - 1) / W leaves
    the rank, against (W - 1) times as much. Copies in memory count too, by LINK_TO_MEMORY: an
    all-to-all packs the rows it sends (reads and writes them), and both read sums of each rank.
    From shapes alone, so the same on every rank.
    """
    w, h, b, a = sizes.ep_size, sizes.hidden_size, sizes.hidden_bytes, sizes.sum_bytes
    fan_out = expected_fan_out(w, top_k)
    row = h * (b + a) + 4
    all_to_all = fan_out * (row * (w - 1) / w + LINK_TO_MEMORY * h * (2 * b + a))
    all_gather = (w - 1) * row + LINK_TO_MEMORY * w * h * a
    return "all_gather" if all_gather <= all_to_all else "all_to_all"
