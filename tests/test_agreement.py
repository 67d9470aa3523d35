"""Bad input on one rank: the same error on every rank, and none is left waiting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import make_case
from ranks import KERNELS, Failure, RankPools, rank_runtime
from sharded import shard_experts
from torch import Tensor
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashMoE
from flash_moe.ops import indices
from flash_moe_dist import ExpertParallel
from flash_moe_dist.agreement import same_error_on_all_ranks
from flash_moe_dist.expert_parallel import ExpertParallelFunc

# Pairs of 6 tokens enough for static capacity on three ranks.
NUM_EXPERTS, HIDDEN_SIZE, SLOTS = 23, 12, 14


def nested(tensor: Tensor) -> Tensor:
    """The parts of `tensor` along dim 0, as a nested tensor whose shape cannot be read."""
    return torch.nested.nested_tensor(list(tensor.detach()))


def bad_input(spoil: str, dispatcher: str) -> None:
    """Rank 1 spoils its input; every rank must hear of it, and go on to work."""
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    experts = shard_experts(tables, dispatcher)
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    arguments = [case.hidden_states, case.indices, case.routing_weights]
    if dist.get_rank() == 1:
        arguments = SPOILED[spoil](*arguments)
    try:
        experts(*arguments)
    finally:
        out = experts(case.hidden_states, case.indices, case.routing_weights)
        out.sum().backward()


SPOILED: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "index out of range": lambda x, i, w: [x, i.index_fill(0, torch.tensor([2]), 23), w],
    "index below -1": lambda x, i, w: [x, i.index_fill(0, torch.tensor([2]), -7), w],
    "hidden size": lambda x, i, w: [x[:, 1:], i, w],
    "number of routing weights": lambda x, i, w: [x, i, w[1:]],
    "dtype of indices": lambda x, i, w: [x, i.float(), w],
    "dtype of hidden states": lambda x, i, w: [x.double(), i, w],
    "requires_grad": lambda x, i, w: [x.detach(), i, w],
    "requires_grad of weights": lambda x, i, w: [x, i, w.detach()],
    "number of slots": lambda x, i, w: [x, i[:, 1:], w[:, 1:]],
    "device": lambda x, i, w: [x, i.to("meta"), w],
    "no tensor": lambda x, i, w: [x, None, w],  # type: ignore[list-item]
    "leading dimensions": lambda x, i, w: [x.view(2, 3, -1), i.view(3, 2, -1), w.view(2, 3, -1)],
    "nested": lambda x, i, w: [nested(x.view(2, 3, -1)), i.view(2, 3, -1), w.view(2, 3, -1)],
    "nested rows": lambda x, i, w: [nested(x), i, w],
    "nested indices": lambda x, i, w: [x, nested(i), w],
    "sparse": lambda x, i, w: [x.view(2, 3, -1).to_sparse(), i.view(2, 3, -1), w.view(2, 3, -1)],
}
MESSAGES = {
    "index out of range": r"rank 1: indices must lie in [-1, 23)",
    "index below -1": "ids from -7 to ",
    "hidden size": "rank 1: hidden_states must have rows of hidden_size = 12",
    "number of routing weights": "rank 1: routing_weights must have the shape of indices, (6, 14)",
    "dtype of indices": "rank 1: indices must have one of the dtypes int32, int64",
    "dtype of hidden states": "ranks must agree on dtype of hidden_states (rank 0: "
    "torch.float32, rank 1: torch.float64, rank 2: torch.float32)",
    "requires_grad": "on which of hidden states, down table, up table, routing weights need "
    "gradients (rank 0: [True, True, True, True], rank 1: [False, True, True, True], rank 2: ",
    "requires_grad of weights": "up table, routing weights need gradients (rank 0: ",
    "number of slots": "ranks must agree on num_experts_per_tok (rank 0: 14, rank 1: 13",
    "device": "rank 1: indices must be on cpu, where the tables are, got meta",
    "no tensor": "rank 1: indices must be a torch.Tensor, got NoneType",
    "leading dimensions": "rank 1: hidden_states must have shape (num_tokens, hidden_size)",
    "nested": "rank 1: hidden_states must be a dense tensor, got a nested tensor",
    "nested rows": "rank 1: hidden_states must be a dense tensor, got a nested tensor",
    "nested indices": "rank 1: indices must be a dense tensor, got a nested tensor",
    "sparse": "rank 1: hidden_states must be a dense tensor, got layout torch.sparse_coo",
}
KINDS = dict.fromkeys(
    ("dtype of indices", "no tensor", "nested", "nested rows", "nested indices", "sparse"),
    "TypeError",
)


@pytest.mark.parametrize("dispatcher", ["auto", "all_to_all", "all_gather"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_bad_input_on_one_rank_is_the_same_error_on_all(
    spoil: str, dispatcher: str, rank_pools: RankPools
) -> None:
    outcomes = rank_pools.outcomes(3, bad_input, spoil, dispatcher)
    for outcome in outcomes:
        assert isinstance(outcome, Failure)
        assert outcome.kind == KINDS.get(spoil, "ValueError")
        assert MESSAGES[spoil] in outcome.message
    assert len({outcome.message for outcome in outcomes}) == 1


BAD_ROWS: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "hidden size": (
        lambda x: x[:, 1:],
        "ValueError",
        "rank 1: hidden_states must have rows of hidden_size = 12",
    ),
    "dtype": (
        lambda x: x.double(),
        "TypeError",
        "rank 1: hidden_states must have the dtype of the layer's parameters, torch.float32",
    ),
    "no tensor": (lambda x: None, "TypeError", "rank 1: hidden_states must be a torch.Tensor"),
    "nested": (nested, "TypeError", "rank 1: hidden_states must be a dense tensor, got a nested"),
    "sparse": (
        lambda x: x.to_sparse(),
        "TypeError",
        "rank 1: hidden_states must be a dense tensor, got layout torch.sparse_coo",
    ),
}


def bad_rows_of_a_layer(spoil: str, good_passes: int = 0) -> None:
    """The router refuses rank 1's rows before it comes to the experts."""
    torch.manual_seed(0)
    layer = FlashMoE(HIDDEN_SIZE, 4, NUM_EXPERTS + 2, SLOTS)
    parallelize_module(layer, rank_runtime().ep_mesh, {"experts": ExpertParallel()})
    x_TH = torch.randn(9, HIDDEN_SIZE)
    for _ in range(good_passes):
        layer(x_TH)
    func: Any = layer.experts.expert_func
    assert func.stats.capacity == max(0, good_passes - 1)
    try:
        layer(BAD_ROWS[spoil][0](x_TH) if dist.get_rank() == 1 else x_TH)
    finally:
        layer(x_TH).sum().backward()


@pytest.mark.parametrize("spoil", BAD_ROWS)
def test_bad_rows_of_a_whole_layer(spoil: str, rank_pools: RankPools) -> None:
    _, kind, message = BAD_ROWS[spoil]
    outcomes = rank_pools.outcomes(3, bad_rows_of_a_layer, spoil)
    for outcome in outcomes:
        assert outcome.kind == kind
        assert message in outcome.message
    assert len({outcome.message for outcome in outcomes}) == 1


def shared_mlp_of_another_dtype() -> None:
    layer = FlashMoE(HIDDEN_SIZE, 4, NUM_EXPERTS + 2, SLOTS)
    parallelize_module(layer, rank_runtime().ep_mesh, {"experts": ExpertParallel()})
    x_TH = torch.randn(6, HIDDEN_SIZE)
    if dist.get_rank() == 1:
        layer.shared_mlp.double()
    try:
        layer(x_TH)
    finally:
        layer.shared_mlp.float()
        layer(x_TH).sum().backward()


def test_shared_mlp_of_another_dtype_on_one_rank(rank_pools: RankPools) -> None:
    message = "rank 1: hidden_states must have the dtype of the layer's parameters, torch.float64"
    for outcome in rank_pools.outcomes(2, shared_mlp_of_another_dtype):
        assert outcome.kind == "TypeError"
        assert message in outcome.message


def spoiled_tables_on_one_rank(which: str) -> None:
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    experts = shard_experts(case)
    if dist.get_rank() == 1:
        if which == "plain":
            experts.up_weights = torch.nn.Parameter(torch.zeros(NUM_EXPERTS, HIDDEN_SIZE))
        else:
            experts.to_empty(device="meta")
    experts(case.hidden_states, case.indices, case.routing_weights)


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        ("plain", "TypeError", "rank 1: tables must be DTensors sharded by ExpertParallel"),
        ("meta", "RuntimeError", "rank 1: tables are on the meta device: give them values by"),
    ],
)
def test_spoiled_tables_on_one_rank(
    which: str, kind: str, message: str, rank_pools: RankPools
) -> None:
    for outcome in rank_pools.outcomes(2, spoiled_tables_on_one_rank, which):
        assert outcome.kind == kind
        assert message in outcome.message


def shard_other_tables(which: str) -> None:
    """Rank 1 brings something else to be sharded."""
    other = dist.get_rank() == 1
    case = make_case(
        1,
        HIDDEN_SIZE + (other and which == "hidden size"),
        NUM_EXPERTS + (other and which == "number of experts"),
        1,
        torch.float64 if other and which == "dtype" else torch.float32,
    )
    shard_experts(case, "all_gather" if other and which == "dispatcher" else "all_to_all")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("number of experts", "must agree on tables (rank 0: {'down_weights': ((23, 12), "),
        ("hidden size", "{'down_weights': ((23, 13), torch.float32"),
        ("dtype", "{'down_weights': ((23, 12), torch.float64"),
        ("dispatcher", "on dispatcher (rank 0: all_to_all, rank 1: all_gather, rank 2: all_to"),
    ],
)
def test_ranks_that_bring_different_tables(which: str, message: str, rank_pools: RankPools) -> None:
    outcomes = rank_pools.outcomes(3, shard_other_tables, which)
    for outcome in outcomes:
        assert outcome.kind == "ValueError"
        assert message in outcome.message
    assert len({outcome.message for outcome in outcomes}) == 1


def modes_differ() -> None:
    """Rank 1 runs without gradients while the others run with them."""
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    experts = shard_experts(tables)
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    with torch.set_grad_enabled(dist.get_rank() != 1):
        experts(case.hidden_states, case.indices, case.routing_weights)


def test_grad_mode_must_be_the_same_on_all_ranks(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, modes_differ):
        assert "ranks must agree on which of hidden" in outcome.message


def frozen_on_one_rank(dispatcher: str) -> None:
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), dispatcher)
    experts.up_weights.requires_grad_(dist.get_rank() == 0)
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    experts(case.hidden_states, case.indices, case.routing_weights)


def test_tables_frozen_on_one_rank_only(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, frozen_on_one_rank, "auto"):
        assert "(rank 0: [True, True, True, True], rank 1: [True, True, False, True])" in (
            outcome.message
        )


def other_number_of_slots() -> None:
    """Run a hidden size at which "auto" is all_to_all for 1 slot and all_gather for 14."""
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), "auto")
    slots = 1 if dist.get_rank() == 1 else SLOTS
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, slots)
    experts(case.hidden_states, case.indices, case.routing_weights)


def test_what_auto_means_is_no_difference_of_its_own(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, other_number_of_slots):
        assert outcome.message == (
            "ranks must agree on num_experts_per_tok (rank 0: 14, rank 1: 1)"
        )


def other_dispatchers() -> None:
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    experts = shard_experts(case)
    func = experts.expert_func
    assert isinstance(func, ExpertParallelFunc)
    if dist.get_rank() == 1:
        func.dispatcher = "all_gather"
    experts(case.hidden_states, case.indices, case.routing_weights)


def test_dispatchers_that_differ(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, other_dispatchers):
        assert "dispatcher (rank 0: all_to_all, rank 1: all_gather)" in outcome.message


def one_rank_fails() -> None:
    with same_error_on_all_ranks():
        if dist.get_rank() == 1:
            raise TypeError("only here")


def test_an_error_on_one_rank_is_raised_on_all(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(3, one_rank_fails):
        assert (outcome.kind, outcome.message) == ("TypeError", "rank 1: only here")


def backward_after_bad_ids_elsewhere() -> str:
    """Record bad ids on one rank between the passes, as kernels of another op would."""
    case = make_case(5, 12, 23, 6, seed=dist.get_rank())
    experts = shard_experts(make_case(1, 12, 23, 1), "all_gather")
    out = experts(case.hidden_states, case.indices, case.routing_weights)
    if dist.get_rank() == 1:
        record = indices._poll_and_get_record(torch.device("cpu"))
        record.found.copy_(torch.tensor([99, 99, 23, -1]))
        record.flag.fill_(1)
    out.backward(case.grad)
    try:
        indices.poll_index_errors(torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


def test_a_backward_pass_does_not_raise_on_one_rank(rank_pools: RankPools) -> None:
    first, second = rank_pools.run(2, backward_after_bad_ids_elsewhere, backend=KERNELS)
    assert first == ""
    assert "ids from 99 to 99 were found" in second
