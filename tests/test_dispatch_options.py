"""Every way to dispatch can be selected, and `stats` says which one ran."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import KERNELS, RankPools
from sharded import shard_experts
from shared_files import use_shared_files
from test_capacity import results, stats_of

from flash_moe_dist import ExpertParallel
from flash_moe_dist.dispatch.capacity import DispatchStats

NUM_EXPERTS, HIDDEN_SIZE, TOP_K, PASSES = 23, 12, 6, 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatcher": "broadcast"}, "dispatcher must be one of auto, all_to_all, all_gather"),
        ({"transport": "tcp"}, "transport must be one of auto, nccl, symmetric_memory, got 'tcp'"),
        ({"capacity": 1.25}, "capacity must be one of auto, None, got 1.25"),
        (
            {"dispatcher": "all_to_all", "transport": "symmetric_memory"},
            "got dispatcher 'all_to_all' and capacity 'auto'",
        ),
        (
            {"transport": "symmetric_memory", "capacity": None},
            "got dispatcher 'auto' and capacity None",
        ),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertParallel(**options)


def passes(has_symmetric_memory: bool, options: dict[str, Any]) -> tuple[DispatchStats, Any]:
    """Statistics of some passes, and their last results."""
    case = make_case(9, HIDDEN_SIZE, NUM_EXPERTS, TOP_K, seed=dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        if has_symmetric_memory:
            use_shared_files(patch)
        experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), **options)
        for _ in range(PASSES):
            found = results(experts, case)
        return stats_of(experts), found


@pytest.mark.parametrize(
    ("options", "exact", "transports"),
    [
        ({"dispatcher": "all_to_all"}, PASSES, {"gloo": PASSES}),
        ({"dispatcher": "all_gather", "capacity": None}, PASSES, {"gloo": PASSES}),
        ({"dispatcher": "all_gather", "transport": "nccl"}, 1, {"gloo": PASSES}),
        ({"dispatcher": "all_gather"}, 1, {"gloo": 1, "symmetric_memory": PASSES - 1}),
        (
            {"dispatcher": "auto", "transport": "symmetric_memory"},
            1,
            {"gloo": 1, "symmetric_memory": PASSES - 1},
        ),
    ],
    ids=str,
)
def test_stats_say_which_way_ran(
    options: dict[str, Any], exact: int, transports: dict[str, int], rank_pools: RankPools
) -> None:
    for stats, _ in rank_pools.run(2, passes, True, options, backend=KERNELS):
        assert (stats.exact, stats.capacity) == (exact, PASSES - exact)
        assert (stats.retried, stats.stood_in) == (0, 0)
        assert stats.transports == transports
        name = "all_to_all" if options["dispatcher"] == "all_to_all" else "all_gather"
        assert stats.dispatchers == {name: PASSES}


def what_auto_means() -> tuple[str, str]:
    """Run a pass with "auto"; return what `stats` and `repr` say."""
    case = make_case(9, HIDDEN_SIZE, NUM_EXPERTS, 1, seed=dist.get_rank())
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "auto")
    experts(case.hidden_states, case.indices, case.routing_weights)
    return ", ".join(stats_of(experts).dispatchers), repr(experts.expert_func)


def test_what_auto_means_can_be_seen(rank_pools: RankPools) -> None:
    for dispatcher, shown in rank_pools.run(4, what_auto_means):
        assert dispatcher == "all_to_all"
        assert re.fullmatch(
            r"ExpertParallelFunc\(layer \d+, ep_size=4, dispatcher='auto', transport='auto', "
            r"capacity='auto'\)",
            shown,
        )


def test_all_ways_agree(rank_pools: RankPools) -> None:
    ways = [
        {"dispatcher": "all_gather", "capacity": None},
        {"dispatcher": "all_gather", "transport": "nccl"},
        {"dispatcher": "all_gather", "transport": "symmetric_memory"},
    ]
    found = [rank_pools.run(2, passes, True, way, backend=KERNELS) for way in ways]
    for exact, *others in zip(*found, strict=True):
        for other in others:
            assert all(map(torch.equal, exact[1], other[1]))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (KERNELS, "transport 'symmetric_memory' needs ranks of one host"),
        ("gloo", "transport 'symmetric_memory' needs ranks of one host"),
    ],
)
def test_symmetric_memory_that_cannot_be_had(
    backend: str, message: str, rank_pools: RankPools
) -> None:
    options = {"dispatcher": "auto", "transport": "symmetric_memory"}
    for outcome in rank_pools.outcomes(2, passes, False, options, backend=backend):
        assert outcome.kind == "RuntimeError", outcome.trace
        assert message in outcome.message
