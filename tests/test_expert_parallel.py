"""Experts sharded over processes against the same experts on one, in float64."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cases import RESULTS, TOLERANCES, assert_close, make_case, oracle
from ranks import Failure, RankPools
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashExperts, triton_flash_expert_func
from flash_moe_dist import ExpertParallel
from flash_moe_dist.agreement import same_error_on_all_ranks

NUM_EXPERTS, HIDDEN_SIZE, SLOTS = 23, 12, 5


def rank_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


def sharded_experts(down_weights: Tensor, up_weights: Tensor) -> FlashExperts:
    """The same tables on every rank, then sharded over all ranks."""
    device = rank_device()
    num_experts, hidden_size = down_weights.shape
    experts = FlashExperts(num_experts, hidden_size, device, down_weights.dtype)
    with torch.no_grad():
        experts.down_weights.copy_(down_weights)
        experts.up_weights.copy_(up_weights)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ep",))
    parallelize_module(experts, mesh, ExpertParallel())
    return experts


def whole_gradient(table: nn.Parameter) -> Tensor:
    assert isinstance(table.grad, DTensor)
    return table.grad.full_tensor().cpu()


def scenario_indices(scenario: str, rank: int, num_experts: int) -> Tensor:
    """Ids (T, K) of one rank's tokens."""
    draw = torch.Generator().manual_seed(rank)
    num_tokens = {
        "no tokens on odd ranks": 0 if rank % 2 else 9,
        "no tokens on any rank": 0,
        "other numbers of tokens on every rank": 3 + 7 * rank,
    }.get(scenario, 9)
    indices = torch.randint(num_experts, (num_tokens, SLOTS), generator=draw)
    if scenario == "all tokens to the last rank that owns experts":
        indices = indices.clamp(min=num_experts - 1)
    if scenario == "all tokens to one expert":
        indices = torch.zeros_like(indices)
    if scenario == "empty slots":
        indices = torch.where(torch.rand(indices.shape, generator=draw) < 0.4, -1, indices)
        indices[0] = -1
    return indices


SCENARIOS = (
    "uniform",
    "no tokens on odd ranks",
    "no tokens on any rank",
    "other numbers of tokens on every rank",
    "all tokens to the last rank that owns experts",
    "all tokens to one expert",
    "empty slots",
)


def parity(scenario: str, num_experts: int, dtype: torch.dtype) -> None:
    """Output and gradients of every rank against one process that has all tokens."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tables = make_case(1, HIDDEN_SIZE, num_experts, 1, dtype)
    cases = []
    for each in range(world_size):
        indices = scenario_indices(scenario, each, num_experts)
        shape = (len(indices), HIDDEN_SIZE, num_experts, SLOTS)
        case = make_case(*shape, dtype, seed=100 + each, indices=indices)
        case.down_weights, case.up_weights = tables.down_weights, tables.up_weights
        cases.append(case)
    expected = [oracle(case) for case in cases]

    mine, device = cases[rank], rank_device()
    hidden_states = mine.hidden_states.detach().to(device).requires_grad_()
    routing_weights = mine.routing_weights.detach().to(device).requires_grad_()
    experts = sharded_experts(mine.down_weights.detach(), mine.up_weights.detach())
    out = experts(hidden_states, mine.indices.to(device), routing_weights)
    out.backward(mine.grad.to(device))
    assert hidden_states.grad is not None
    assert routing_weights.grad is not None
    results = (
        out,
        hidden_states.grad,
        whole_gradient(experts.down_weights),
        whole_gradient(experts.up_weights),
        routing_weights.grad,
    )
    # The loss is the mean over ranks: a table's gradient is the mean of the ranks' gradients.
    own = expected[rank]
    averaged = [torch.stack([one[i] for one in expected]).mean(0) for i in (2, 3)]
    wanted = (own[0], own[1], *averaged, own[4])
    # Several partial sums, each rounded once for the journey.
    tolerance = TOLERANCES[dtype] * 2
    for name, result, one in zip(RESULTS, results, wanted, strict=True):
        assert_close(result.cpu(), one, tolerance, f"{scenario}, {name}")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_parity_with_one_process(scenario: str, world_size: int, rank_pools: RankPools) -> None:
    rank_pools.run(world_size, parity, scenario, NUM_EXPERTS, torch.float32)


@pytest.mark.parametrize("num_experts", [1, 2, 5, 24])
def test_parity_for_any_number_of_experts(num_experts: int, rank_pools: RankPools) -> None:
    rank_pools.run(3, parity, "uniform", num_experts, torch.float64)


def test_parity_in_bfloat16(rank_pools: RankPools) -> None:
    rank_pools.run(3, parity, "uniform", NUM_EXPERTS, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_with_nccl(scenario: str, dtype: torch.dtype, rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    rank_pools.run(2, parity, scenario, NUM_EXPERTS, dtype, backend="nccl")


def host_syncs() -> tuple[int, int]:
    """Host syncs in a forward and in a backward pass, as PyTorch counts them."""
    case = make_case(64, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, device=rank_device())
    experts = sharded_experts(case.down_weights.detach(), case.up_weights.detach())
    counts = []
    for counted in (False, True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if counted else "default")
        with warnings.catch_warnings(record=True) as forward:
            warnings.simplefilter("always")
            out = experts(case.hidden_states, case.indices, case.routing_weights)
        with warnings.catch_warnings(record=True) as backward:
            warnings.simplefilter("always")
            out.backward(case.grad)
        torch.cuda.set_sync_debug_mode("default")
        counts = [
            sum("synchronizing" in str(one.message) for one in passed)
            for passed in (forward, backward)
        ]
    return counts[0], counts[1]


@pytest.mark.gpu
def test_one_host_sync_in_forward_and_none_in_backward(rank_pools: RankPools) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    assert rank_pools.run(2, host_syncs, backend="nccl") == [(1, 0), (1, 0)]


class OwnModule(nn.Module):
    """A user's module: two tables and a call of the op, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(7, 6))
        self.values = nn.Parameter(torch.randn(7, 6))
        self.expert_func = triton_flash_expert_func

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.expert_func(x, self.keys, self.values, indices, weights)


def own_module() -> None:
    torch.manual_seed(0)
    module = OwnModule()
    x, indices = torch.randn(4, 6), torch.randint(7, (4, 3))
    expected = module(x, indices, torch.ones(4, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.ModuleDict({"experts": module})
    parallelize_module(model, mesh, {"experts": ExpertParallel()})
    assert isinstance(module.keys, DTensor)
    assert module.keys.to_local().shape[0] < 7
    assert_close(module(x, indices, torch.ones(4, 3)), expected, 1e-6, "own module")


def test_plan_on_a_users_own_module(rank_pools: RankPools) -> None:
    rank_pools.run(2, own_module)


def no_expert_func() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(nn.Linear(3, 3), mesh, ExpertParallel())


def test_module_without_the_hook_is_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, no_expert_func):
        assert outcome.kind == "TypeError"
        assert "Linear must call its tables through an attribute expert_func" in outcome.message


def bad_input(spoil: str) -> None:
    """Rank 1 spoils its input; every rank must hear of it, and go on to work."""
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    experts = sharded_experts(tables.down_weights.detach(), tables.up_weights.detach())
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
    "device": lambda x, i, w: [x, i.to("meta"), w],
    "no tensor": lambda x, i, w: [x, None, w],  # type: ignore[list-item]
    "leading dimensions": lambda x, i, w: [x.view(2, 3, -1), i.view(3, 2, -1), w.view(2, 3, -1)],
}
MESSAGES = {
    "index out of range": r"rank 1: indices must lie in [-1, 23)",
    "index below -1": "ids from -7 to ",
    "hidden size": "rank 1: hidden_states must have rows of hidden_size = 12",
    "number of routing weights": "rank 1: routing_weights must have the shape of indices, (6, 5)",
    "dtype of indices": "rank 1: indices must have one of the dtypes int32, int64",
    "dtype of hidden states": "ranks must agree on (num_experts, hidden_size, dtype of hidden",
    "requires_grad": "ranks must agree on (num_experts, hidden_size, dtype of hidden_states",
    "requires_grad of weights": "ranks must agree on (num_experts, hidden_size, dtype of",
    "device": "rank 1: indices must be on cpu, where the tables are, got meta",
    "no tensor": "rank 1: indices must be a torch.Tensor, got NoneType",
    "leading dimensions": "rank 1: hidden_states must have shape (num_tokens, hidden_size)",
}
KINDS = {"dtype of indices": "TypeError", "no tensor": "TypeError"}


@pytest.mark.parametrize("spoil", SPOILED)
def test_bad_input_on_one_rank_is_the_same_error_on_all(spoil: str, rank_pools: RankPools) -> None:
    outcomes = rank_pools.outcomes(3, bad_input, spoil)
    for outcome in outcomes:
        assert isinstance(outcome, Failure)
        assert outcome.kind == KINDS.get(spoil, "ValueError")
        assert MESSAGES[spoil] in outcome.message
    assert len({outcome.message for outcome in outcomes}) == 1


def modes_differ() -> None:
    """Rank 1 runs without gradients while the others run with them."""
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    experts = sharded_experts(tables.down_weights.detach(), tables.up_weights.detach())
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS)
    with torch.set_grad_enabled(dist.get_rank() != 1):
        experts(case.hidden_states, case.indices, case.routing_weights)


def test_grad_mode_must_be_the_same_on_all_ranks(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, modes_differ):
        assert "ranks must agree on" in outcome.message


def in_a_model() -> None:
    """Deep copies, autocast, no slots, frozen tables, no gradients, checkpointing."""
    tables = make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1)
    experts = sharded_experts(tables.down_weights.detach(), tables.up_weights.detach())
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    rows = (case.hidden_states, case.indices, case.routing_weights)
    expected = experts(*rows)
    grads = torch.autograd.grad(expected, rows[::2], case.grad)
    assert torch.equal(copy.deepcopy(experts)(*rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(experts(*rows), expected)
    with torch.inference_mode():
        assert torch.equal(experts(*rows), expected)
    recomputed = checkpoint(experts, *rows, use_reentrant=False)
    assert torch.equal(recomputed, expected)
    for one, other in zip(
        torch.autograd.grad(recomputed, rows[::2], case.grad), grads, strict=True
    ):
        assert torch.equal(one, other)
    experts.requires_grad_(False)
    frozen = torch.autograd.grad(experts(*rows), rows[::2], case.grad)
    assert all(torch.equal(one, other) for one, other in zip(frozen, grads, strict=True))
    no_slots = experts(rows[0], rows[1][:, :0], rows[2][:, :0])
    assert no_slots.count_nonzero() == 0


def test_what_models_do_with_a_layer(rank_pools: RankPools) -> None:
    rank_pools.run(2, in_a_model)


class WithBias(OwnModule):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))


def shard_with_bias() -> None:
    parallelize_module(
        WithBias(), init_device_mesh("cpu", (dist.get_world_size(),)), ExpertParallel()
    )


def test_parameters_that_are_no_tables_are_refused(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(2, shard_with_bias):
        assert outcome.kind == "ValueError"
        assert "parameters of WithBias must be tables of one shape" in outcome.message


def one_rank_fails() -> None:
    with same_error_on_all_ranks():
        if dist.get_rank() == 1:
            raise TypeError("only here")


def test_an_error_on_one_rank_is_raised_on_all(rank_pools: RankPools) -> None:
    for outcome in rank_pools.outcomes(3, one_rank_fails):
        assert (outcome.kind, outcome.message) == ("TypeError", "rank 1: only here")


def repeats() -> None:
    case = make_case(30, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    experts = sharded_experts(
        make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1).down_weights.detach(),
        make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1).up_weights.detach(),
    )
    parameters = (case.hidden_states, case.routing_weights, *experts.parameters())

    def results() -> list[Tensor]:
        out = experts(case.hidden_states, case.indices, case.routing_weights)
        grads = torch.autograd.grad(out, parameters, case.grad)
        return [out, *(g.to_local() if isinstance(g, DTensor) else g for g in grads)]

    first = results()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


def test_repeats_are_bitwise_equal(rank_pools: RankPools) -> None:
    rank_pools.run(3, repeats)
