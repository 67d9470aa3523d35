"""Sums over data-parallel ranks, which routers need for their statistics."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flash_moe import ProductKeyRouter
from flash_moe.arguments import check_type
from flash_moe_dist.dispatch.pass_order import GroupPasses, host_waits, wait_for_collective


def sync_routers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Have all `ProductKeyRouter`s of `model` add up their statistics over the ranks of `mesh`.

    Not needed for a `FlashMoE` whose experts are sharded by `ExpertParallel`: its router uses the
    mesh of their tables. Needed where experts are replicated, or where ranks with other tokens hold
    the same experts without `fully_shard`.

    Args:
        mesh: all data-parallel ranks, of any number of dimensions; ranks with the same tokens, such
            as those of a tensor-parallel axis, may be on it or not.

    Raises:
        TypeError: `model` is no module, or `mesh` no device mesh.
    """
    check_type("model", model, nn.Module)
    check_type("mesh", mesh, DeviceMesh)
    for module in model.modules():
        if isinstance(module, ProductKeyRouter):
            module.sum_over_ranks = SumOverMesh(mesh)


@dataclass(frozen=True)
class SumOverMesh:
    """Function that adds up a tensor over a mesh, in place."""

    mesh: DeviceMesh

    def __call__(self, sums: Tensor) -> None:
        sum_over_mesh(sums, self.mesh)

    def __deepcopy__(self, memo: dict[int, object]) -> "SumOverMesh":
        # A copied model uses the same process groups.
        return self


@torch.compiler.disable
def sum_over_mesh(sums: Tensor, mesh: DeviceMesh) -> None:
    """Add up a tensor over all ranks of a mesh, in place; collective, the device waits."""
    for group in mesh.get_all_groups():
        if dist.get_world_size(group) == 1:
            continue
        if host_waits(group, sums.is_cuda):
            GroupPasses.of(group).begin_sums()
            work = dist.all_reduce(sums, group=group, async_op=True)
            assert work is not None
            wait_for_collective(work, group)
        else:
            dist.all_reduce(sums, group=group)
