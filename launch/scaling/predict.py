"""Times from the volume model: experts as on one rank, what memory and links take for the rest.

W ranks; a rank has T tokens, sends S rows, receives R; E experts, H hidden size; b, a, g bytes of
an element of hidden states, of partial sums and of tables.

Experts take what they take on one rank, times the share of the busiest rank's pairs. Its memory
takes what has to be moved besides, forward and backward:

    more rows than T, received: read twice in the backward pass      (R - T) H (3 b + 2 a)
        and once in the forward pass, a sum written in each
    rows packed by an all-to-all, sums of every rank read            2 S H (2 b + a)
    in weak scaling, less of the gradients of the tables written     -2 (1 - 1/W) E H g

Each message takes a latency and, over its rate, the most bytes that any rank sends to others or
receives from them. Nothing is taken to overlap.

Between hosts: the rows of an all-gather cross to a host once, shared out among its ranks; those of
an all-to-all cross as they are.
"""

from dataclasses import dataclass

import torch

from flash_moe_dist.dispatch.comm_volume import DispatcherName
from scaling.problems import Problem
from scaling.traffic import ALL_GATHER, ALL_TO_ALL, Message, Traffic, busiest, messages


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

    def seconds(self, message: Message) -> float:
        bytes_WW = message.bytes_WW
        ranks = len(bytes_WW)
        link = self.links[message.collective]
        near = min(ranks, self.ranks_per_host)
        if message.collective == ALL_TO_ALL:
            host_W = torch.arange(ranks) // near
            same_host_WW = host_W[:, None] == host_W
            elsewhere_WW = bytes_WW.clone().fill_diagonal_(0)
            within = busiest(elsewhere_WW.where(same_host_WW, 0.0))
            between = busiest(elsewhere_WW.where(~same_host_WW, 0.0))
        else:
            # What one rank gathers from another.
            part = float(bytes_WW.max())
            within, between = part * (ranks - 1), part * (ranks - near) / near
        rate_between = min(self.between_hosts, link.rate)
        return link.latency + max(within / link.rate, between / rate_between)


@dataclass(frozen=True)
class Prediction:
    """Seconds of both passes: experts and memory of the busiest rank, communication."""

    experts: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        return self.experts + self.memory + self.communication


def predict(
    dispatcher: DispatcherName,
    problem: Problem,
    traffic: Traffic,
    network: Network,
    one_rank_seconds: float,
) -> Prediction:
    """Of both passes.

    Args:
        one_rank_seconds: of these on one rank, in strong scaling with the tokens of all.
    """
    ranks = len(traffic.rows_WW)
    shared = one_rank_seconds if problem.scaling == "weak" else one_rank_seconds / ranks
    experts = shared * traffic.load
    widths = problem.widths(ranks)
    b, a = widths.hidden_bytes, widths.sum_bytes
    if dispatcher == ALL_GATHER:
        sent = received = ranks * traffic.most_tokens
        packing = a
    else:
        sent = float(traffic.rows_WW.sum(1).max())
        received = float(traffic.rows_WW.sum(0).max())
        packing = 2 * b + a
    per_column = (received - traffic.most_tokens) * (3 * b + 2 * a) + 2 * sent * packing
    if problem.scaling == "weak":
        # In strong scaling a rank's share of the time on one rank has its share of these.
        per_column -= 2 * (1 - 1 / ranks) * problem.num_experts * b
    memory = per_column * problem.hidden_size / network.memory
    return Prediction(
        experts,
        # Less time than nothing is not to be had.
        max(memory, -experts),
        sum(network.seconds(message) for message in messages(dispatcher, widths, traffic)),
    )
