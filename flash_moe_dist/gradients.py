"""Gradient clipping for models whose parameters live on different device meshes."""

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

# Mesh and placements of a DTensor; None for a plain tensor.
Layout = tuple[DeviceMesh, tuple[Placement, ...]] | None


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their total 2-norm is at most `max_norm`; return the norm.

    Gradients may be plain tensors and DTensors on any meshes. The norm counts every element of
    the model once and is the same on every rank. Collective over the meshes of the gradients; no
    host sync.

    Replicated gradients must already be equal on all ranks that hold them: average plain
    gradients over all ranks first, and apply `fully_shard` over the efsdp axis to tables that
    several ranks hold. Warns about gradients on a mesh that lacks some of the ranks.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: largest norm after scaling.

    Returns:
        The norm before scaling: shape (), summed in float64, rounded to float32 unless a
        parameter is float64.
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
            f"gradients on a mesh of {grad.device_mesh.size()} of {dist.get_world_size()} ranks "
            "must be equal on the other ranks: apply fully_shard over the efsdp axis to the "
            "experts",
            stacklevel=3,
        )
    return grad.device_mesh, tuple(grad.placements)


def _sum_of_squares(grads: list[Tensor], layout: Layout) -> Tensor:
    """Sum of squares over all ranks, () float64, of gradients of one layout.

    In float16 a norm overflows at 65,504; in bfloat16 every rank would round its part.
    """
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
            # Not by redistributing a DTensor: torch 2.11 leaks a kilobyte for each.
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dimension))
    return total


def _without_partial(grad: DTensor) -> list[Placement]:
    return [Replicate() if one.is_partial() else one for one in grad.placements]
