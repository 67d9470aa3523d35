"""Parameter groups for optimizers of torch.optim over plain tensors and DTensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flash_moe.arguments import tensors_of


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Group parameters by device mesh, so that each group can be updated in one fused call.

        optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), fused=True)

    With `fused=True` or `foreach=True`, optimizers refuse a group that mixes plain tensors and
    DTensors, or DTensors of several meshes. Fused, they read and write a table once per step, and
    allocate no temporaries of its size.

    Args:
        parameters: parameters of a model that is sharded already.

    Returns:
        A group of plain tensors and one for each mesh, in the order of their first parameters.

    Raises:
        TypeError: `parameters` are not several tensors.
        ValueError: a parameter is in float16. Adam and its kin keep moments in the parameter's
            dtype, and squares of gradients below 1.7e-4 are 0 in float16: a row that no token
            has reached becomes NaN, and with `fused=True` one that few tokens reach gets steps
            thousands of times too long.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    if isinstance(parameters, Tensor):
        raise TypeError("parameters must be several tensors, got one: put it into a list")
    for parameter in tensors_of(parameters):
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"parameters must not be float16, got one of shape {tuple(parameter.shape)}: "
                "squares of gradients vanish in it; keep tables in float32, under torch.autocast "
                "if hidden states are float16"
            )
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        by_mesh.setdefault(mesh, []).append(parameter)
    return [{"params": group} for group in by_mesh.values()]
