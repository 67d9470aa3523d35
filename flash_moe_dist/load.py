"""Load of experts and ranks: how evenly routing spreads the tokens, counted on request."""

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

    pairs_per_rank: (token, expert) pairs that each rank computed, in the order of the mesh that the
        tables are on.
    touched: share of the experts that at least one token used, 0 to 1.
    max_over_mean: pairs of the busiest expert over the mean of all experts; 0 without pairs.
    rank_max_over_mean: pairs of the busiest rank over the mean of all ranks: 1 if balanced.
    """

    pairs_per_rank: list[int]
    touched: float
    max_over_mean: float

    @property
    def rank_max_over_mean(self) -> float:
        mean = sum(self.pairs_per_rank) / len(self.pairs_per_rank)
        return max(self.pairs_per_rank) / mean if mean else 0.0

    def __str__(self) -> str:
        return (
            f"{sum(self.pairs_per_rank):,} pairs, busiest rank {self.rank_max_over_mean:.2f} x "
            f"mean; {self.touched:.1%} of experts touched, busiest {self.max_over_mean:.1f} x mean"
        )


class LoadCounter:
    """Counts the pairs of this rank's experts on the device, without a host sync."""

    def __init__(self, num_local_experts: int, device: torch.device) -> None:
        # Element 0 counts empty slots.
        self.pairs = torch.zeros(1 + num_local_experts, dtype=torch.int64, device=device)

    def add(self, local_ids: Tensor) -> None:
        """Count expert ids relative to this rank's first expert, of any shape; -1: empty slot."""
        ids = (local_ids.flatten().long() + 1).clamp_(0, self.pairs.shape[0] - 1)
        self.pairs.scatter_add_(0, ids, torch.ones_like(ids))

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
        counts, replicas = self.pairs[1:].clone(), 1
        own_pairs = counts.sum()
        for group in groups:
            if ep_group is None or group.group_name != ep_group.group_name:
                dist.all_reduce(counts, group=group)
                replicas *= dist.get_world_size(group)
        busiest = counts.max() if len(counts) else counts.sum()
        of_ranks = torch.stack([own_pairs, (counts > 0).sum(), busiest])
        for group in reversed(groups):
            gathered = [torch.empty_like(of_ranks) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, of_ranks, group=group)
            of_ranks = torch.stack(gathered)
        pairs, touched, most = of_ranks.view(-1, 3).t().tolist()
        mean = sum(pairs) / max(1, num_experts)
        return ExpertLoad(
            pairs_per_rank=pairs,
            touched=sum(touched) / replicas / max(1, num_experts),
            max_over_mean=max(most) / mean if mean else 0.0,
        )


def _counted(func: Any, counter: LoadCounter) -> Callable[..., Tensor]:
    """Wrap an `expert_func` of unsharded tables so that it counts the ids it is called with."""

    @wraps(func)
    def counted(
        hidden_states: Tensor,
        down_weights: Tensor,
        up_weights: Tensor,
        indices: Tensor,
        routing_weights: Tensor,
    ) -> Tensor:
        out: Tensor = func(hidden_states, down_weights, up_weights, indices, routing_weights)
        counter.add(indices)
        return out

    return counted


@contextmanager
def _counting(module: Any, counter: LoadCounter) -> Iterator[None]:
    """Call the counter with the local ids of every forward pass of the module in the block."""
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
