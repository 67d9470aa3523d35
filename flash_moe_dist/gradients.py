"""Gradient norms over parameters that live on different meshes."""

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

# None for plain tensors.
Layout = tuple[DeviceMesh, tuple[Placement, ...]] | None


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their total 2-norm is at most `max_norm`; return the norm.

    Gradients may be plain tensors and DTensors on any meshes; the norm counts every element of
    the model once, and is the same on every rank. Plain gradients must be equal on every rank:
    average them first. So must those of a table be on the ranks that hold copies of it, which
    `fully_shard` over the efsdp axis sees to; gradients on a mesh of some of the ranks only are
    warned of. Collective over the meshes of the gradients; no host sync.

    Returns:
        The norm before scaling, (), float64 if a gradient is, else float32, summed in float64.
    """
    by_layout: dict[Layout, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_layout.setdefault(_layout(parameter.grad), []).append(parameter)
    squares = [
        _sum_of_squares([p.grad for p in group if p.grad is not None], layout)
        for layout, group in by_layout.items()
    ]
    total = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    if not any(p.dtype == torch.float64 for group in by_layout.values() for p in group):
        total = total.to(torch.float32)
    for group in by_layout.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def _layout(grad: Tensor) -> Layout:
    if not isinstance(grad, DTensor):
        return None
    if grad.device_mesh.size() < dist.get_world_size():
        warnings.warn(
            f"gradients on {grad.device_mesh.size()} of {dist.get_world_size()} ranks must be "
            "equal on the others: apply fully_shard over the efsdp axis to the experts",
            stacklevel=3,
        )
    return grad.device_mesh, tuple(grad.placements)


def _sum_of_squares(grads: list[Tensor], layout: Layout) -> Tensor:
    """() float64: in float16 a norm overflows at 65,504, in bfloat16 it is rounded by each rank."""
    local = [
        one.redistribute(placements=_without_partial(one)).to_local()
        if isinstance(one, DTensor)
        else one
        for one in grads
    ]
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in local]
    total = torch.stack(norms).square().sum()
    mesh, placements = layout or (None, ())
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            # Not by a DTensor: torch 2.11 keeps a kilobyte of each.
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dimension))
    return total


def _without_partial(grad: DTensor) -> list[Placement]:
    return [Replicate() if one.is_partial() else one for one in grad.placements]
