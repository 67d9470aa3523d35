"""The sharded layer among what models are made of: FSDP, compile, checkpointing, autocast."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_close, make_case
from ranks import RankPools, rank_device, rank_runtime
from sharded import shard_experts, whole, whole_parameters
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE
from flash_moe_dist import ExpertParallel, clip_grad_norm_
from flash_moe_dist.dispatch.collectives import ALL_GATHER_COLLECTIVE, ALL_TO_ALL_COLLECTIVE
from flash_moe_dist.runtime import Runtime

NUM_EXPERTS, HIDDEN_SIZE, SLOTS, TOKENS = 30, 12, 4, 10
UNEVEN = (TOKENS, 0, 7, 1)
TIGHT = 1e-12


class Model(nn.Module):
    """Dense, experts, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.noise: nn.Module = nn.Identity()
        self.moe = FlashMoE(HIDDEN_SIZE, 8, NUM_EXPERTS, SLOTS, norm_topk_prob=True)
        self.last = nn.Linear(HIDDEN_SIZE, 3)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.last(self.moe(self.noise(self.first(x_TH))))


def new_model(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(3)
    return Model().to(rank_device(), dtype)


def shard(model: Model, runtime: Runtime, dispatcher: Any = "auto") -> Model:
    """Shard as the README does: experts over ep, tables over efsdp, all else over dp."""
    parallelize_module(model, runtime.ep_mesh, {"moe.experts": ExpertParallel(dispatcher)})
    tables = set(model.moe.experts.parameters())
    if runtime.efsdp_mesh.size() > 1:
        mesh = runtime.efsdp_mesh
        fully_shard(model.moe.experts, mesh=mesh, shard_placement_fn=lambda _: Shard(1))
        tables = set()
    fully_shard(model.moe, mesh=runtime.dp_mesh, ignored_params=tables)
    fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)
    return model


def tokens_of(rank: int, batch: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(100 * batch + rank)
    tokens = UNEVEN[(rank + batch) % len(UNEVEN)]
    return torch.randn(tokens, HIDDEN_SIZE, generator=draw, dtype=dtype).to(rank_device())


def loss_of(model: nn.Module, x_TH: Tensor) -> Tensor:
    return model(x_TH).square().sum() / TOKENS


def fsdp_parity(ep_size: int, dispatcher: str) -> None:
    """Two clipped steps, each of two accumulated batches, against one process in float64."""
    runtime = rank_runtime(ep_size)
    alone = new_model()
    sharded = shard(new_model(), runtime, dispatcher)
    assert isinstance(sharded, FSDPModule)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (alone, sharded)]
    for step in range(2):
        for batch in (2 * step, 2 * step + 1):
            everyone = [tokens_of(rank, batch) for rank in range(runtime.world_size)]
            (loss_of(alone, torch.cat(everyone)) / runtime.world_size).backward()
            sharded.set_requires_gradient_sync(batch % 2 == 1)
            loss_of(sharded, tokens_of(runtime.rank, batch)).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        assert expected_norm > 0.1
        norm = clip_grad_norm_(sharded.parameters(), 0.1)
        assert_close(norm, expected_norm, TIGHT, f"gradient norm at step {step}")
        for name, one in alone.named_parameters():
            grad = dict(sharded.named_parameters())[name].grad
            assert_close(whole(grad), whole(one.grad), TIGHT, f"gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    stepped = whole_parameters(sharded)
    for name, parameter in whole_parameters(alone).items():
        assert_close(stepped[name], parameter, TIGHT, name)


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (3, 3), (4, 4), (4, 2), (4, 1)])
def test_training_under_fsdp_is_that_of_one_process(
    world_size: int, ep_size: int, dispatcher: str, rank_pools: RankPools
) -> None:
    rank_pools.run(world_size, fsdp_parity, ep_size, dispatcher)


@pytest.mark.gpu
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_training_under_fsdp_with_nccl(
    ep_size: int, dispatcher: str, rank_pools: RankPools
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    rank_pools.run(2, fsdp_parity, ep_size, dispatcher, backend="nccl")


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x_TH = tokens_of(dist.get_rank()).requires_grad_()
    out = forward(x_TH)
    grads = torch.autograd.grad(out.square().sum(), [x_TH, *model.parameters()])
    return [out.detach(), *(whole(grad) for grad in grads)]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def count_collectives(run: Callable[[], Any]) -> dict[str, int]:
    """Count the calls of each collective in `run`."""
    names = (ALL_TO_ALL_COLLECTIVE, ALL_GATHER_COLLECTIVE, "all_gather")
    counts = dict.fromkeys(names, 0)

    def counted(name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return collective(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, partial(counted, name, getattr(dist, name)))
        run()
    return counts


def checkpointed(dispatcher: Any, use_reentrant: bool) -> None:
    """Recompute: the same routing and bits, and the collectives of one more forward pass."""
    mesh = rank_runtime().ep_mesh
    model = new_model()
    model.noise = nn.Dropout(0.5)
    parallelize_module(model, mesh, {"moe.experts": ExpertParallel(dispatcher)})
    chosen: list[Tensor] = []
    model.moe.router.register_forward_hook(lambda *args: chosen.append(args[2][0].clone()))

    def backward(recompute: bool) -> dict[str, int]:
        torch.manual_seed(dist.get_rank())
        x_TH = tokens_of(dist.get_rank()).requires_grad_()
        model.zero_grad()
        run = partial(checkpoint, model, use_reentrant=use_reentrant) if recompute else model
        out = run(x_TH)
        counts = count_collectives(lambda: out.square().sum().backward())
        grads.append([whole(one.grad) for one in (x_TH, *model.parameters())])
        return counts

    grads: list[list[Tensor]] = []
    plain = backward(False)
    forward = count_collectives(lambda: model(tokens_of(dist.get_rank())))
    chosen.clear()
    recomputed = backward(True)
    assert len(chosen) == 2
    assert torch.equal(*chosen)
    assert_equal(*grads)
    assert recomputed == {name: plain[name] + forward[name] for name in plain}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_activation_checkpointing(
    dispatcher: str, use_reentrant: bool, rank_pools: RankPools
) -> None:
    rank_pools.run(3, checkpointed, dispatcher, use_reentrant)


def compiled(backend: str) -> None:
    mesh = rank_runtime().ep_mesh
    model = new_model()
    parallelize_module(model, mesh, {"moe.experts": ExpertParallel()})
    expected = gradients(model, model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    found = gradients(model, torch.compile(model, backend=counter))
    assert counter.frame_count >= 2, "what is before and after the experts is not compiled"
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, TIGHT, "compiled")


def test_compiled_model_around_the_layer(rank_pools: RankPools) -> None:
    rank_pools.run(2, compiled, "aot_eager")


@pytest.mark.gpu
def test_compiled_model_around_the_layer_on_a_gpu(rank_pools: RankPools) -> None:
    rank_pools.run(2, compiled, "inductor", backend="gloo on cuda")


def in_a_model(dispatcher: str) -> None:
    """Deep copies, autocast, no slots, frozen tables, no gradients."""
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), dispatcher)
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    rows = (case.hidden_states, case.indices, case.routing_weights)
    expected = experts(*rows)
    grads = torch.autograd.grad(expected, rows[::2], case.grad)
    assert torch.equal(copy.deepcopy(experts)(*rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = experts(*rows)
        assert torch.equal(cast, expected)
        assert_equal(list(torch.autograd.grad(cast, rows[::2], case.grad)), list(grads))
    with torch.inference_mode():
        assert torch.equal(experts(*rows), expected)
    with torch.no_grad():
        assert not experts(*rows).requires_grad
    experts.requires_grad_(False)
    frozen = torch.autograd.grad(experts(*rows), rows[::2], case.grad)
    assert_equal(list(frozen), list(grads))
    detached = [one.detach() for one in rows]
    assert not experts(*detached).requires_grad
    experts.requires_grad_(True)
    tables_only = experts(*detached)
    assert torch.equal(tables_only, expected)
    tables_only.backward(case.grad)
    no_slots = experts(rows[0], rows[1][:, :0], rows[2][:, :0])
    assert no_slots.count_nonzero() == 0


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_what_models_do_with_a_layer(dispatcher: str, rank_pools: RankPools) -> None:
    rank_pools.run(2, in_a_model, dispatcher)


def memory_kept() -> None:
    """A backward pass frees what the forward pass kept, under hooks of saved tensors too."""
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1))
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = experts(case.hidden_states, case.indices, case.routing_weights)
    assert len(packed) >= 8, "tensors are kept outside of what autograd knows"
    out.backward(case.grad)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(case.grad)


def test_what_is_kept_for_the_backward_pass_is_known_to_autograd(rank_pools: RankPools) -> None:
    rank_pools.run(2, memory_kept)


def names_of_ranges(dispatcher: str) -> list[str]:
    case = make_case(6, HIDDEN_SIZE, NUM_EXPERTS, SLOTS, seed=dist.get_rank())
    experts = shard_experts(make_case(1, HIDDEN_SIZE, NUM_EXPERTS, 1), dispatcher)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out = experts(case.hidden_states, case.indices, case.routing_weights)
        out.backward(case.grad)
    events = [one for one in profiled.events() or [] if one.name.startswith("flash_moe::")]
    ranges = ("dispatch", "experts", "combine")
    named = [one for one in events if one.name.split("::")[1].removesuffix("_backward") in ranges]
    return [one.name for one in sorted(named, key=lambda one: one.time_range.start)]


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_a_trace_names_the_steps(dispatcher: str, rank_pools: RankPools) -> None:
    steps = ["flash_moe::dispatch", "flash_moe::experts", "flash_moe::combine"]
    # Gradients of weights travel while those of rows are computed, these while those of the tables.
    ordered = (*steps, *steps[1:], *steps[1:])
    backward = [f"{step}_backward" for step in ordered]
    assert rank_pools.run(2, names_of_ranges, dispatcher) == [[*steps, *backward]] * 2
