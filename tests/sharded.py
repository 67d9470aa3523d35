"""Experts of a test case, sharded over the ranks at hand."""

from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from ranks import rank_device, rank_runtime
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from flash_moe import FlashExperts
from flash_moe_dist import ExpertParallel
from flash_moe_dist.agreement import gather_objects


def shard_experts(
    case: Case, dispatcher: Any = "all_to_all", mesh: DeviceMesh | None = None, **options: Any
) -> FlashExperts:
    """The tables of `case`, the same on every rank, sharded over `mesh` or else all ranks.

    options: arguments of `ExpertParallel`.
    """
    num_experts, hidden_size = case.down_weights.shape
    device = rank_device()
    experts = FlashExperts(num_experts, hidden_size, device, case.down_weights.dtype)
    with torch.no_grad():
        experts.down_weights.copy_(case.down_weights)
        experts.up_weights.copy_(case.up_weights)
    parallelize_module(
        experts, mesh or rank_runtime().ep_mesh, ExpertParallel(dispatcher, **options)
    )
    return experts


def whole(tensor: Tensor | None) -> Tensor:
    """All of a tensor, sharded or not, on the CPU."""
    assert tensor is not None
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    if gloo_on_cuda():
        local = tensor.to_local().detach().cpu()
        return torch.cat(gather_objects(local, tensor.device_mesh.get_group()))
    return tensor.full_tensor().detach().cpu()


def gloo_on_cuda() -> bool:
    """Whether gloo serves tensors on GPUs, where DTensor's own collectives crash (torch 2.11)."""
    return rank_device().type == "cuda" and dist.get_backend() == "gloo"


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
