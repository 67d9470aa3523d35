"""Gradient norm and clipping over plain, sharded and differently sharded gradients."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import RankPools, rank_runtime
from sharded import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flash_moe import FlashMoE
from flash_moe_dist import ExpertParallel, Runtime, clip_grad_norm_

MAX_NORM = 0.01


def clip() -> None:
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2)]
    flat = init_device_mesh("cpu", (world_size,), mesh_dim_names=("ep",))
    square = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("efsdp", "ep"))
    parameters = [
        nn.Parameter(distribute_tensor(torch.zeros(5, 3), flat, [Shard(0)])),
        nn.Parameter(torch.zeros(7)),
        nn.Parameter(distribute_tensor(torch.zeros(2, 2), square["ep"], [Shard(0)])),
    ]
    parameters[0].grad = distribute_tensor(whole[0], flat, [Shard(0)])
    parameters[1].grad = whole[1].clone()
    parameters[2].grad = distribute_tensor(whole[2], square["ep"], [Shard(0)])
    expected = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in whole]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm = clip_grad_norm_(parameters, max_norm=0.5)
    torch.testing.assert_close(norm, expected)
    for parameter, grad in zip(parameters, whole, strict=True):
        found = parameter.grad
        assert found is not None
        full = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(full, grad * 0.5 / expected)


def test_norm_counts_every_element_once(rank_pools: RankPools) -> None:
    rank_pools.run(4, clip)


class Model(nn.Module):
    """A pair of linear layers, as tensor parallelism shards them, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.moe = FlashMoE(8, 6, 12, 2)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.moe(self.narrow(self.wide(x_TH).relu()))


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def backward(model: Model) -> None:
    """Run a backward pass on the same tokens on every rank: each rank's gradient is the average."""
    draw = torch.Generator().manual_seed(1)
    x_TH = torch.randn(5, 8, dtype=torch.float64, generator=draw)
    (1000 * model(x_TH).square().mean()).backward()


def shard_experts_over_all(model: Model, runtime: Runtime) -> None:
    ranks = rank_runtime().ep_mesh
    parallelize_module(model, ranks, {"moe.experts": ExpertParallel()})


def shard_experts(model: Model, runtime: Runtime, dim: int) -> None:
    parallelize_module(model, runtime.ep_mesh, {"moe.experts": ExpertParallel()})
    mesh, placement = runtime.efsdp_mesh, Shard(dim)
    fully_shard(model.moe.experts, mesh=mesh, shard_placement_fn=lambda _: placement)


def plain(model: Model, runtime: Runtime) -> None:
    shard_experts_over_all(model, runtime)


def fsdp(model: Model, runtime: Runtime) -> None:
    shard_experts_over_all(model, runtime)
    tables = set(model.moe.experts.parameters())
    fully_shard(model, mesh=runtime.dp_mesh, ignored_params=tables)


def hybrid_fsdp(model: Model, runtime: Runtime) -> None:
    shard_experts_over_all(model, runtime)
    for layer in (model.wide, model.narrow):
        fully_shard(layer, mesh=runtime.mesh)


def ep_and_fsdp_by_rows(model: Model, runtime: Runtime) -> None:
    shard_experts(model, runtime, 0)
    fully_shard(model, mesh=runtime.dp_mesh)


def ep_and_fsdp_by_columns(model: Model, runtime: Runtime) -> None:
    shard_experts(model, runtime, 1)
    fully_shard(model, mesh=runtime.dp_mesh)


def tp_and_fsdp(model: Model, runtime: Runtime) -> None:
    shard_experts(model, runtime, 0)
    parallelize_module(
        model, runtime.ep_mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()}
    )
    for layer in (model.wide, model.narrow):
        fully_shard(layer, mesh=runtime.efsdp_mesh)


LAYOUTS = (
    plain,
    fsdp,
    hybrid_fsdp,
    ep_and_fsdp_by_rows,
    ep_and_fsdp_by_columns,
    tp_and_fsdp,
)


def clip_all_layouts() -> dict[str, tuple[float, float]]:
    """Norm on this rank, and largest error of a clipped gradient, by layout."""
    runtime = rank_runtime(ep_size=2)
    alone = new_model()
    backward(alone)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM).item()
    found = {"one process": (expected, 0.0)}
    twice_cut = 0
    for layout in LAYOUTS:
        model = new_model()
        layout(model, runtime)
        backward(model)
        norm = clip_grad_norm_(model.parameters(), MAX_NORM).item()
        errors = [
            (whole(one.grad) - whole(other.grad)).abs().max().item()
            for one, other in zip(model.parameters(), alone.parameters(), strict=True)
        ]
        grads = [one.grad for one in model.parameters() if isinstance(one.grad, DTensor)]
        twice_cut += sum("_StridedShard" in repr(grad.placements) for grad in grads)
        found[layout.__name__] = norm, max(errors)
    assert twice_cut >= 4, "no gradient is cut twice along one dimension"
    return found


@pytest.mark.filterwarnings("ignore")
def test_every_layout_has_the_norm_of_one_process(rank_pools: RankPools) -> None:
    for found in rank_pools.run(4, clip_all_layouts):
        expected, _ = found["one process"]
        assert expected > 2 * MAX_NORM
        for layout, (norm, error) in found.items():
            assert norm == pytest.approx(expected, rel=1e-12), layout
            assert error < 1e-12 * MAX_NORM, layout


def clip_two_stages() -> tuple[float, Tensor]:
    """Norm, and factor of each gradient, relative to what is expected, on two stages of two ranks.

    The stages differ in their numbers of parameters.
    """
    runtime = rank_runtime(ep_size=2)
    stage = runtime.rank // 2
    layers = [nn.Linear(4, 6), nn.Linear(6, 4, bias=False)]
    draw = torch.Generator().manual_seed(2)
    for parameter in (one for layer in layers for one in layer.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    grads = [one.grad for layer in layers for one in layer.parameters()]
    expected = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
    own = layers[stage]
    plain = [one.grad for one in own.parameters() if one.grad is not None]
    fully_shard(own, mesh=runtime.ep_mesh)
    for parameter, grad in zip(own.parameters(), plain, strict=True):
        parameter.grad = distribute_tensor(grad, runtime.ep_mesh, [Shard(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stages = runtime.efsdp_mesh.get_group()
        norm = clip_grad_norm_(own.parameters(), 1.0, pp_group=stages)
    clipped = whole(next(own.parameters()).grad) / plain[0]
    return norm.item() / expected.item(), clipped * expected


def test_norm_over_pipeline_stages(rank_pools: RankPools) -> None:
    for norm, factors in rank_pools.run(4, clip_two_stages):
        assert norm == pytest.approx(1.0, rel=1e-6)
        torch.testing.assert_close(factors, torch.ones_like(factors))


def clip_without_a_gradient() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    table = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    if dist.get_rank() == 0:
        table.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    return clip_grad_norm_(table, 0.5).item()


def test_a_rank_without_a_gradient_takes_part(rank_pools: RankPools) -> None:
    assert rank_pools.run(2, clip_without_a_gradient) == [pytest.approx(2**0.5)] * 2


def norms_in(dtype: torch.dtype) -> tuple[float, float, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    whole = (300 + torch.randn(1000, 64)).to(dtype)
    parameter = nn.Parameter(
        distribute_tensor(torch.zeros(1000, 64, dtype=dtype), mesh, [Shard(0)])
    )
    grad = distribute_tensor(whole, mesh, [Shard(0)])
    parameter.grad = grad
    norm = clip_grad_norm_([parameter], max_norm=1000.0).item()
    return norm, whole.double().norm().item(), grad.full_tensor()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_neither_overflow_nor_round(dtype: torch.dtype, rank_pools: RankPools) -> None:
    for norm, expected, clipped in rank_pools.run(2, norms_in, dtype):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert clipped.double().norm().item() == pytest.approx(1000.0, rel=4e-3)


def clip_on_some_ranks() -> None:
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("efsdp", "ep"))
    table = distribute_tensor(torch.ones(2, 2), square["ep"], [Shard(0)])
    parameter = nn.Parameter(table)
    parameter.grad = table.clone()
    message = "gradients on a mesh of 1 of 2 ranks must be equal on the other ranks"
    with pytest.warns(UserWarning, match=message):
        clip_grad_norm_([parameter], 1.0)


def test_gradients_that_nothing_averages_are_warned_of(rank_pools: RankPools) -> None:
    rank_pools.run(2, clip_on_some_ranks)


def test_small_gradients_are_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert abs(clip_grad_norm_([parameter, nn.Parameter(torch.zeros(1))], 1.0) - 0.5) < 1e-6
    torch.testing.assert_close(parameter.grad, torch.tensor([0.3, 0.4]))


def test_one_tensor_and_one_tensor_twice() -> None:
    one = nn.Parameter(torch.zeros(2))
    for parameters in (one, [one], [one, one], iter([one])):
        one.grad = torch.tensor([3.0, 4.0])
        assert clip_grad_norm_(parameters, 1.0).item() == pytest.approx(5.0)
        torch.testing.assert_close(one.grad, torch.tensor([0.6, 0.8]))


def test_a_tensor_as_max_norm() -> None:
    for max_norm in (torch.tensor(0.5), torch.tensor(1, dtype=torch.int32)):
        by_tensor, by_number = (nn.Parameter(torch.zeros(5)) for _ in range(2))
        by_tensor.grad, by_number.grad = torch.arange(5.0), torch.arange(5.0)
        clip_grad_norm_(by_tensor, max_norm)
        clip_grad_norm_(by_number, max_norm.item())
        assert torch.equal(by_tensor.grad, by_number.grad)


def test_no_gradients() -> None:
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0
