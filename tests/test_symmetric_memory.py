"""Memory that ranks have in common: shared by layers, growing, refused; on CPUs as files."""

import pickle
import random
import time
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, make_case
from ranks import KERNELS, RankPools, rank_device
from sharded import shard_experts
from shared_files import SharedFiles, use_shared_files
from test_capacity import has_plan, layer_of, results, stats_of
from test_expert_parallel import needs_gpus
from torch import Tensor

from flash_moe import FlashExperts
from flash_moe_dist.dispatch import symmetric_memory
from flash_moe_dist.dispatch.capacity import LayerDispatch
from flash_moe_dist.dispatch.symmetric import MESSAGES, ROWS, SUMS
from flash_moe_dist.dispatch.symmetric_memory import (
    ALIGNMENT,
    SymmetricBuffers,
    symmetric_memory_bytes,
)

NUM_EXPERTS, SLOTS = 23, 6
BACKENDS = [KERNELS, pytest.param("nccl", marks=pytest.mark.gpu)]


def layer(hidden_size: int, seed: int = 0, **options: Any) -> FlashExperts:
    tables = make_case(1, hidden_size, NUM_EXPERTS, 1, seed=seed)
    return shard_experts(tables, "all_gather", **options)


def use_memory(patch: pytest.MonkeyPatch) -> None:
    """Use shared files in place of the memory of GPUs on a machine without GPUs."""
    if rank_device().type == "cpu":
        use_shared_files(patch)


def buffers_of(experts: FlashExperts) -> Any:
    plan = layer_of(experts).plan
    assert plan is not None
    return getattr(plan.dispatcher, "buffers", None)


# Layer and input of each pass: first passes have exact counts, and so have the one whose pairs do
# not fit, the one after it, and the one of fewer tokens.
PASSES = (
    *((0, ""), (1, ""), (2, ""), (0, ""), (1, ""), (0, "no_grad"), (2, "inference_mode"), (0, "")),
    *((1, "one expert"), (2, ""), (1, ""), (1, ""), (2, "fewer tokens"), (0, "")),
)
NUM_EXACT = 6


def passes_of_three_layers() -> tuple[int, Counter[str]]:
    """Layers that share memory, with backward passes in any order, against exact counts.

    Returns the number of passes with static capacity, and passes by transport.
    """
    rank, draw = dist.get_rank(), random.Random(0)
    sizes = (12, 20, 12)
    with pytest.MonkeyPatch.context() as patch:
        use_memory(patch)
        layers = [layer(size, seed) for seed, size in enumerate(sizes)]
        exact = [layer(size, seed, capacity=None) for seed, size in enumerate(sizes)]
        pending: list[tuple[int, Case, Tensor, Any]] = []

        def differentiate_any() -> None:
            place, case, out, leaves = pending.pop(draw.randrange(len(pending)))
            grads: Any = torch.autograd.grad(out, leaves, case.grad)
            local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
            for found, expected in zip([out, *local], results(exact[place], case), strict=True):
                assert torch.equal(found, expected)

        for number, (place, change) in enumerate(PASSES):
            tokens = 2 if change == "fewer tokens" else 3
            # Pairs enough for a plan of three ranks.
            shape = (tokens, sizes[place], NUM_EXPERTS, 40)
            case = make_case(*shape, device=rank_device(), seed=100 * number + rank)
            if change == "one expert":
                case.indices.fill_(3)
            arguments = (case.hidden_states, case.indices, case.routing_weights)
            if change in ("no_grad", "inference_mode"):
                with getattr(torch, change)():
                    layers[place](*arguments)
                continue
            leaves = [case.hidden_states, *layers[place].parameters(), case.routing_weights]
            pending.append((place, case, layers[place](*arguments), leaves))
            while len(pending) > 2:
                differentiate_any()
        while pending:
            differentiate_any()
        assert len({id(buffers_of(one)) for one in layers if has_plan(one)}) == 1
        counted = [stats_of(one) for one in layers]
        transports: Counter[str] = sum((stats.transports for stats in counted), Counter())
        return sum(stats.capacity for stats in counted), transports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "backend"),
    [(3, KERNELS), pytest.param(2, "nccl", marks=pytest.mark.gpu)],
)
def test_layers_share_memory(ranks: int, backend: str, rank_pools: RankPools) -> None:
    if backend == "nccl":
        needs_gpus(backend)
    for capacity, transports in rank_pools.run(ranks, passes_of_three_layers, backend=backend):
        assert capacity == len(PASSES) - NUM_EXACT
        if backend == KERNELS:
            assert transports == {"gloo": NUM_EXACT, "symmetric_memory": capacity}


def tables_only_of_two_sizes() -> None:
    """Gradients of tables alone, whose backward passes meet others once, while one rank is late."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        use_shared_files(patch)
        small, large = layer(12, 1), layer(12, 2)
        few = make_case(8, 12, NUM_EXPERTS, SLOTS, seed=rank)
        many = make_case(12, 12, NUM_EXPERTS, SLOTS, seed=10 + rank)

        def forward(experts: FlashExperts, case: Case) -> torch.Tensor:
            rows = (case.hidden_states.detach(), case.indices, case.routing_weights.detach())
            out: torch.Tensor = experts(*rows)
            return out

        with torch.no_grad():
            for experts, case in ((small, few), (large, many)) * 2:
                forward(experts, case)
        expected = None
        barrier = SymmetricBuffers.barrier
        for late_by in (0.0, 0.5):

            def late(memory: SymmetricBuffers, region: int, seconds: float = late_by) -> None:
                barrier(memory, region)
                time.sleep(seconds * rank)

            for turns in range(2):
                with torch.no_grad():
                    for _ in range(turns):
                        forward(small, few)
                passes = ((large, many), (small, few))
                outs = [forward(*one) for one in passes]
                patch.setattr(SymmetricBuffers, "barrier", late)
                found: list[torch.Tensor] = []
                for out, (experts, case) in zip(outs, passes, strict=True):
                    grads: Any = torch.autograd.grad(out, list(experts.parameters()), case.grad)
                    found += [grad.to_local() for grad in grads]
                patch.setattr(SymmetricBuffers, "barrier", barrier)
                expected = expected or found
                assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_rows_are_not_written_over_while_others_read(rank_pools: RankPools) -> None:
    rank_pools.run(2, tables_only_of_two_sizes, backend=KERNELS)


def sums_of_a_late_rank() -> list[tuple[str, int]]:
    """Rank 1 offers its rows in time, and then is late with sums for others."""
    rank, barrier = dist.get_rank(), SymmetricBuffers.barrier
    wait = SymmetricBuffers.wait_until_sums_are_consumed
    case = make_case(5, 12, NUM_EXPERTS, SLOTS, seed=rank)
    calls: list[tuple[str, int]] = []

    def late(memory: SymmetricBuffers, region: int) -> None:
        calls.append(("barrier", region))
        barrier(memory, region)
        time.sleep(0.5 * rank * (region == ROWS))

    def waits(memory: SymmetricBuffers) -> None:
        calls.append(("wait", SUMS))
        wait(memory)

    with pytest.MonkeyPatch.context() as patch:
        use_shared_files(patch)
        expected, experts = results(layer(12), case), layer(12)
        results(experts, case)
        patch.setattr(SymmetricBuffers, "barrier", late)
        patch.setattr(SymmetricBuffers, "wait_until_sums_are_consumed", waits)
        for found, exact in zip(results(experts, case), expected, strict=True):
            assert torch.equal(found, exact)
    return calls


def test_sums_are_added_when_all_have_come(rank_pools: RankPools) -> None:
    waited = ("wait", SUMS)
    forward = [waited, ("barrier", MESSAGES), waited, ("barrier", ROWS), ("barrier", SUMS)]
    for calls in rank_pools.run(2, sums_of_a_late_rank, backend=KERNELS):
        assert calls == [*forward, waited, ("barrier", ROWS), ("barrier", SUMS)]


def inference_first() -> None:
    device = rank_device()
    case = make_case(5, 12, NUM_EXPERTS, SLOTS, device=device, seed=dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        use_memory(patch)
        experts = layer(12)
        with torch.inference_mode():
            for _ in range(3):
                experts(case.hidden_states, case.indices, case.routing_weights)
        assert has_plan(experts)
        for found, exact in zip(results(experts, case), results(layer(12), case), strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_inference(backend: str, rank_pools: RankPools) -> None:
    if backend == "nccl":
        needs_gpus(backend)
    rank_pools.run(2, inference_first, backend=backend)


def growing() -> tuple[list[int], list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        use_shared_files(patch)
        assert dist.group.WORLD is not None
        memory = SymmetricBuffers(dist.group.WORLD, torch.device("cpu"))
        held, halves = [], []
        for sizes in ((1, 300), (600, 300), (2048, 1), (1, 700)):
            assert memory.ensure_size(sizes)
            held.append(memory.num_bytes)
            halves.append(memory.next_buffer_offset(0))
        return held, halves


def test_only_what_is_too_small_grows(rank_pools: RankPools) -> None:
    unit = 2 * ALIGNMENT
    assert unit == 512
    for held, halves in rank_pools.run(2, growing, backend=KERNELS):
        # By half at least: 512 and 512, then 1024 and 512, then 2048, then 1024; all are kept.
        assert held == [1024, 1024 + 1024, 2048 + 2048, 4096 + 1024]
        assert halves == [0, 1024 // 2, 0, 2048 // 2]


def refused(on: str) -> tuple[list[str], int, float]:
    """Passes where one rank has no memory for others to read, or cannot meet them."""
    case = make_case(5, 12, NUM_EXPERTS, SLOTS, seed=dist.get_rank())

    def fail(*_: Any) -> None:
        raise RuntimeError("none left\nat all")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        symmetric_memory._warn_of_fallback.cache_clear()
        use_shared_files(patch)
        if dist.get_rank() == 1:
            patch.setattr(SharedFiles, on, fail)
        elif on == "rendezvous":
            # What a rank waits for that one does not come to is PyTorch's to end.
            patch.setattr(SharedFiles, on, lambda *_: None)
        experts, begun = layer(12), time.monotonic()
        passes = [results(experts, case) for _ in range(3)]
        seconds = time.monotonic() - begun
        assert stats_of(experts).transports == {dist.get_backend(): 3}
        assert all(torch.equal(*pair) for pair in zip(passes[0], passes[2], strict=True))
        return [str(one.message) for one in caught], symmetric_memory_bytes(), seconds


@pytest.mark.parametrize("on", ["__init__", "rendezvous"])
def test_one_rank_without_memory(on: str, rank_pools: RankPools) -> None:
    for messages, held, seconds in rank_pools.run(2, refused, on, backend=KERNELS):
        (message,) = [one for one in messages if "cannot read each other's memory" in one]
        assert message.endswith("rank 1: none left")
        assert held == 0
        assert seconds < 30


def views_kept() -> int:
    with pytest.MonkeyPatch.context() as patch:
        use_shared_files(patch)
        patch.setattr(symmetric_memory, "MAX_CACHED_VIEWS", 10)
        experts = layer(12)
        with torch.no_grad():
            for tokens in range(1, 12):
                case = make_case(tokens, 12, NUM_EXPERTS, SLOTS)
                for _ in range(2):
                    dispatch: LayerDispatch = layer_of(experts)
                    dispatch._backoff = 0
                    experts(case.hidden_states, case.indices, case.routing_weights)
        return len(buffers_of(experts)._views)


@pytest.mark.slow
def test_views_do_not_become_ever_more(rank_pools: RankPools) -> None:
    for kept in rank_pools.run(2, views_kept, backend=KERNELS):
        assert 0 < kept <= 10


def pickled() -> None:
    case = make_case(5, 12, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    experts = layer(12)
    expected = results(experts, case)
    again = pickle.loads(pickle.dumps(experts))
    for found, exact in zip(results(again, case), expected, strict=True):
        assert torch.equal(found, exact)


def test_a_layer_can_be_pickled(rank_pools: RankPools) -> None:
    rank_pools.run(2, pickled)
