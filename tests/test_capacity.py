"""Forward passes with static capacity give the same bits as passes with exact counts."""

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import RESULTS, TOLERANCES, Case, assert_close, make_case
from ranks import KERNELS, Failure, RankPools, rank_device
from sharded import shard_experts
from shared_files import use_shared_files
from test_agreement import BAD_ROWS, KINDS, MESSAGES, SPOILED, bad_rows_of_a_layer
from test_agreement import SLOTS as BAD_INPUT_SLOTS
from test_expert_parallel import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    SCENARIOS,
    cases_of_all_ranks,
    expected_results,
    needs_gpus,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashExperts
from flash_moe_dist.dispatch.capacity import DispatchStats, LayerDispatch, wait_for_event
from flash_moe_dist.dispatch.collectives import Pending

SYMMETRIC = f"{KERNELS}, symmetric memory"
BACKENDS = [
    pytest.param(KERNELS, id="interpreted"),
    pytest.param(SYMMETRIC, id="interpreted, symmetric memory"),
    pytest.param("nccl", marks=pytest.mark.gpu),
    pytest.param("gloo on cuda", marks=pytest.mark.gpu),
]


def run(
    pools: RankPools, world_size: int, backend: str, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """`RankPools.outcomes` of the function; "nccl" reads other ranks' memory where it can."""
    if not backend.startswith(KERNELS):
        needs_gpus(backend)
        return pools.outcomes(world_size, function, *args, backend=backend)
    symmetric = backend == SYMMETRIC
    arguments = (symmetric, function, *args)
    return pools.outcomes(world_size, with_symmetric_memory, *arguments, backend=KERNELS)


def with_symmetric_memory(symmetric: bool, function: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if symmetric:
            use_shared_files(patch)
        return function(*args)


def sound(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        assert not isinstance(outcome, Failure), outcome.trace
    return outcomes


def results(experts: FlashExperts, case: Case) -> list[Tensor]:
    """Output and gradients; of tables this rank's rows."""
    hidden_states, routing_weights = (
        one.detach().to(rank_device()).requires_grad_()
        for one in (case.hidden_states, case.routing_weights)
    )
    out = experts(hidden_states, case.indices.to(rank_device()), routing_weights)
    leaves = [hidden_states, *experts.parameters(), routing_weights]
    grads: Any = torch.autograd.grad(out, leaves, case.grad.to(rank_device()))
    return [out.detach(), *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]


def layer_of(experts: FlashExperts) -> LayerDispatch:
    func: Any = experts.expert_func
    layer: LayerDispatch = func._layer
    return layer


def has_plan(experts: FlashExperts) -> bool:
    return layer_of(experts).plan is not None


def stats_of(experts: FlashExperts) -> DispatchStats:
    func: Any = experts.expert_func
    stats: DispatchStats = func.stats
    return stats


def attempts(before: DispatchStats, after: DispatchStats) -> tuple[int, int]:
    """Dispatches of this rank's tokens with static capacity and with exact counts in between."""

    def count(stats: DispatchStats) -> int:
        return stats.capacity + stats.retried

    return count(after) - count(before), after.exact - before.exact


def later_passes(cases: list[Case], num_passes: int) -> None:
    """Compare the later passes of a layer with the first, and the last with the oracle."""
    rank, dtype = dist.get_rank(), cases[0].grad.dtype
    experts = shard_experts(cases[rank], "all_gather")
    passes = [results(experts, cases[rank]) for _ in range(num_passes)]
    has_pairs = any(case.indices.numel() for case in cases)
    assert stats_of(experts).capacity == (num_passes - 1 if has_pairs else 0)
    for later in passes[1:]:
        for name, first, other in zip(RESULTS, passes[0], later, strict=True):
            assert torch.equal(first, other), name
    expected = expected_results(cases, rank)
    for place in (0, 1, 4):
        tolerance = 2 * TOLERANCES[dtype]
        assert_close(passes[-1][place].cpu(), expected[place], tolerance, RESULTS[place])


def of_scenario(scenario: str, dtype: torch.dtype) -> None:
    world_size = dist.get_world_size()
    cases = cases_of_all_ranks(scenario, NUM_EXPERTS, HIDDEN_SIZE, dtype, world_size)
    later_passes(cases, 3 if dtype == torch.float64 else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("scenario", "dtype"),
    [("uniform", torch.float64), *((scenario, torch.bfloat16) for scenario in SCENARIOS)],
    ids=str,
)
def test_static_capacity_gives_the_bits_of_exact_counts(
    scenario: str, dtype: torch.dtype, backend: str, rank_pools: RankPools
) -> None:
    sound(run(rank_pools, 2, backend, of_scenario, scenario, dtype))


def empty_slots() -> None:
    """Pairs enough for a plan of four ranks."""
    cases = []
    for rank in range(dist.get_world_size()):
        case = make_case(4, HIDDEN_SIZE, NUM_EXPERTS, 24, seed=rank)
        empty = torch.rand(4, 24, generator=torch.Generator().manual_seed(rank)) < 0.4
        case.indices = torch.where(empty, -1, case.indices)
        case.indices[0] = -1
        cases.append(case)
    for case in cases:
        case.down_weights, case.up_weights = cases[0].down_weights, cases[0].up_weights
    later_passes(cases, 2)


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
@pytest.mark.parametrize("world_size", [3, 4])
def test_any_number_of_ranks(world_size: int, backend: str, rank_pools: RankPools) -> None:
    sound(run(rank_pools, world_size, backend, empty_slots))


CHANGES = ("more pairs", "more tokens", "fewer tokens", "no tokens", "other slots on all ranks")


def changing(change: str) -> tuple[list[tuple[int, int]], bool]:
    """Passes before, with and after a change of input, each against the first pass of a new layer.

    Returns the `attempts` of each, and whether there is a plan in the end.
    """
    rank = dist.get_rank()
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    usual = make_case(4, HIDDEN_SIZE, NUM_EXPERTS, 20, seed=rank)
    changed = make_case(4, HIDDEN_SIZE, NUM_EXPERTS, 20, seed=10 + rank)
    if change == "other slots on all ranks":
        changed = make_case(4, HIDDEN_SIZE, NUM_EXPERTS, 10, seed=rank)
    elif change == "more pairs":
        changed.indices.fill_(3)
    elif rank == 0:
        tokens = {"more tokens": 5, "fewer tokens": 3, "no tokens": 0}[change]
        changed = make_case(tokens, HIDDEN_SIZE, NUM_EXPERTS, 20, seed=rank)
    experts = shard_experts(tables, "all_gather")
    exact_changed = results(shard_experts(tables, "all_gather"), changed)
    made, first = [], None
    for case in (usual, usual, changed, usual, usual):
        before = copy(stats_of(experts))
        found = results(experts, case)
        made.append(attempts(before, stats_of(experts)))
        # The first pass of a layer has exact counts.
        first = first or found
        assert all(map(torch.equal, found, exact_changed if case is changed else first))
    return made, has_plan(experts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_does_not_fit_runs_again_with_exact_counts(
    change: str, backend: str, rank_pools: RankPools
) -> None:
    outcomes = sound(run(rank_pools, 2, backend, changing, change))
    for rank, (made, has_plan_now) in enumerate(outcomes):
        again = [(1, 1), (0, 1), (1, 0)]
        if change in ("fewer tokens", "no tokens"):
            # As long as some rank has as many.
            again = [(1, 0)] * 3
        elif change == "other slots on all ranks" or (change == "more tokens" and rank == 0):
            # Whose own do not fit, does not compute them.
            again = [(0, 1), (0, 1), (1, 0)]
        assert made == [(0, 1), (1, 0), *again]
        assert has_plan_now


def alternating() -> tuple[DispatchStats, DispatchStats]:
    """Passes of two sizes in turn; then passes of one size, which is not the same on all ranks."""
    rank = dist.get_rank()
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    small, large = (make_case(tokens, HIDDEN_SIZE, NUM_EXPERTS, 6, seed=rank) for tokens in (1, 2))
    with torch.no_grad():
        for case in [small, large] * 16:
            experts(case.hidden_states, case.indices, case.routing_weights)
    alternated = stats_of(experts)
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    uneven = make_case(3 - 2 * rank, HIDDEN_SIZE, NUM_EXPERTS, 6, seed=rank)
    with torch.no_grad():
        for _ in range(5):
            experts(uneven.hidden_states, uneven.indices, uneven.routing_weights)
    return alternated, stats_of(experts)


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
def test_a_plan_that_is_seldom_confirmed_is_seldom_made(
    backend: str, rank_pools: RankPools
) -> None:
    for alternated, uneven in sound(run(rank_pools, 2, backend, alternating)):
        # A plan is made after 1, 2, 4, 8 ... exact passes.
        assert 4 <= alternated.retried + alternated.stood_in + alternated.capacity <= 5
        assert alternated.exact + alternated.capacity == 32
        assert (uneven.exact, uneven.capacity) == (1, 4)
        transport = "symmetric_memory" if backend == SYMMETRIC else "gloo"
        assert uneven.transports[transport] == (4 if backend == SYMMETRIC else 5)


def bad_inputs() -> list[tuple[str, str]]:
    """Kinds and messages of errors where rank 1 spoils a pass with static capacity, time and again.

    Every rank goes on to work.
    """
    rank = dist.get_rank()
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, BAD_INPUT_SLOTS, seed=rank)
    arguments = [case.hidden_states, case.indices, case.routing_weights]
    expected, errors = results(experts, case), []
    for spoil in SPOILED.values():
        assert has_plan(experts)
        try:
            experts(*(spoil(*arguments) if rank == 1 else arguments))
        except (TypeError, ValueError) as error:
            errors.append((type(error).__name__, str(error)))
        out = experts(*arguments)
    assert torch.equal(out, expected[0])
    assert all(map(torch.equal, results(experts, case), expected))
    return errors


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
def test_bad_input_of_one_rank_with_static_capacity(backend: str, rank_pools: RankPools) -> None:
    first, *others = sound(run(rank_pools, 3, backend, bad_inputs))
    assert others == [first, first]
    for spoil, (kind, message) in zip(SPOILED, first, strict=True):
        assert kind == KINDS.get(spoil, "ValueError"), spoil
        assert MESSAGES[spoil] in message


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
@pytest.mark.parametrize("spoil", BAD_ROWS)
def test_bad_rows_of_a_whole_layer_with_static_capacity(
    spoil: str, backend: str, rank_pools: RankPools
) -> None:
    _, kind, message = BAD_ROWS[spoil]
    outcomes = run(rank_pools, 3, backend, bad_rows_of_a_layer, spoil, 2)
    for outcome in outcomes:
        assert outcome.kind == kind, outcome.trace
        assert message in outcome.message
    assert len({outcome.message for outcome in outcomes}) == 1


def recomputed(use_reentrant: bool) -> tuple[int, int]:
    """Recompute with static capacity a first pass that had exact counts."""
    case = make_case(3, HIDDEN_SIZE, NUM_EXPERTS, 6, seed=dist.get_rank())
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    expected = results(shard_experts(tables, "all_gather"), case)
    experts = shard_experts(tables, "all_gather")
    hidden_states = case.hidden_states.detach().requires_grad_()
    args = (hidden_states, case.indices, case.routing_weights)
    out: Any = checkpoint(experts, *args, use_reentrant=use_reentrant)
    out.backward(case.grad)
    assert torch.equal(out, expected[0])
    assert hidden_states.grad is not None
    assert torch.equal(hidden_states.grad, expected[1])
    for table, grad in zip(experts.parameters(), expected[2:4], strict=True):
        tensor: Any = table.grad
        assert torch.equal(tensor.to_local(), grad)
    return attempts(DispatchStats(), stats_of(experts))


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_with_static_capacity(
    use_reentrant: bool, backend: str, rank_pools: RankPools
) -> None:
    for made in sound(run(rank_pools, 2, backend, recomputed, use_reentrant)):
        assert made == (1, 1)


class Waited(Pending):
    """Collective that has ended before anything else is launched."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wait()
        if self.received.is_cuda:
            torch.cuda.synchronize()


def one_after_the_other(dispatcher: str, shape: tuple[int, int, int, int]) -> None:
    """Compare passes that wait for each collective with passes that overlap."""
    _, hidden_size, num_experts, _ = shape
    case = make_case(*shape, torch.bfloat16, seed=dist.get_rank())
    tables = make_case(1, hidden_size, num_experts, 1, torch.bfloat16)
    experts = shard_experts(tables, dispatcher)
    beside = [results(experts, case) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_moe_dist.dispatch.collectives.Pending", Waited)
        waited = results(shard_experts(tables, dispatcher), case)
    for found in beside:
        assert all(map(torch.equal, found, waited))


@pytest.mark.parametrize(
    ("dispatcher", "backend"),
    [
        ("all_gather", SYMMETRIC),
        *((dispatcher, KERNELS) for dispatcher in ("all_to_all", "all_gather")),
        *(
            pytest.param(dispatcher, backend, marks=pytest.mark.gpu)
            for dispatcher in ("all_to_all", "all_gather")
            for backend in ("nccl", "gloo on cuda")
        ),
    ],
)
def test_what_travels_beside_other_work_changes_nothing(
    dispatcher: str, backend: str, rank_pools: RankPools
) -> None:
    shape = (4, 64, 40, 16) if backend.startswith(KERNELS) else (3000, 64, 300, 40)
    sound(run(rank_pools, 2, backend, one_after_the_other, dispatcher, shape))


def with_other_tables(change: str, on: tuple[int, ...]) -> None:
    """Passes of a layer whose tables become others, on these ranks."""
    rank = dist.get_rank()
    case = make_case(3, HIDDEN_SIZE, NUM_EXPERTS, 6, seed=rank)
    other = make_case(3, 2 * HIDDEN_SIZE, NUM_EXPERTS, 6, seed=rank)
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    for _ in range(2):
        results(experts, case)
    assert has_plan(experts)
    wider = shard_experts(make_case(1, 2 * HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    if rank in on and change == "dtype":
        experts.double()
    elif rank in on:
        for name, table in wider.named_parameters():
            experts.register_parameter(name, torch.nn.Parameter(table.detach()))
    case = other if rank in on and change == "hidden size" else case
    expected = results(experts, case)
    layer_of(experts).plan = None
    for found, exact in zip(results(experts, case), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
@pytest.mark.parametrize("change", ["dtype", "hidden size"])
def test_other_tables(change: str, backend: str, rank_pools: RankPools) -> None:
    sound(run(rank_pools, 2, backend, with_other_tables, change, (0, 1)))


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
@pytest.mark.parametrize("change", ["dtype", "hidden size"])
def test_other_tables_on_one_rank(change: str, backend: str, rank_pools: RankPools) -> None:
    for outcome in run(rank_pools, 2, backend, with_other_tables, change, (1,)):
        assert outcome.kind == "ValueError", outcome.trace
        assert "ranks must agree on" in outcome.message


def with_another_backend() -> None:
    case = make_case(3, HIDDEN_SIZE, NUM_EXPERTS, 6, seed=dist.get_rank())
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "all_gather")
    for _ in range(2):
        expected = results(experts, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_MOE_BACKEND", "reference")
        found = results(experts, case)
    assert not has_plan(experts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", [KERNELS, SYMMETRIC])
def test_another_backend(backend: str, rank_pools: RankPools) -> None:
    sound(run(rank_pools, 2, backend, with_another_backend))


class Event:
    """CUDA event that is reached, or fails, at the query with the number `asked`."""

    def __init__(self, asked: int, fails: bool = False) -> None:
        self.asked, self.fails, self.waited = asked, fails, False

    def query(self) -> bool:
        self.asked -= 1
        if self.asked <= 0 and self.fails:
            raise RuntimeError("launch failure")
        return self.asked <= 0

    def synchronize(self) -> None:
        self.waited = True


def test_a_wait_for_counts_ends() -> None:
    event: Any = Event(3)
    wait_for_event(event, 60.0)
    assert event.waited
    never: Any = Event(2**62)
    with pytest.raises(RuntimeError, match=r"within the group's timeout: .* in 0\.05 s"):
        wait_for_event(never, 0.05)
    failing: Any = Event(2, fails=True)
    with pytest.raises(RuntimeError, match="the device failed while") as failed:
        wait_for_event(failing, 60.0)
    assert str(failed.value.__cause__) == "launch failure"
