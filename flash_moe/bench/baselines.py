"""Functions that the op is compared with: plain PyTorch, compiled PyTorch, and any the user names.

T tokens, H hidden size, E experts, K experts per token. All take the arguments of the op:
hidden_states (T, H), down_weights and up_weights (E, H), indices and routing_weights (T, K), and
return (T, H).
"""

import importlib
import os
import shutil

import torch
from torch import Tensor

from flash_moe.bench.cases import Func
from flash_moe.ops.flash_expert import triton_flash_expert_func
from flash_moe.ops.naive import gather_rows, naive_expert_func

# Name of the variant that the benchmark is about; all others are baselines.
OURS = "flash_moe"


def elementwise_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The op as elementwise products and sums, which a compiler can fuse with the gathers.

    Does not support empty slots (indices of -1).
    """
    scores_TK = (gather_rows(down_weights, indices) * hidden_states[:, None, :]).sum(-1)
    activations_TK = torch.nn.functional.silu(scores_TK) * routing_weights
    return (activations_TK[..., None] * gather_rows(up_weights, indices)).sum(1)


def embedding_bag_expert_func(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """The op with `embedding_bag`, which sums rows of the up table without copying them.

    Does not support empty slots (indices of -1).
    """
    down_TKH = gather_rows(down_weights, indices)
    scores_TK = torch.bmm(down_TKH, hidden_states.unsqueeze(-1)).squeeze(-1)
    activations_TK = torch.nn.functional.silu(scores_TK) * routing_weights
    return torch.nn.functional.embedding_bag(
        indices, up_weights, mode="sum", per_sample_weights=activations_TK
    )


def variants(
    device: torch.device, with_baselines: bool, against: dict[str, Func]
) -> tuple[dict[str, Func], list[str]]:
    """Choose what to measure on `device`: the op, then the baselines.

    Args:
        with_baselines: include the built-in baselines.
        against: further baselines by name.

    Returns:
        Functions by name, the op first; and a message for each baseline that cannot run here.
    """
    chosen: dict[str, Func] = {OURS: triton_flash_expert_func}
    left_out = []
    if with_baselines:
        chosen["gather and matmul"] = naive_expert_func
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cuda" or shutil.which(compiler):
            # Cached shapes of earlier cases would reach the recompile limit.
            torch.compiler.reset()
            chosen["torch.compile"] = torch.compile(elementwise_expert_func, dynamic=False)
        else:
            left_out.append(f"torch.compile left out: no C++ compiler ({compiler}) found")
        if device.type == "cpu":
            chosen["bmm and embedding_bag"] = embedding_bag_expert_func
    return chosen | against, left_out


def load_func(name: str) -> Func:
    """Import the function that "package.module:function" names.

    Raises:
        ValueError: `name` does not have this form, the module cannot be imported, or it has no
            such callable.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"expected package.module:function, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    # A module may raise anything while it is imported.
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        missing = "is not callable" if hasattr(module, function_name) else "does not exist"
        raise ValueError(f"{function_name!r} of module {module_name!r} {missing}")
    return function
