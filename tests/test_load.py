"""Load of experts and ranks: counted on request, and exactly."""

import copy

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import RankPools
from sharded import shard_experts
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from flash_moe import FlashExperts, triton_flash_expert_func
from flash_moe_dist import ExpertLoad, count_load
from flash_moe_dist.expert_parallel import ExpertParallelFunc
from flash_moe_dist.runtime import Runtime

NUM_EXPERTS, HIDDEN_SIZE, SLOTS = 11, 6, 3


def indices_of(rank: int) -> Tensor:
    """Few experts, the first more often, with empty slots."""
    draw = torch.Generator().manual_seed(rank)
    indices = torch.randint(5, (4 + rank, SLOTS), generator=draw) * 2
    indices[0, 0] = -1
    indices[1:, 0] = 0
    return indices


def counted() -> ExpertLoad:
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1))
    rank = dist.get_rank()
    indices = indices_of(rank)
    case = make_case(len(indices), HIDDEN_SIZE, NUM_EXPERTS, SLOTS, indices=indices)
    model = nn.ModuleDict({"experts": experts})
    func = experts.expert_func
    assert isinstance(func, ExpertParallelFunc)
    with count_load(model) as loads:
        for _ in range(2):
            experts(case.hidden_states, case.indices, case.routing_weights)
        assert not loads
    assert not func.counters
    experts(case.hidden_states, case.indices, case.routing_weights)
    return loads["experts"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_load_is_that_of_counting_by_hand(world_size: int, rank_pools: RankPools) -> None:
    everything = torch.cat([indices_of(rank).flatten() for rank in range(world_size)])
    pairs = 2 * torch.bincount(everything[everything >= 0], minlength=NUM_EXPERTS)
    per_rank = [int(part.sum()) for part in pairs.chunk(world_size)]
    for load in rank_pools.run(world_size, counted):
        assert load.pairs_per_rank == per_rank
        assert load.touched == pytest.approx((pairs > 0).sum().item() / NUM_EXPERTS)
        assert load.max_over_mean == pytest.approx(float(pairs.max() / pairs.double().mean()))
        assert load.rank_max_over_mean == pytest.approx(max(per_rank) * world_size / sum(per_rank))


def counted_with_replicas(ep_size: int) -> ExpertLoad:
    hidden_size = 8
    runtime = Runtime.of_world(torch.device("cpu"), ep_size)
    experts = shard_experts(make_case(1, hidden_size, NUM_EXPERTS, 1), mesh=runtime.ep_mesh)
    if ep_size < runtime.world_size:
        fully_shard(experts, mesh=runtime.efsdp_mesh, shard_placement_fn=lambda _: Shard(1))
    indices = indices_of(runtime.rank)
    case = make_case(len(indices), hidden_size, NUM_EXPERTS, SLOTS, indices=indices)
    with count_load(experts) as loads:
        experts(case.hidden_states, case.indices, case.routing_weights)
    return loads[""]


def test_load_does_not_depend_on_the_number_of_replicas(rank_pools: RankPools) -> None:
    everything = torch.cat([indices_of(rank).flatten() for rank in range(4)])
    pairs = torch.bincount(everything[everything >= 0], minlength=NUM_EXPERTS)
    for ep_size in (4, 2, 1):
        loads = rank_pools.run(4, counted_with_replicas, ep_size)
        assert loads == loads[:1] * 4
        assert len(loads[0].pairs_per_rank) == 4
        assert sum(loads[0].pairs_per_rank) == int(pairs.sum())
        assert loads[0].touched == pytest.approx((pairs > 0).sum().item() / NUM_EXPERTS)
        assert loads[0].max_over_mean == pytest.approx(float(pairs.max() / pairs.double().mean()))


@pytest.mark.parametrize("own_func", [False, True])
def test_unsharded_experts_are_counted(own_func: bool) -> None:
    experts = FlashExperts(NUM_EXPERTS, HIDDEN_SIZE)
    if own_func:
        experts.expert_func = triton_flash_expert_func
    before = dict(vars(experts))
    indices = indices_of(0)
    case = make_case(len(indices), HIDDEN_SIZE, NUM_EXPERTS, SLOTS, indices=indices)
    rows = (case.hidden_states, case.indices, case.routing_weights)
    with count_load(nn.ModuleDict({"experts": experts})) as loads:
        experts(*rows)
        with count_load(experts) as inner:
            experts(*rows)
    assert vars(experts) == before
    experts(*rows)
    pairs = int((indices >= 0).sum())
    assert (loads["experts"].pairs_per_rank, inner[""].pairs_per_rank) == ([2 * pairs], [pairs])
    assert loads["experts"].touched == len(indices[indices >= 0].unique()) / NUM_EXPERTS


def test_as_a_line_for_a_log() -> None:
    assert str(ExpertLoad([300, 100], 0.25, 8.0)) == (
        "400 pairs, busiest rank 1.50 x mean; 25.0% of experts touched, busiest 8.0 x mean"
    )
    assert ExpertLoad([0, 0], 0.0, 0.0).rank_max_over_mean == 0


def nested_and_copied() -> dict[str, int]:
    """Pairs by name: a copied layer beside its original, and a block inside of a block."""
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1))
    case = make_case(4, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    rows = (case.hidden_states, case.indices, case.routing_weights)
    model = nn.ModuleList([experts, copy.deepcopy(experts)])
    with count_load(model) as outer:
        experts(*rows)
        with count_load(model) as inner:
            experts(*rows)
        experts(*rows)
    return {
        prefix + name: sum(load.pairs_per_rank)
        for prefix, loads in (("outer ", outer), ("inner ", inner))
        for name, load in loads.items()
    }


def test_each_copy_and_each_block_counts_its_own(rank_pools: RankPools) -> None:
    once = 2 * 4 * SLOTS
    for pairs in rank_pools.run(2, nested_and_copied):
        assert pairs == {"outer 0": 3 * once, "outer 1": 0, "inner 0": once, "inner 1": 0}


def nothing_counted() -> ExpertLoad:
    model = nn.ModuleDict({"experts": shard_experts(make_case(1, HIDDEN_SIZE, 2, 1))})
    with count_load(model) as loads:
        pass
    return loads["experts"]


def test_without_tokens_and_with_ranks_without_experts(rank_pools: RankPools) -> None:
    for load in rank_pools.run(3, nothing_counted):
        assert load == ExpertLoad([0, 0, 0], 0.0, 0.0)


def fails_inside() -> None:
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1))
    func = experts.expert_func
    assert isinstance(func, ExpertParallelFunc)
    try:
        with count_load(experts):
            raise KeyError("inside")
    finally:
        assert not func.counters


def test_an_error_inside_ends_the_counting(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, fails_inside):
        assert outcome.kind == "KeyError"
