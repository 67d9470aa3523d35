"""Layers called, or differentiated, in another order on one rank: the same error on every rank."""

import copy
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, make_case
from ranks import KERNELS, Failure, RankPools
from sharded import shard_experts
from test_capacity import SYMMETRIC, has_plan, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashExperts
from flash_moe_dist.dispatch import pass_order
from flash_moe_dist.dispatch.pass_order import GroupPasses, check_backward_passes

NUM_EXPERTS, HIDDEN_SIZE, SLOTS, TOKENS = 9, 12, 5, 2
WAYS = [
    pytest.param("gloo", "all_to_all", id="all_to_all"),
    pytest.param("gloo", "all_gather", id="all_gather"),
    pytest.param(KERNELS, "all_gather", id="static capacity"),
    pytest.param(SYMMETRIC, "all_gather", id="symmetric memory"),
]


def layers(number: int, dispatcher: str) -> list[FlashExperts]:
    """Layers of the same shapes and other values."""
    cases = [make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1, seed=layer) for layer in range(number)]
    return [shard_experts(case, dispatcher) for case in cases]


def own_case() -> Case:
    return make_case(TOKENS, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())


def forward(experts: FlashExperts, case: Case) -> Tensor:
    out: Tensor = experts(case.hidden_states, case.indices, case.routing_weights)
    return out


def number_of(experts: FlashExperts) -> int:
    func: Any = experts.expert_func
    return int(func.layer.split()[-1])


def called_otherwise(
    dispatcher: str, good_passes: int, order: str, change: str
) -> tuple[int, str, bool]:
    """Layers a, b, c in that order on rank 0, in another on rank 1; then in the same order."""
    case = own_case()
    by_name = dict(zip("abc", layers(3, dispatcher), strict=True))
    for _ in range(good_passes):
        for name in order:
            forward(by_name[name], case).sum().backward()
    first, planned = number_of(by_name["a"]), has_plan(by_name["a"])
    called = change if dist.get_rank() == 1 else order
    error = error_of(lambda: [forward(by_name[name], case) for name in called])
    for name in reversed(order):
        forward(by_name[name], case).sum().backward()
    return first, error, planned


@pytest.mark.parametrize(
    ("order", "change", "differing"),
    [("ab", "ba", "ab"), ("abc", "ac", "bc")],
)
@pytest.mark.parametrize(
    ("good_passes", "backend", "dispatcher"),
    # Static capacity begins with the second pass.
    [
        pytest.param(good_passes, *way.values, id=f"{good_passes}-{way.id}")
        for way in WAYS
        for good_passes in (0, 2)
        if good_passes > 0 or way.values[0] == "gloo"
    ],
)
def test_layers_called_in_another_order_on_one_rank(
    good_passes: int,
    order: str,
    change: str,
    differing: str,
    backend: str,
    dispatcher: str,
    rank_pools: RankPools,
) -> None:
    outcomes = run(rank_pools, 2, backend, called_otherwise, dispatcher, good_passes, order, change)
    for outcome in outcomes:
        assert not isinstance(outcome, Failure), outcome.trace
    first, message, planned = outcomes[0]
    assert outcomes[1] == (first, message, planned)
    assert planned == (backend != "gloo")
    mine, theirs = (first + "abc".index(name) for name in differing)
    assert message == (
        f"ranks must agree on the layer that is called (rank 0: call {good_passes} of layer "
        f"{mine}, rank 1: call {good_passes} of layer {theirs})"
    )


def differentiated_otherwise(dispatcher: str, change: str) -> list[str]:
    """Errors of the next forward pass, of the one after it, and of the check at the end."""
    case = own_case()
    first, second = layers(2, dispatcher)
    for _ in range(2):
        outs = [forward(first, case), forward(second, case)]
        outs[0].sum().backward()
        outs[1].sum().backward()
    outs = [forward(first, case), forward(second, case)]
    order = [0, 1]
    if dist.get_rank() == 1:
        order = {"another order": [1, 0], "one twice": [0, 0]}[change]
    for layer in order:
        outs[layer].sum().backward(retain_graph=True)
    group = dist.group.WORLD
    assert group is not None
    return [
        error_of(lambda: forward(first, case)),
        error_of(lambda: forward(first, case)),
        error_of(lambda: check_backward_passes(group)),
    ]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("backend", "dispatcher"), WAYS[1:])
@pytest.mark.parametrize("change", ["another order", "one twice"])
def test_backward_passes_in_another_order_on_one_rank(
    change: str, backend: str, dispatcher: str, rank_pools: RankPools
) -> None:
    errors = run(rank_pools, 2, backend, differentiated_otherwise, dispatcher, change)
    assert errors[0] == errors[1]
    told, *later = errors[0]
    assert told.startswith(
        "ranks must agree on the backward passes since the last forward pass (rank 0: ['call 2 of "
    )
    assert later == ["", ""]


def backward_without_a_forward_after_it() -> str:
    case = own_case()
    outs = [forward(experts, case) for experts in layers(2, "all_gather")]
    for out in reversed(outs) if dist.get_rank() == 1 else outs:
        out.sum().backward()
    group = dist.group.WORLD
    assert group is not None
    try:
        return error_of(lambda: check_backward_passes(group))
    finally:
        assert GroupPasses.of(group).take_backward() == ()


def test_the_last_backward_passes_are_checked_at_the_end(rank_pools: RankPools) -> None:
    first, second = rank_pools.run(2, backward_without_a_forward_after_it)
    assert first == second
    assert first.startswith("ranks must agree on the backward passes since the last forward pass")


def skipped(change: str) -> str:
    """Layers a, b and their backward passes on rank 0; on the others, what `change` says."""
    case = own_case()
    # Of its own, as its collectives never end.
    group = dist.new_group()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    a, b = (shard_experts(tables, "all_gather", mesh) for _ in range(2))

    def step(change: str) -> None:
        out = forward(a, case).sum()
        if change != "the last layer":
            out = out + forward(b, case).sum()
        if change != "the backward passes":
            out.backward()

    def run() -> None:
        step("nothing")
        if change != "a step" or dist.get_rank() == 0:
            step(change if dist.get_rank() > 0 else "nothing")
        check_backward_passes(group)

    error = error_of(run)
    for name, experts in (("a", a), ("b", b)):
        error = error.replace(f"layer {number_of(experts)}", name)
    return error


PASSES_OF_RANKS = {
    "the last layer": ("call 1 of b", "backward pass of call 1 of a"),
    "the backward passes": ("backward pass of call 1 of b", "the end"),
    "a step": ("call 1 of a", "the end"),
}


@pytest.mark.slow
def test_ranks_that_would_wait_in_different_passes_say_so() -> None:
    pools = RankPools()
    try:
        for change, (first, others) in PASSES_OF_RANKS.items():
            message = (
                "ranks must agree on the pass that they make "
                f"(rank 0: {first}, rank 1: {others}, rank 2: {others})"
            )
            assert pools.run(3, skipped, change) == [message] * 3
    finally:
        pools.close()


def waits_for_a_late_rank() -> None:
    """A rank that comes late, but to the same pass, is waited for."""
    case = own_case()
    (experts,) = layers(1, "all_gather")
    seconds = pass_order.SECONDS_BEFORE_COMPARISON + 1 if dist.get_rank() == 1 else 0.0
    time.sleep(seconds)
    out = forward(experts, case).sum()
    time.sleep(seconds)
    out.backward()
    time.sleep(seconds)
    group = dist.group.WORLD
    assert group is not None
    check_backward_passes(group)


@pytest.mark.slow
def test_a_late_rank_is_waited_for(rank_pools: RankPools) -> None:
    rank_pools.run(2, waits_for_a_late_rank)


def alike_on_all_ranks(dispatcher: str) -> None:
    """Orders that change from step to step, recomputation, evaluation, copies: no error."""
    case = own_case()
    by_name = dict(zip("abc", layers(3, dispatcher), strict=True))
    for order in ("abc", "cab", "b", "aab", "c"):
        outs = [forward(by_name[name], case) for name in order]
        for out in reversed(outs) if order == "cab" else outs:
            out.sum().backward()
    for name in "ab":
        args = (by_name[name], case)
        checkpoint(forward, *args, use_reentrant=False).sum().backward()
    with torch.no_grad():
        forward(by_name["c"], case)
    teacher = copy.deepcopy(by_name["a"])
    assert torch.equal(forward(teacher, case), forward(by_name["a"], case))


@pytest.mark.parametrize(("backend", "dispatcher"), WAYS)
def test_any_order_that_all_ranks_share(
    backend: str, dispatcher: str, rank_pools: RankPools
) -> None:
    for outcome in run(rank_pools, 2, backend, alike_on_all_ranks, dispatcher):
        assert outcome is None, outcome.trace


def copies_called_otherwise(by: str) -> str:
    case = own_case()
    (experts,) = layers(1, "all_gather")
    if by == "deepcopy":
        pair = [experts, copy.deepcopy(experts)]
    else:
        saved = io.BytesIO()
        torch.save(experts, saved)
        pair = []
        for _ in range(2):
            saved.seek(0)
            pair.append(torch.load(saved, weights_only=False))
    order = reversed(pair) if dist.get_rank() == 1 else pair
    return error_of(lambda: [forward(one, case) for one in order])


@pytest.mark.parametrize("by", ["deepcopy", "torch.save"])
def test_a_layer_and_its_copy_are_not_the_same(by: str, rank_pools: RankPools) -> None:
    first, second = rank_pools.run(2, copies_called_otherwise, by)
    assert first == second
    assert "ranks must agree on the layer that is called (rank 0: call 0 of " in first
    assert "of copy " in first
