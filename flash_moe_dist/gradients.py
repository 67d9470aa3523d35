"""Gradient norms over parameters that live on different meshes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their total 2-norm is at most `max_norm`; return the norm.

    Gradients may be plain tensors and DTensors on any meshes; the norm counts every element of
    the model once, and is the same on every rank. Plain gradients must be equal on every rank:
    average them first. Collective over the meshes of the gradients.
    """
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in with_grad:
        grad = parameter.grad
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(
            parameter
        )
    norms = []
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
