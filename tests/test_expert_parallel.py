"""Experts sharded over processes against the same experts on one, in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import RESULTS, TOLERANCES, Case, assert_close, make_case, oracle, relative_error
from ranks import RankPools, rank_device, rank_runtime
from sharded import gloo_on_cuda, shard_experts, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts, triton_flash_expert_func
from flash_moe_dist import ExpertParallel, clip_grad_norm_, distributed, materialize
from flash_moe_dist.dispatch import autograd
from flash_moe_dist.expert_parallel import ExpertParallelFunc

NUM_EXPERTS, HIDDEN_SIZE, SLOTS = 23, 12, 5
DISPATCHERS = ("all_to_all", "all_gather")
LEARNING_RATE = 0.1


def scenario_indices(scenario: str, rank: int, num_experts: int) -> Tensor:
    """Ids (T, K) of one rank's tokens."""
    draw = torch.Generator().manual_seed(rank)
    num_tokens = {
        "no tokens on odd ranks": 0 if rank % 2 else 9,
        "no tokens on any rank": 0,
        "other numbers of tokens on every rank": 3 + 7 * rank,
    }.get(scenario, 9)
    shape = (num_tokens, SLOTS)
    indices = torch.randint(num_experts, shape, generator=draw)
    if scenario == "all tokens to the last rank that owns experts":
        indices = indices.clamp(min=num_experts - 1)
    if scenario == "all tokens to one expert":
        indices = torch.zeros_like(indices)
    if scenario == "Zipf":
        shares = 1 / torch.arange(1, num_experts + 1)
        indices = torch.multinomial(shares.expand(num_tokens, -1), SLOTS, generator=draw)
    if scenario == "duplicates":
        indices[:, 1::2] = indices[:, :1]
    if scenario == "empty slots":
        indices = torch.where(torch.rand(indices.shape, generator=draw) < 0.4, -1, indices)
        indices[0] = -1
    if scenario == "only empty slots":
        indices = torch.full_like(indices, -1)
    return indices


SCENARIOS = (
    "uniform",
    "no tokens on odd ranks",
    "no tokens on any rank",
    "other numbers of tokens on every rank",
    "all tokens to the last rank that owns experts",
    "all tokens to one expert",
    "Zipf",
    "duplicates",
    "empty slots",
    "only empty slots",
)


def cases_of_all_ranks(
    scenario: str, num_experts: int, hidden_size: int, dtype: torch.dtype, num_ranks: int
) -> list[Case]:
    """Tokens of every rank, with the same tables."""
    tables = make_case(1, hidden_size, num_experts, 1, dtype)
    cases = []
    for rank in range(num_ranks):
        indices = scenario_indices(scenario, rank, num_experts)
        shape = (len(indices), hidden_size, num_experts, SLOTS)
        case = make_case(*shape, dtype, seed=100 + rank, indices=indices)
        case.down_weights, case.up_weights = tables.down_weights, tables.up_weights
        cases.append(case)
    return cases


def expected_results(cases: list[Case], rank: int) -> tuple[Tensor, ...]:
    """Results in float64; the loss and the gradients of the tables are means over ranks."""
    results = [oracle(case) for case in cases]
    own = results[rank]
    averaged = [torch.stack([one[i] for one in results]).mean(0) for i in (2, 3)]
    return own[0], own[1], *averaged, own[4]


def parity(
    scenario: str,
    num_experts: int,
    dtype: torch.dtype,
    dispatcher: str,
    ep_size: int | None = None,
) -> None:
    """Output, gradients, their norm, and a step, against one process that has all tokens."""
    runtime = rank_runtime(ep_size)
    cases = cases_of_all_ranks(scenario, num_experts, HIDDEN_SIZE, dtype, runtime.ep_mesh.size())
    mine, device = cases[runtime.ep_mesh.get_local_rank()], runtime.device
    hidden_states = mine.hidden_states.detach().to(device).requires_grad_()
    routing_weights = mine.routing_weights.detach().to(device).requires_grad_()
    experts = shard_experts(mine, dispatcher, runtime.ep_mesh)
    out = experts(hidden_states, mine.indices.to(device), routing_weights)
    out.backward(mine.grad.to(device))
    results = (
        out,
        hidden_states.grad,
        experts.down_weights.grad,
        experts.up_weights.grad,
        routing_weights.grad,
    )
    expected = expected_results(cases, runtime.ep_mesh.get_local_rank())
    tolerance = TOLERANCES[dtype]
    for name, result, one in zip(RESULTS, results, expected, strict=True):
        assert_close(whole(result), one, tolerance, f"{scenario}, {name}")
    if gloo_on_cuda():
        return
    norm = clip_grad_norm_(experts.parameters(), max_norm=1e9)
    expected_norm = torch.linalg.vector_norm(torch.stack([expected[2], expected[3]]))
    assert_close(norm.cpu(), expected_norm, tolerance, f"{scenario}, gradient norm")
    before = [whole(table).double() for table in experts.parameters()]
    torch.optim.SGD(experts.parameters(), lr=LEARNING_RATE).step()
    for table, old, grad in zip(experts.parameters(), before, expected[2:4], strict=True):
        stepped = old - LEARNING_RATE * grad
        assert_close(whole(table), stepped, tolerance, f"{scenario}, after a step")


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_parity_with_one_process(
    scenario: str, world_size: int, dispatcher: str, rank_pools: RankPools
) -> None:
    rank_pools.run(world_size, parity, scenario, NUM_EXPERTS, torch.float32, dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("num_experts", [1, 2, 5, 24])
def test_parity_for_any_number_of_experts(
    num_experts: int, dispatcher: str, rank_pools: RankPools
) -> None:
    rank_pools.run(3, parity, "uniform", num_experts, torch.float64, dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("scenario", ["uniform", "other numbers of tokens on every rank"])
def test_parity_with_fewer_ep_ranks_than_ranks(
    scenario: str, dispatcher: str, rank_pools: RankPools
) -> None:
    rank_pools.run(4, parity, scenario, NUM_EXPERTS, torch.float32, dispatcher, 2)


def wrong_factor(factor: float, dispatcher: str) -> None:
    """Parity, with gradients of the tables wrong by that factor."""
    patched: Any = autograd
    right = patched.collect_table_grads

    def wrong(*args: Any, scale: float) -> Any:
        return right(*args, scale=scale * factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "collect_table_grads", wrong)
        parity("uniform", NUM_EXPERTS, torch.float32, dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("factor", [2.0, 0.5, 1.001])
def test_a_wrong_factor_on_gradients_is_seen(
    factor: float, dispatcher: str, rank_pools: RankPools
) -> None:
    for outcome in rank_pools.outcomes(2, wrong_factor, factor, dispatcher):
        assert outcome.kind == "AssertionError"
        assert "down_weights: relative error" in outcome.message


def no_worse_than_one_rank(dtype: torch.dtype, dispatcher: str) -> None:
    """Errors of all results against those of the op on one rank, both against float64."""
    # Enough elements for errors of single roundings to average out.
    rank, hidden_size, num_experts = dist.get_rank(), 192, 40
    cases = cases_of_all_ranks("uniform", num_experts, hidden_size, dtype, dist.get_world_size())
    mine, device = cases[rank], rank_device()
    exact = expected_results(cases, rank)

    leaves = [tensor.detach().to(device).requires_grad_() for tensor in mine.differentiable()]
    experts = shard_experts(mine, dispatcher)
    out = experts(leaves[0], mine.indices.to(device), leaves[3])
    out.backward(mine.grad.to(device))
    sharded = (
        out,
        leaves[0].grad,
        experts.down_weights.grad,
        experts.up_weights.grad,
        leaves[3].grad,
    )

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(case, name).detach() for case in cases]).to(device)

    tokens = [rows(name) for name in ("hidden_states", "indices", "routing_weights")]
    tokens[0].requires_grad_()
    tokens[2].requires_grad_()
    alone = triton_flash_expert_func(tokens[0], leaves[1], leaves[2], tokens[1], tokens[2])
    alone.backward(rows("grad"))
    own = slice(rank * len(mine.indices), (rank + 1) * len(mine.indices))
    assert tokens[0].grad is not None
    assert tokens[2].grad is not None
    one_rank = (
        alone[own],
        tokens[0].grad[own],
        leaves[1].grad,
        leaves[2].grad,
        tokens[2].grad[own],
    )
    scales = (1, 1, dist.get_world_size(), dist.get_world_size(), 1)
    for name, many, one, expected, scale in zip(
        RESULTS, sharded, one_rank, exact, scales, strict=True
    ):
        error = relative_error(whole(many), expected)
        bound = relative_error(whole(one), expected * scale)
        if name == "routing_weights":
            # Few numbers, so the least error is not the one expected of one rounding.
            bound = max(bound, 2**-9 * (dtype == torch.bfloat16))
        assert error <= 1.1 * bound + 1e-7, f"{name}: {error:.2e}, on one rank {bound:.2e}"


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bfloat16_is_no_worse_than_on_one_rank(
    world_size: int, dispatcher: str, rank_pools: RankPools
) -> None:
    rank_pools.run(world_size, no_worse_than_one_rank, torch.bfloat16, dispatcher)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "gloo on cuda"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_on_gpus(
    scenario: str, dtype: torch.dtype, dispatcher: str, backend: str, rank_pools: RankPools
) -> None:
    needs_gpus(backend)
    rank_pools.run(2, parity, scenario, NUM_EXPERTS, dtype, dispatcher, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "gloo on cuda"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_bfloat16_on_gpus_is_no_worse_than_on_one(
    dispatcher: str, backend: str, rank_pools: RankPools
) -> None:
    needs_gpus(backend)
    rank_pools.run(2, no_worse_than_one_rank, torch.bfloat16, dispatcher, backend=backend)


def needs_gpus(backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")


class OwnModule(nn.Module):
    """A user's module: two tables and a call of the op, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(7, 6))
        self.values = nn.Parameter(torch.randn(7, 6))
        self.expert_func = triton_flash_expert_func

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.expert_func(x, self.keys, self.values, indices, weights)


def own_module(dispatcher: str) -> None:
    torch.manual_seed(0)
    module = OwnModule()
    x, indices = torch.randn(4, 6), torch.randint(7, (4, 3))
    expected = module(x, indices, torch.ones(4, 3))
    expected.sum().backward()
    grads = [table.grad for table in module.parameters()]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.ModuleDict({"experts": module})
    parallelize_module(model, mesh, {"experts": ExpertParallel(dispatcher)})  # type: ignore[arg-type]
    assert isinstance(module.keys, DTensor)
    assert module.keys.to_local().shape[0] < 7
    out = module(x, indices, torch.ones(4, 3))
    out.sum().backward()
    assert_close(out, expected, 1e-6, "own module")
    # Every rank had the same tokens, and the mean of equal gradients is each of them.
    for table, grad in zip(module.parameters(), grads, strict=True):
        assert grad is not None
        assert_close(whole(table.grad), grad, 1e-6, "gradient of own module")


@pytest.mark.parametrize("dispatcher", ["auto", *DISPATCHERS])
def test_plan_on_a_users_own_module(dispatcher: str, rank_pools: RankPools) -> None:
    rank_pools.run(2, own_module, dispatcher)


def test_unknown_dispatcher_is_refused() -> None:
    with pytest.raises(ValueError, match="dispatcher must be one of auto, all_to_all, all_gather"):
        ExpertParallel("all_two_all")  # type: ignore[arg-type]


def no_expert_func() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(nn.Linear(3, 3), mesh, ExpertParallel())


def test_module_without_the_hook_is_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, no_expert_func):
        assert outcome.kind == "TypeError"
        assert "Linear must call its tables through an attribute expert_func" in outcome.message


class WithBias(OwnModule):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))


def shard_twice() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.ModuleDict({"experts": OwnModule()})
    for _ in range(2):
        parallelize_module(model, mesh, {"experts": ExpertParallel()})


def test_a_plan_that_is_applied_twice_is_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, shard_twice):
        assert outcome.kind == "ValueError"
        assert "keys of OwnModule must be a plain tensor, got a DTensor over" in outcome.message
        assert "apply ExpertParallel once" in outcome.message


def test_a_plan_that_matches_nothing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("0", "1", "0", "127.0.0.1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with distributed() as runtime:
        model = nn.ModuleDict({"experts": OwnModule()}).to(runtime.device)
        with pytest.raises(UserWarning, match=r"'layers\.\*\.experts' could not be resolved"):
            parallelize_module(model, runtime.ep_mesh, {"layers.*.experts": ExpertParallel()})


def share_tables(on_meta: bool) -> None:
    """Two layers over the same tables, of which the second swaps them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"first": FlashExperts(7, 6), "second": FlashExperts(7, 6)})
        first, second = model["first"], model["second"]
        second.down_weights, second.up_weights = first.up_weights, first.down_weights
    parallelize_module(model, mesh, {"first": ExpertParallel(), "second": ExpertParallel()})
    if on_meta:
        torch.manual_seed(0)
        materialize(model, "cpu")
    assert first.down_weights is second.up_weights
    assert first.up_weights is second.down_weights
    assert len(list(model.parameters())) == 2
    down, up = tables = [whole(table).requires_grad_() for table in model.parameters()]
    x, indices = torch.randn(4, 6), torch.randint(7, (4, 3))
    y = triton_flash_expert_func(x, down, up, indices, torch.ones(4, 3))
    y = triton_flash_expert_func(y, up, down, indices, torch.ones(4, 3))
    y.sum().backward()
    out = second(first(x, indices, torch.ones(4, 3)), indices, torch.ones(4, 3))
    out.sum().backward()
    assert_close(out, y, 1e-6, "output")
    for table, expected in zip(model.parameters(), tables, strict=True):
        assert_close(whole(table.grad), whole(expected.grad), 1e-6, "gradient")


@pytest.mark.parametrize("on_meta", [False, True], ids=["with values", "meta"])
def test_tables_of_two_modules_stay_shared(on_meta: bool, rank_pools: RankPools) -> None:
    rank_pools.run(2, share_tables, on_meta)


def share_tables_under_fully_shard() -> None:
    """One call keeps them shared, for a list of modules or for their parent; two calls do not."""
    runtime = rank_runtime(1)
    options: Any = {"mesh": runtime.efsdp_mesh, "shard_placement_fn": lambda table: Shard(1)}
    for calls in ("list", "parent", "separate"):
        first, second = FlashExperts(7, 6), FlashExperts(7, 6)
        second.down_weights, second.up_weights = first.up_weights, first.down_weights
        model = nn.Sequential(first, second)
        parallelize_module(model, runtime.ep_mesh, {"*": ExpertParallel()})
        if calls == "separate":
            fully_shard(first, **options)
            fully_shard(second, **options)
        elif calls == "list":
            fully_shard([first, second], **options)
        else:
            fully_shard(model, **options)
        assert (first.down_weights is second.up_weights) == (calls != "separate")
        assert len(list(model.parameters())) == (4 if calls == "separate" else 2)


def test_tables_stay_shared_under_one_call_of_fully_shard(rank_pools: RankPools) -> None:
    rank_pools.run(2, share_tables_under_fully_shard)


def share_tables_over_two_meshes() -> None:
    world = init_device_mesh("cpu", (dist.get_world_size(),))
    first, second = OwnModule(), OwnModule()
    second.keys = first.keys
    parallelize_module(first, world, ExpertParallel())
    single = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "ep"))
    parallelize_module(second, single["ep"], ExpertParallel())


def test_shared_tables_over_two_meshes_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, share_tables_over_two_meshes):
        assert outcome.kind == "ValueError"
        assert "keys of OwnModule is shared with a module that is sharded over" in outcome.message


def shard_with_bias() -> None:
    parallelize_module(
        WithBias(), init_device_mesh("cpu", (dist.get_world_size(),)), ExpertParallel()
    )


def test_parameters_that_are_no_tables_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, shard_with_bias):
        assert outcome.kind == "ValueError"
        assert "parameters of WithBias must be tables of one shape" in outcome.message


def tables_that_are_not_sharded() -> None:
    case = make_case(3, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    ExpertParallelFunc(rank_runtime().ep_mesh)(*case.args())


def test_plain_tables_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, tables_that_are_not_sharded):
        assert outcome.kind == "TypeError"
        assert "tables must be DTensors sharded by ExpertParallel" in outcome.message


def second_derivative() -> None:
    case = make_case(3, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    out = shard_experts(case)(case.hidden_states, case.indices, case.routing_weights)
    (grad,) = torch.autograd.grad(out.sum(), case.hidden_states, create_graph=True)
    (out.sum() + grad.square().sum()).backward()


def test_second_derivatives_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, second_derivative):
        assert outcome.kind == "RuntimeError"
        assert "have no second derivative" in outcome.message


def repeats(dispatcher: str, dtype: torch.dtype) -> None:
    """50 times the same passes, bit for bit."""
    case = make_case(30, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, dtype, seed=dist.get_rank())
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1, dtype), dispatcher)
    device = rank_device()
    hidden_states = case.hidden_states.detach().to(device).requires_grad_()
    routing_weights = case.routing_weights.detach().to(device).requires_grad_()
    parameters = (hidden_states, routing_weights, *experts.parameters())

    def results() -> list[Tensor]:
        out = experts(hidden_states, case.indices.to(device), routing_weights)
        grads = torch.autograd.grad(out, parameters, case.grad.to(device))
        return [out, *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]

    first = results()
    for _ in range(50):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bitwise_equal(
    dispatcher: str, dtype: torch.dtype, rank_pools: RankPools
) -> None:
    rank_pools.run(3, repeats, dispatcher, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "gloo on cuda"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_repeats_on_gpus_are_bitwise_equal(
    dispatcher: str, backend: str, rank_pools: RankPools
) -> None:
    needs_gpus(backend)
    rank_pools.run(2, repeats, dispatcher, torch.bfloat16, backend=backend)
