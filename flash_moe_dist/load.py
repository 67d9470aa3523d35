"""How evenly tokens use the experts, and experts the ranks: counted on request only."""

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
    """Use of one layer's experts, by all tokens that were counted.

    pairs_per_rank: (token, expert) pairs that each rank of the ep mesh computed.
    touched: share of the experts that at least one token used, 0 to 1.
    max_over_mean: pairs of the busiest expert over those of the mean one; 0 without pairs.
    rank_max_over_mean: the same of ranks: 1 if all compute equally much.

    As text, a line for a log.
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
    """Counts pairs of this rank's experts on the device, without waiting for it."""

    def __init__(self, num_local_experts: int, device: torch.device) -> None:
        # One place more, in front, for empty slots.
        self.pairs = torch.zeros(1 + num_local_experts, dtype=torch.int64, device=device)

    def add(self, local_ids: Tensor) -> None:
        ids = (local_ids.flatten().long() + 1).clamp_(0, self.pairs.shape[0] - 1)
        self.pairs.scatter_add_(0, ids, torch.ones_like(ids))

    def gather(self, num_experts: int, group: dist.ProcessGroup) -> ExpertLoad:
        """Collective over `group`; waits for the device."""
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
    """Count the load of all layers under `ExpertParallel` in the block.

        with count_load(model) as loads:
            model(tokens)
        for name, load in loads.items():
            print(name, load)

    Every rank must enter and leave it. Yields a dictionary that is filled at the end of the block
    with an `ExpertLoad` for each such module, by name: over the tokens of the ranks of its ep
    mesh, the same on all of them. Each forward pass in the block counts, so a recomputed one
    (activation checkpointing) counts again.
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
