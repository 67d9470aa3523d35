"""Gradient norm and clipping over plain, sharded and differently sharded gradients."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import RankPools
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flash_moe_dist.gradients import clip_grad_norm_


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


def test_no_gradients() -> None:
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0
