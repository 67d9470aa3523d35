"""Load of experts and ranks: counted on request, and exactly."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from expected_load import Pass, usage_and_unevenness
from ranks import KERNELS, RankPools
from sharded import shard_experts
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from flash_moe import FlashExperts, FlashMoE, triton_flash_expert_func
from flash_moe_dist import ExpertLoad, count_load
from flash_moe_dist.expert_parallel import ExpertParallelFunc
from flash_moe_dist.load import LoadCounter
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
    indices, weights = weighted_pass(runtime.rank, 0)
    case = make_case(len(indices), hidden_size, NUM_EXPERTS, SLOTS, indices=indices)
    with count_load(experts) as loads:
        experts(case.hidden_states, case.indices, weights)
    return loads[""]


def test_load_does_not_depend_on_the_number_of_replicas(rank_pools: RankPools) -> None:
    passes = [weighted_pass(rank, 0) for rank in range(4)]
    everything = torch.cat([indices.flatten() for indices, _ in passes])
    pairs = torch.bincount(everything[everything >= 0], minlength=NUM_EXPERTS)
    usage, unevenness = usage_and_unevenness(passes, NUM_EXPERTS)
    for ep_size in (4, 2, 1):
        loads = rank_pools.run(4, counted_with_replicas, ep_size)
        assert loads == loads[:1] * 4
        assert len(loads[0].pairs_per_rank) == 4
        assert sum(loads[0].pairs_per_rank) == int(pairs.sum())
        assert loads[0].touched == pytest.approx((pairs > 0).sum().item() / NUM_EXPERTS)
        assert loads[0].max_over_mean == pytest.approx(float(pairs.max() / pairs.double().mean()))
        assert loads[0].usage == pytest.approx(usage)
        assert loads[0].unevenness == pytest.approx(unevenness)


def weighted_pass(rank: int, number: int) -> Pass:
    """Ids and weights of either sign, none on rank 1; what expert 0 gets is 0 or in no slot."""
    draw = torch.Generator().manual_seed(10 * rank + number)
    shape = (0 if rank == 1 else 5 + rank, SLOTS)
    indices = torch.randint(-1, NUM_EXPERTS - 2, shape, generator=draw)
    weights = torch.randn(shape, generator=draw)
    return indices, weights.masked_fill(indices == 0, 0)


def weighted(dispatcher: str, dtype: torch.dtype) -> tuple[ExpertLoad, int]:
    """Load of three passes, and how many of them had static capacity."""
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1, dtype), dispatcher)
    with count_load(experts) as loads:
        for number in range(3):
            indices, weights = weighted_pass(dist.get_rank(), number)
            hidden_states = torch.ones(len(indices), HIDDEN_SIZE, dtype=dtype)
            experts(hidden_states, indices, weights.to(dtype).requires_grad_())
    func = experts.expert_func
    assert isinstance(func, ExpertParallelFunc)
    return loads[""], func.stats.capacity


@pytest.mark.parametrize(
    ("world_size", "dispatcher", "dtype", "backend"),
    [
        (1, "auto", torch.bfloat16, "gloo"),
        (2, "all_to_all", torch.float32, "gloo"),
        # With static capacity, the pairs are the first part of a longer buffer.
        (2, "all_gather", torch.float32, KERNELS),
        (3, "all_to_all", torch.bfloat16, "gloo"),
        (3, "all_gather", torch.float32, "gloo"),
    ],
)
def test_usage_and_unevenness_are_those_of_brute_force(
    world_size: int, dispatcher: str, dtype: torch.dtype, backend: str, rank_pools: RankPools
) -> None:
    passes = [weighted_pass(rank, number) for rank in range(world_size) for number in range(3)]
    passes = [(indices, weights.to(dtype)) for indices, weights in passes]
    usage, unevenness = usage_and_unevenness(passes, NUM_EXPERTS)
    results = rank_pools.run(world_size, weighted, dispatcher, dtype, backend=backend)
    assert results == results[:1] * world_size
    load, with_capacity = results[0]
    assert (with_capacity > 0) == (backend == KERNELS)
    assert load.usage == pytest.approx(usage, rel=1e-12)
    assert load.unevenness == pytest.approx(unevenness, rel=1e-12)
    # Expert 0 was chosen with weight 0 only.
    assert load.touched == pytest.approx(load.usage + 1 / NUM_EXPERTS)


@pytest.mark.parametrize("autocast", [False, True])
def test_usage_and_unevenness_of_an_unsharded_layer(autocast: bool) -> None:
    torch.manual_seed(0)
    moe = FlashMoE(HIDDEN_SIZE, 4, 20, 3)
    passes: list[Pass] = []
    moe.router.register_forward_hook(lambda *of_pass: passes.append(of_pass[2]))
    with count_load(moe) as loads, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for num_tokens in (9, 0, 4):
            moe(torch.randn(num_tokens, HIDDEN_SIZE)).sum().backward()
    usage, unevenness = usage_and_unevenness(passes, 20)
    assert loads["experts"].usage == loads["experts"].touched == pytest.approx(usage)
    assert loads["experts"].unevenness == pytest.approx(unevenness, rel=1e-12)


def load_of(indices: Tensor, weights: Tensor) -> ExpertLoad:
    experts = FlashExperts(NUM_EXPERTS, HIDDEN_SIZE, dtype=weights.dtype)
    with count_load(experts) as loads:
        experts(torch.ones(len(indices), HIDDEN_SIZE, dtype=weights.dtype), indices, weights)
    return loads[""]


def test_bounds_of_unevenness() -> None:
    one_each = torch.arange(NUM_EXPERTS).view(-1, 1)
    weights = torch.full((NUM_EXPERTS, 1), 1 / 3)
    even = load_of(one_each, weights)
    assert even.usage == 1
    assert 0 <= even.unevenness < 1e-14
    one_takes_all = load_of(torch.full_like(one_each, 7), weights)
    assert one_takes_all.usage == pytest.approx(1 / NUM_EXPERTS)
    assert one_takes_all.unevenness == pytest.approx(math.log(NUM_EXPERTS))
    nothing_weighs = load_of(one_each, 0 * weights)
    assert (nothing_weighs.touched, nothing_weighs.usage, nothing_weighs.unevenness) == (1, 0, 0)
    assert math.isnan(load_of(one_each, math.nan * weights).unevenness)
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(NUM_EXPERTS, 1, generator=draw, dtype=torch.float64)
    scaled = [load_of(one_each, scale * weights) for scale in (1e-30, 1.0, 1e30)]
    assert [load.usage for load in scaled] == [1.0] * 3
    assert [load.unevenness for load in scaled] == pytest.approx([scaled[1].unevenness] * 3)


def test_sums_of_weights_are_bitwise_repeatable(device: torch.device) -> None:
    ids = torch.randint(-1, 100, (200, 500), device=device)
    weights = torch.randn(200, 500, device=device, dtype=torch.float64)
    counters = [LoadCounter(100, device) for _ in range(5)]
    for counter in counters:
        counter.add(ids, weights)
    assert all(torch.equal(counter.weights, counters[0].weights) for counter in counters)
    expected = [weights[ids == expert].abs().sum() for expert in range(-1, 100)]
    torch.testing.assert_close(counters[0].weights, torch.stack(expected))


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
    assert str(ExpertLoad([300, 100], 0.25, 8.0, 0.24, 1.06)) == (
        "400 pairs, busiest rank 1.50 x mean; 25.0% of experts touched, busiest 8.0 x mean; "
        "usage 24.0%, unevenness 1.060 nats"
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
