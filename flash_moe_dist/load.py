"""Load of experts and ranks: how evenly routing spreads the tokens, counted on request."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flash_moe.arguments import check_type
from flash_moe_dist.dispatch.partition import num_local_experts
from flash_moe_dist.expert_parallel import ExpertParallelFunc


@dataclass(frozen=True)
class ExpertLoad:
    """Load of one layer's experts over all tokens counted; `str` gives one line for a log.

    `usage` and `unevenness` are those of Lample et al. 2019 (arXiv:1907.05242), with z the absolute
    routing weights that each expert got, divided by their sum over all experts.

    pairs_per_rank: (token, expert) pairs that each rank computed, in the order of the mesh that the
        tables are on.
    touched: share of the experts that at least one token chose, 0 to 1; a pair of weight 0 counts.
    max_over_mean: pairs of the busiest expert over the mean of all experts; 0 without pairs.
    rank_max_over_mean: pairs of the busiest rank over the mean of all ranks: 1 if balanced.
    usage: share of the experts that got any routing weight, 0 to 1; a pair of weight 0 does not
        count.
    unevenness: log E + sum of z log z over the E experts, in nats: 0 if all got the same weight, or
        none any, and log E if one got it all. NaN if a weight is not finite.
    """

    pairs_per_rank: list[int]
    touched: float
    max_over_mean: float
    usage: float = 0.0
    unevenness: float = 0.0

    @property
    def rank_max_over_mean(self) -> float:
        mean = sum(self.pairs_per_rank) / len(self.pairs_per_rank)
        return max(self.pairs_per_rank) / mean if mean else 0.0

    def __str__(self) -> str:
        return (
            f"{sum(self.pairs_per_rank):,} pairs, busiest rank {self.rank_max_over_mean:.2f} x "
            f"mean; {self.touched:.1%} of experts touched, busiest {self.max_over_mean:.1f} x "
            f"mean; usage {self.usage:.1%}, unevenness {self.unevenness:.3f} nats"
        )


class LoadCounter:
    """Counts the pairs and adds up the weights of this rank's experts, without a host sync."""

    def __init__(self, num_local_experts: int, device: torch.device) -> None:
        # Element 0 is that of empty slots.
        self.pairs = torch.zeros(1 + num_local_experts, dtype=torch.int64, device=device)
        self.weights = torch.zeros_like(self.pairs, dtype=torch.float64)

    def add(self, local_ids: Tensor, routing_weights: Tensor) -> None:
        """Count the pairs of a pass; the same passes give the same bits.

        Args:
            local_ids: of any shape, relative to this rank's first expert; -1: empty slot.
            routing_weights: as many, in any float dtype.
        """
        if local_ids.numel() == 0:
            return
        ids = (local_ids.flatten().long() + 1).clamp_(0, self.pairs.shape[0] - 1)
        # Atomic additions of floats would come in any order.
        ids, order = ids.sort(stable=True)
        pairs = torch.zeros_like(self.pairs).scatter_add_(0, ids, torch.ones_like(ids))
        weights = routing_weights.detach().flatten()[order].double().abs()
        self.pairs += pairs
        self.weights += torch.segment_reduce(weights, "sum", lengths=pairs, unsafe=True)

    def gather(
        self,
        num_experts: int,
        ep_group: dist.ProcessGroup | None,
        groups: Sequence[dist.ProcessGroup],
    ) -> ExpertLoad:
        """Combine the counts of all ranks; collective, waits for the device.

        Args:
            num_experts: E, over all ranks.
            ep_group: ranks that own the other experts; None: this rank counts them all.
            groups: groups that this rank belongs to, one for each axis of the mesh of the tables.
                Ranks along the axes other than `ep_group` have the same experts and other tokens.
        """
        counts, weights, replicas = self.pairs[1:].clone(), self.weights[1:].clone(), 1
        own_pairs = counts.sum()
        for group in groups:
            if ep_group is None or group.group_name != ep_group.group_name:
                dist.all_reduce(counts, group=group)
                dist.all_reduce(weights, group=group)
                replicas *= dist.get_world_size(group)
        busiest = counts.max() if len(counts) else counts.sum()
        integers = torch.stack([own_pairs, (counts > 0).sum(), busiest, (weights != 0).sum()])
        # Sum of -w log w, from which the normalised weights' follows without a second exchange.
        sums = torch.stack([weights.sum(), torch.special.entr(weights).sum()])
        # Counts are exact in float64.
        of_ranks = torch.cat([integers.double(), sums])
        for group in reversed(groups):
            gathered = [torch.empty_like(of_ranks) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, of_ranks, group=group)
            of_ranks = torch.stack(gathered)
        pairs, touched, most, used, weight, entropy = of_ranks.view(-1, 6).t().tolist()
        mean = sum(pairs) / max(1, num_experts)
        return ExpertLoad(
            pairs_per_rank=[int(count) for count in pairs],
            touched=sum(touched) / replicas / max(1, num_experts),
            max_over_mean=max(most) / mean if mean else 0.0,
            usage=sum(used) / replicas / max(1, num_experts),
            unevenness=_unevenness(num_experts, sum(weight) / replicas, sum(entropy) / replicas),
        )


def _unevenness(num_experts: int, weight: float, entropy: float) -> float:
    """Compute log E + sum of z log z, z = w / W, from W = sum of w and the sum of -w log w."""
    if weight == 0:
        return 0.0
    unevenness = math.log(num_experts) - entropy / weight - math.log(weight)
    # Rounding may leave an even load below 0; NaN stays.
    return 0.0 if unevenness < 0 else unevenness


def _counted(func: Any, counter: LoadCounter) -> Callable[..., Tensor]:
    """Wrap an `expert_func` of unsharded tables so that it counts the pairs it is called with."""

    @wraps(func)
    def counted(
        hidden_states: Tensor,
        down_weights: Tensor,
        up_weights: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
    ) -> Tensor:
        out: Tensor = func(hidden_states, down_weights, up_weights, indices, routing_weights)
        counter.add(indices, routing_weights)
        return out

    return counted


@contextmanager
def _counting(module: Any, counter: LoadCounter) -> Iterator[None]:
    """Call the counter with the pairs of every forward pass of the module in the block."""
    func = module.expert_func
    if isinstance(func, ExpertParallelFunc):
        func.counters.append(counter.add)
        try:
            yield
        finally:
            func.counters.remove(counter.add)
        return
    own = vars(module).get("expert_func")
    module.expert_func = _counted(func, counter)
    try:
        yield
    finally:
        del module.expert_func
        if own is not None:
            module.expert_func = own


@contextmanager
def count_load(model: nn.Module) -> Iterator[dict[str, ExpertLoad]]:
    """Count the load of every module that calls an `expert_func` within the block.

        with count_load(model) as loads:
            model(tokens)
        for name, load in loads.items():
            print(name, load)

    Yields a dictionary that is filled at its end: an `ExpertLoad` for each such module, by name,
    over the tokens of all ranks of the mesh that its tables are on, replicas of its experts
    included, and equal on these ranks. The end of the block is collective over that mesh, so every
    rank must enter the block. Tables that are no DTensors are counted for this process alone. Every
    forward pass in the block counts, so one that activation checkpointing recomputes counts again.

    Raises:
        TypeError: `model` is no module.
    """
    check_type("model", model, nn.Module)
    loads: dict[str, ExpertLoad] = {}
    gathers: dict[str, Callable[[], ExpertLoad]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            func = getattr(module, "expert_func", None)
            if func is not None and isinstance(module, FSDPModule):
                # Gathered tables, as some forward passes leave them, are not on the whole mesh.
                module.reshard()
            table = next(module.parameters(recurse=False), None)
            if func is None or table is None:
                continue
            num_experts = num_local = table.shape[0]
            ep_group = None
            if isinstance(func, ExpertParallelFunc):
                ep_group = func.ep_mesh.get_group()
                ep_rank = func.ep_mesh.get_local_rank()
                num_local = num_local_experts(num_experts, func.ep_size, ep_rank)
            groups = table.device_mesh.get_all_groups() if isinstance(table, DTensor) else []
            counter = LoadCounter(num_local, table.device)
            stack.enter_context(_counting(module, counter))
            gathers[name] = partial(counter.gather, num_experts, ep_group, groups)
        yield loads
    for name, gather in gathers.items():
        loads[name] = gather()
