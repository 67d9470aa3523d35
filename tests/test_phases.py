"""Phases of sharded layers are timed on request, each without those nested in it."""

import time
from typing import Any

import pytest
import torch.distributed as dist
from cases import make_case
from ranks import RankPools, rank_device
from sharded import shard_experts

from flash_moe_dist import time_phases
from flash_moe_dist.phases import phase

ALL = {"dispatch", "experts", "combine"}
ALL |= {f"{name}_backward" for name in ALL} | {"communication"}
SLEEP = 0.05


def timed_passes(dispatcher: str, passes: int) -> tuple[dict[str, float], float, dict[str, float]]:
    """Seconds by phase, wall time of all passes, and seconds by phase of a block without passes."""
    case = make_case(6, 8, 5, 3, device=rank_device(), seed=dist.get_rank())
    experts = shard_experts(make_case(1, 8, 5, 1, device=rank_device()), dispatcher)
    begun = time.perf_counter()
    with time_phases(rank_device()) as seconds:
        assert seconds == {}
        for _ in range(passes):
            out = experts(case.hidden_states, case.indices, case.routing_weights)
            out.backward(case.grad)
    elapsed = time.perf_counter() - begun
    experts(case.hidden_states, case.indices, case.routing_weights)
    with time_phases(rank_device()) as nothing:
        pass
    return seconds, elapsed, nothing


class Slow:
    """Handle of a collective whose `wait` takes SLEEP longer."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, *timeout: Any) -> None:
        time.sleep(SLEEP)
        self.work.wait(*timeout)


def passes_with_slow_collectives(dispatcher: str) -> dict[str, float]:
    """`timed_passes` with slow all-to-alls."""
    patched: Any = dist
    all_to_all = patched.all_to_all_single

    def slow(*args: Any, **kwargs: Any) -> Any:
        return Slow(all_to_all(*args, **kwargs))

    patched.all_to_all_single = slow
    try:
        return timed_passes(dispatcher, 1)[0]
    finally:
        patched.all_to_all_single = all_to_all


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_all_phases_have_a_time(dispatcher: str, rank_pools: RankPools) -> None:
    for seconds, elapsed, nothing in rank_pools.run(2, timed_passes, dispatcher, 3):
        assert seconds.keys() == ALL
        assert all(taken > 0 for taken in seconds.values())
        assert sum(seconds.values()) < elapsed
        assert nothing == {}


@pytest.mark.gpu
def test_all_phases_have_a_time_on_a_gpu(rank_pools: RankPools) -> None:
    for seconds, elapsed, _ in rank_pools.run(2, timed_passes, "auto", 3, backend="gloo on cuda"):
        assert seconds.keys() == ALL
        assert all(taken > 0 for taken in seconds.values())
        assert sum(seconds.values()) < elapsed


def test_waiting_is_communication_and_nothing_else(rank_pools: RankPools) -> None:
    for seconds in rank_pools.run(2, passes_with_slow_collectives, "all_to_all"):
        # Forward: counts, pairs, rows, sums. Backward: gradients, sums, weights.
        assert seconds["communication"] >= 7 * SLEEP
        assert all(taken < SLEEP for name, taken in seconds.items() if name != "communication")


def test_blocks_cannot_be_nested() -> None:
    with (
        time_phases(rank_device()),
        pytest.raises(RuntimeError, match="cannot be nested"),
        time_phases(rank_device()),
    ):
        pass
    with time_phases(rank_device()) as seconds, phase("experts"):
        time.sleep(SLEEP)
    assert seconds["experts"] >= SLEEP
