"""Load of experts and ranks: how evenly routing spreads the tokens, counted on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_moe_dist.dispatch.partition import num_local_experts
from flash_moe_dist.expert_parallel import ExpertParallelFunc


@dataclass(frozen=True)
class ExpertLoad:
    """Load of one layer's experts over all tokens counted; `str` gives one line for a log.

    pairs_per_rank: (token, expert) pairs that each rank of the ep mesh computed.
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

    def gather(self, num_experts: int, group: dist.ProcessGroup) -> ExpertLoad:
        """Combine the counts of all ranks of `group`; collective, waits for the device."""
        counts = self.pairs[1:]
        busiest = counts.max() if len(counts) else counts.sum()
        mine = torch.stack([counts.sum(), (counts > 0).sum(), busiest])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        pairs, touched, most = torch.stack(ranks).t().tolist()
        mean = sum(pairs) / max(1, num_experts)
        return ExpertLoad(
            pairs, sum(touched) / max(1, num_experts), max(most) / mean if mean else 0.0
        )


@contextmanager
def count_load(model: nn.Module) -> Iterator[dict[str, ExpertLoad]]:
    """Count the load of every layer sharded by `ExpertParallel` within the block.

        with count_load(model) as loads:
            model(tokens)
        for name, load in loads.items():
            print(name, load)

    Collective at the end of the block over the ep mesh of each layer, so every rank must enter
    the block. Yields a dictionary that is filled at its end: an `ExpertLoad` for each such module,
    by name, over the tokens of all ranks of its ep mesh and equal on them. Every forward pass in
    the block counts, so one that activation checkpointing recomputes counts again.
    """
    loads: dict[str, ExpertLoad] = {}
    counted: dict[str, tuple[ExpertParallelFunc, int, LoadCounter]] = {}
    for name, module in model.named_modules():
        func = getattr(module, "expert_func", None)
        if isinstance(func, ExpertParallelFunc):
            table = next(module.parameters(recurse=False))
            ep_rank = func.ep_mesh.get_local_rank()
            num_local = num_local_experts(table.shape[0], func.ep_size, ep_rank)
            counter = LoadCounter(num_local, table.device)
            func.counters.append(counter.add)
            counted[name] = (func, table.shape[0], counter)
    try:
        yield loads
    finally:
        for func, _, counter in counted.values():
            func.counters.remove(counter.add)
    for name, (func, num_experts, counter) in counted.items():
        loads[name] = counter.gather(num_experts, func.ep_mesh.get_group())
