"""Predict the time of a pass from the bytes it moves and the rates of links and memory.

W ranks; a rank has T tokens, sends S rows and receives R; E experts, H hidden size; b, a, g bytes
of an element of hidden states, of partial sums and of the tables.

Experts take their time on one rank, scaled by the share of pairs that the busiest rank has. The
busiest rank's memory moves these bytes more than one rank's, in forward and backward together:

    rows received beyond T: the backward pass reads them twice, the  (R - T) H (3 b + 2 a)
        forward pass once, and each pass writes a partial sum for each
    rows packed for an all-to-all, partial sums of all ranks read    2 S H (2 b + a)
    weak scaling: each rank writes smaller gradients of the tables   -2 (1 - 1/W) E H g

A transfer takes a latency, plus the most bytes that any rank sends to others or receives from them,
divided by the rate of the link. No two terms are assumed to overlap.

Between hosts, each row of an all-gather crosses to a host once, split among the host's ranks; rows
of an all-to-all cross for each rank that needs them.
"""

from dataclasses import dataclass

import torch

from flash_moe_dist.dispatch.comm_volume import DispatcherName
from scaling.problems import Problem
from scaling.traffic import Collective, Traffic, Transfer, busiest, transfers


@dataclass(frozen=True)
class Link:
    """Cost of one collective: seconds of an empty transfer, and bytes/s that leave each rank."""

    latency: float
    rate: float


@dataclass(frozen=True)
class Network:
    """Rates that a prediction assumes.

    links: cost of each collective between ranks of a host.
    between_hosts: bytes/s of a rank to other hosts.
    memory: bytes/s of a copy on a device, read and written.
    """

    links: dict[Collective, Link]
    ranks_per_host: int
    between_hosts: float
    memory: float

    def seconds(self, transfer: Transfer) -> float:
        """Predict the seconds of a transfer."""
        bytes_WW = transfer.bytes_WW
        ranks = len(bytes_WW)
        link = self.links[transfer.collective]
        host_size = min(ranks, self.ranks_per_host)
        if transfer.collective == "all_to_all":
            host_W = torch.arange(ranks) // host_size
            same_host_WW = host_W[:, None] == host_W
            to_others_WW = bytes_WW.clone().fill_diagonal_(0)
            within = busiest(to_others_WW.where(same_host_WW, 0.0))
            between = busiest(to_others_WW.where(~same_host_WW, 0.0))
        else:
            per_rank = float(bytes_WW.max())
            within = per_rank * (ranks - 1)
            between = per_rank * (ranks - host_size) / host_size
        rate_between = min(self.between_hosts, link.rate)
        return link.latency + max(within / link.rate, between / rate_between)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a forward and a backward pass.

    experts: on the busiest rank. memory: bytes moved beyond those on one rank. communication: all
    transfers.
    """

    experts: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of a forward and a backward pass; no parts overlap."""
        return self.experts + self.memory + self.communication


def predict(
    dispatcher: DispatcherName,
    problem: Problem,
    traffic: Traffic,
    network: Network,
    one_rank_seconds: float,
) -> Prediction:
    """Predict a forward and a backward pass.

    Args:
        one_rank_seconds: time of both passes on one rank, with the tokens of one rank in weak
            scaling and of all ranks in strong scaling.
    """
    ranks = len(traffic.rows_WW)
    per_rank = one_rank_seconds if problem.scaling == "weak" else one_rank_seconds / ranks
    experts = per_rank * traffic.imbalance
    sizes = problem.element_sizes(ranks)
    b, a = sizes.hidden_bytes, sizes.sum_bytes
    if dispatcher == "all_gather":
        sent = received = ranks * traffic.max_tokens
        packing = a
    else:
        sent = float(traffic.rows_WW.sum(1).max())
        received = float(traffic.rows_WW.sum(0).max())
        packing = 2 * b + a
    per_column = (received - traffic.max_tokens) * (3 * b + 2 * a) + 2 * sent * packing
    if problem.scaling == "weak":
        # In strong scaling, the share of the time on one rank already has a share of these writes.
        per_column -= 2 * (1 - 1 / ranks) * problem.num_experts * b
    memory = per_column * problem.hidden_size / network.memory
    return Prediction(
        experts,
        # What memory saves cannot exceed the time of the experts.
        max(memory, -experts),
        sum(network.seconds(transfer) for transfer in transfers(dispatcher, sizes, traffic)),
    )
