"""What the op is compared with: gathers in plain PyTorch, compiled ones, functions of others."""

import importlib
import os
import shutil

import torch
from torch import Tensor

from flash_moe.bench.cases import Func
from flash_moe.ops.flash_expert import triton_flash_expert_func
from flash_moe.ops.naive import naive_expert_func

SUBJECT = "flash_moe"


def elementwise_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The op as products and sums that a compiler can fuse with the gathers; no empty slots."""
    scores_TK = (down_weights[indices] * hidden_states[:, None, :]).sum(-1)
    activations_TK = torch.nn.functional.silu(scores_TK) * routing_weights
    return (activations_TK[..., None] * up_weights[indices]).sum(1)


def embedding_bag_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The op with `embedding_bag`, which sums table rows without copying them; no empty slots."""
    scores_TK = torch.bmm(down_weights[indices], hidden_states.unsqueeze(-1)).squeeze(-1)
    activations_TK = torch.nn.functional.silu(scores_TK) * routing_weights
    return torch.nn.functional.embedding_bag(
        indices, up_weights, mode="sum", per_sample_weights=activations_TK
    )


def variants(
    device: torch.device, with_peers: bool, against: dict[str, Func]
) -> tuple[dict[str, Func], list[str]]:
    """The op first, then its peers, by name; and a line for each peer that had to be left out."""
    chosen: dict[str, Func] = {SUBJECT: triton_flash_expert_func}
    left_out = []
    if with_peers:
        chosen["gather and matmul"] = naive_expert_func
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cuda" or shutil.which(compiler):
            # Or shapes of earlier cases would make it compile for dynamic ones, or not at all.
            torch.compiler.reset()
            chosen["torch.compile"] = torch.compile(elementwise_expert_func, dynamic=False)
        else:
            left_out.append(f"torch.compile left out: no C++ compiler ({compiler}) found")
        if device.type == "cpu":
            chosen["bmm and embedding_bag"] = embedding_bag_expert_func
    return chosen | against, left_out


def load_func(name: str) -> Func:
    """The function that "package.module:function" names.

    Raises:
        ValueError: it is no such name, cannot be imported, or is not callable.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"expected package.module:function, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    # Whatever a module does when it is imported.
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        missing = "is not callable" if hasattr(module, function_name) else "does not exist"
        raise ValueError(f"{function_name!r} of module {module_name!r} {missing}")
    return function
