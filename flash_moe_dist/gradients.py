"""Gradient clipping for models whose parameters live on different device meshes."""

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from flash_moe.arguments import check_type, checked_number, tensors_of
from flash_moe.ops.pair_grads import pair_grads_of

# Mesh and placements of a DTensor; None for a plain tensor.
Layout = tuple[DeviceMesh, tuple[Placement, ...]] | None


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    pp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients so that their total 2-norm is at most `max_norm`; return the norm.

    Gradients may be plain tensors and DTensors on any meshes, with any placements. The norm counts
    every element of the model once and is the same on every rank. Collective over the meshes of
    the parameters and over `pp_group`; no host sync, unless `max_norm` is a tensor on a GPU, which
    the host reads, as in torch.nn.utils.clip_grad_norm_.

    Replicated gradients must already be equal on all ranks that hold them: average plain
    gradients over all ranks first, and apply `fully_shard` over the efsdp axis to tables that
    several ranks hold. Warns about gradients on a mesh that lacks some of the ranks.

    Args:
        parameters: one, or several; those without a gradient are skipped, repeated ones count once.
        max_norm: largest norm after scaling, a number or a tensor of shape ().
        pp_group: this rank and its counterparts in the other pipeline stages, whose parameters
            count too; a parameter that two stages hold counts twice. None without pipeline stages.

    Returns:
        The norm before scaling: shape (), summed in float64, rounded to float32 unless a
        parameter is float64 on this rank.

    Raises:
        TypeError: `parameters` are no tensors, a gradient is sparse or complex, `max_norm` is no
            number, or `pp_group` no process group.
        ValueError: `max_norm` is negative or not a number in floating point.
    """
    unique = dict.fromkeys(tensors_of(parameters))
    max_norm = checked_number("max_norm", max_norm, 0)
    if pp_group is not None:
        check_type("pp_group", pp_group, dist.ProcessGroup)
    for parameter in unique:
        _check_gradient(parameter)
    stages = 1 if pp_group is None else pp_group.size()
    by_layout: dict[Layout, list[Tensor]] = {}
    for parameter in unique:
        # By the parameter where it has no gradient: ranks may differ in that, and all take part.
        layout = _layout(parameter if parameter.grad is None else parameter.grad)
        by_layout.setdefault(layout, []).append(parameter)
        has_gradient = parameter.grad is not None or pair_grads_of(parameter) is not None
        if layout is not None and has_gradient:
            _warn_of_missing_ranks(layout[0].size() * stages)
    device = next((parameter.device for parameter in unique), None)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for layout, group in by_layout.items():
        total += _sum_of_squares(group, layout).to(device)
    if pp_group is not None:
        dist.all_reduce(total, group=pp_group)
    norm = total.sqrt()
    if not any(parameter.dtype == torch.float64 for parameter in unique):
        norm = norm.to(torch.float32)
    for group in by_layout.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    for parameter in unique:
        if (collected := pair_grads_of(parameter)) is not None:
            # As clip_grads_with_norm_, but for a norm that is not finite: it marks the gradients.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            collected.scale(torch.where(norm.isfinite(), factor, torch.nan))
    return norm


def _check_gradient(parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
        raise TypeError(
            f"gradients must be dense and real, got one of layout {grad.layout} and dtype "
            f"{grad.dtype} for a parameter of shape {tuple(parameter.shape)}"
        )


def _layout(tensor: Tensor) -> Layout:
    if not isinstance(tensor, DTensor):
        return None
    return tensor.device_mesh, tuple(tensor.placements)


def _warn_of_missing_ranks(ranks: int) -> None:
    if ranks < dist.get_world_size():
        warnings.warn(
            f"gradients on a mesh of {ranks} of {dist.get_world_size()} ranks must be equal on "
            "the other ranks: apply fully_shard over the efsdp axis to the experts",
            stacklevel=3,
        )


def _sum_of_squares(parameters: list[Tensor], layout: Layout) -> Tensor:
    """Sum of squares over all ranks, () float64, of the gradients of parameters of one layout.

    In float16 a norm overflows at 65,504; in bfloat16 every rank would round its share.
    """
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        if (collected := pair_grads_of(parameter)) is not None:
            total += collected.sum_of_squares(device)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads:
        # On GPUs as fast as memory is read; torch.linalg.vector_norm takes 5 times as long.
        norms = torch._foreach_norm([_local(one) for one in grads], 2, torch.float64)
        total += torch.stack(norms).square().sum()
    mesh, placements = layout or (None, ())
    for dimension, placement in enumerate(placements):
        # Not is_shard(): a _StridedShard, which cuts a dimension a second time, is none.
        if not (placement.is_replicate() or placement.is_partial()):
            # Not by redistributing a DTensor: torch 2.11 leaks a kilobyte for each.
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dimension))
    return total


def _local(grad: Tensor) -> Tensor:
    """This rank's shard of a gradient, with partial sums added up."""
    if not isinstance(grad, DTensor):
        return grad
    if any(placement.is_partial() for placement in grad.placements):
        whole = [Replicate() if one.is_partial() else one for one in grad.placements]
        grad = grad.redistribute(placements=whole)
    return grad.to_local()
