"""Times from the volume model: experts as on one rank, rows of other ranks, and their links.

W ranks, r of them on each host; R rows received, H hidden size; b, a bytes of an element of hidden
states and of partial sums, as in `flash_moe_dist.volume`.

Experts take what they take on one rank, times the share of the busiest rank's pairs, and what its
memory needs for the rows received: both passes read hidden states, the backward one gradients too,
and both write sums: R H (3 b + 2 a). Communication takes the bytes of `flash_moe_dist.volume` over
the rate of each collective, and a latency for each message. Nothing is taken to overlap.

Between hosts: of an all-to-all every rank sends (W - r) / W of its bytes there. Rows of an
all-gather or reduce-scatter cross to a host once, shared out among its r ranks: (W - r) / r times
what one rank gathers, or scatters to one rank, over each rank's network.
"""

from dataclasses import dataclass

from flash_moe.bench.cases import DTYPES
from flash_moe.ops.backends import accumulator_dtype
from flash_moe_dist.volume import (
    DispatcherName,
    Load,
    Widths,
    bytes_handed,
    expected_fan_out,
)
from scaling.problems import Problem

# Of the pairs: ids and weights travel one after the other in a forward pass.
MESSAGES: dict[str, dict[str, int]] = {"forward": {"pairs": 2}, "backward": {}}
ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER = "all_to_all", "all_gather", "reduce_scatter"


@dataclass(frozen=True)
class Link:
    """Of one collective: seconds of an empty one, and bytes/s that leave each rank."""

    latency: float
    rate: float


@dataclass(frozen=True)
class Network:
    """Links within a host by collective; bytes/s of each rank to other hosts, and of its memory."""

    links: dict[str, Link]
    ranks_per_host: int
    between_hosts: float
    memory: float

    def seconds(self, collective: str, handed: float, ranks: int, messages: int = 1) -> float:
        """Of `handed` bytes on each of `ranks` ranks, in so many messages."""
        if ranks == 1:
            return 0.0
        link, near = self.links[collective], min(ranks, self.ranks_per_host)
        far = ranks - near
        if collective == ALL_TO_ALL:
            within, between = handed * (near - 1) / ranks, handed * far / ranks
        else:
            # What one rank gathers, or scatters to one rank.
            part = handed if collective == ALL_GATHER else handed / ranks
            within, between = part * (ranks - 1), part * far / near
        return messages * link.latency + max(within / link.rate, between / self.between_hosts)


@dataclass(frozen=True)
class Prediction:
    """Seconds of both passes on the busiest rank: experts, communication."""

    experts: float
    communication: float

    @property
    def total(self) -> float:
        return self.experts + self.communication


def predict(
    dispatcher: DispatcherName,
    problem: Problem,
    loads: list[Load],
    network: Network,
    one_rank_seconds: float,
) -> Prediction:
    """Of the busiest of the ranks that have these loads.

    one_rank_seconds: of both passes on one rank: of its tokens in weak, all in strong scaling.
    """
    ranks = len(loads)
    shared = one_rank_seconds if problem.scaling == "weak" else one_rank_seconds / ranks
    most_pairs, pairs = (f(load.pairs_received for load in loads) for f in (max, sum))
    pairs_seconds = shared * most_pairs * ranks / max(1, pairs)
    of_each = (_predict(dispatcher, problem, ranks, load, network, pairs_seconds) for load in loads)
    return max(of_each, key=lambda one: one.total)


def predict_even(
    dispatcher: DispatcherName,
    problem: Problem,
    ranks: int,
    network: Network,
    one_rank_seconds: float,
) -> Prediction:
    """Of more ranks than there are, where every expert is as likely as any other."""
    slots = problem.num_experts_per_tok
    tokens = max(1, problem.tokens_per_rank(ranks))
    rows = round(tokens * expected_fan_out(ranks, slots))
    load = Load(rows, rows, tokens * slots, tokens * slots, tokens)
    return predict(dispatcher, problem, [load] * ranks, network, one_rank_seconds)


def _predict(
    dispatcher: DispatcherName,
    problem: Problem,
    ranks: int,
    load: Load,
    network: Network,
    pairs_seconds: float,
) -> Prediction:
    dtype = DTYPES[problem.dtype]
    sum_bytes = accumulator_dtype(dtype, dtype).itemsize
    widths = Widths(ranks, problem.hidden_size, dtype.itemsize, sum_bytes, dtype.itemsize)
    communication = 0.0
    for direction, handed in zip(MESSAGES, bytes_handed(dispatcher, widths, load), strict=True):
        for item, count in handed.items():
            collective = ALL_TO_ALL
            if dispatcher == "all_gather":
                collective = {"rows": ALL_GATHER, "sums": REDUCE_SCATTER}.get(item, ALL_TO_ALL)
            messages = MESSAGES[direction].get(item, 1)
            communication += network.seconds(collective, count, ranks, messages)
    gathers = dispatcher == "all_gather"
    rows_received = ranks * load.most_tokens if gathers else load.rows_received
    row_bytes = problem.hidden_size * (3 * dtype.itemsize + 2 * sum_bytes)
    return Prediction(pairs_seconds + rows_received * row_bytes / network.memory, communication)
