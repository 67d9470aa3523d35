"""Checks of the expert op's arguments by shape, dtype and device, which cost no device time.

Whether ids and offsets are in range depends on the data: `flash_moe.ops.indices` checks that.
"""

import torch
from torch import Tensor

from flash_moe.arguments import FLOAT_DTYPES, check_dense, dtype_names

INDEX_DTYPES = (torch.int32, torch.int64)
MAX_EXPERTS = 2**31 - 1


def check_expert_inputs(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
) -> None:
    """Raise unless the arguments of `triton_flash_expert_func` fit together.

    Raises:
        TypeError: an argument is not a plain dense tensor, or has an unsupported dtype.
        ValueError: a shape or a device does not fit the others.
    """
    _check_tables(hidden_states, down_weights, up_weights)
    check_routing(hidden_states, indices, routing_weights)
    _check_devices(
        hidden_states=hidden_states,
        down_weights=down_weights,
        up_weights=up_weights,
        indices=indices,
        routing_weights=routing_weights,
    )


def check_routing(hidden_states: Tensor, indices: Tensor, routing_weights: Tensor) -> None:
    """Raise as `check_expert_inputs` unless tokens, ids and routing weights fit together."""
    check_dtype("hidden_states", hidden_states, FLOAT_DTYPES)
    check_dtype("indices", indices, INDEX_DTYPES)
    check_dtype("routing_weights", routing_weights, FLOAT_DTYPES)
    check_ndim("hidden_states", hidden_states, 2, "(num_tokens, hidden_size)")
    check_ndim("indices", indices, 2, "(num_tokens, num_experts_per_tok)")
    num_tokens = hidden_states.shape[0]
    if indices.shape[0] != num_tokens:
        raise ValueError(
            f"indices must have one row for each of the {num_tokens} rows of hidden_states, "
            f"got shape {tuple(indices.shape)}"
        )
    if routing_weights.shape != indices.shape:
        raise ValueError(
            f"routing_weights must have the shape of indices, {tuple(indices.shape)}, "
            f"got {tuple(routing_weights.shape)}"
        )


def check_ragged_inputs(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    row_offsets: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
) -> None:
    """Raise as `check_expert_inputs` unless the arguments of `ragged_flash_expert_func` fit."""
    _check_tables(hidden_states, down_weights, up_weights)
    check_dtype("row_offsets", row_offsets, INDEX_DTYPES)
    check_dtype("expert_ids", expert_ids, INDEX_DTYPES)
    check_dtype("routing_weights", routing_weights, FLOAT_DTYPES)
    check_ndim("expert_ids", expert_ids, 1, "(num_pairs,)")
    num_tokens = hidden_states.shape[0]
    if tuple(row_offsets.shape) != (num_tokens + 1,):
        raise ValueError(
            f"row_offsets must have shape (num_tokens + 1,) = ({num_tokens + 1},), "
            f"got {tuple(row_offsets.shape)}"
        )
    if num_tokens == 0 and len(expert_ids) > 0:
        raise ValueError(f"expert_ids must be empty without tokens, got {len(expert_ids)} ids")
    if routing_weights.shape != expert_ids.shape:
        raise ValueError(
            f"routing_weights must have the shape of expert_ids, {tuple(expert_ids.shape)}, "
            f"got {tuple(routing_weights.shape)}"
        )
    _check_devices(
        hidden_states=hidden_states,
        down_weights=down_weights,
        up_weights=up_weights,
        row_offsets=row_offsets,
        expert_ids=expert_ids,
        routing_weights=routing_weights,
    )


def _check_tables(hidden_states: Tensor, down_weights: Tensor, up_weights: Tensor) -> None:
    check_dtype("hidden_states", hidden_states, FLOAT_DTYPES)
    check_dtype("down_weights", down_weights, FLOAT_DTYPES)
    check_dtype("up_weights", up_weights, FLOAT_DTYPES)
    check_ndim("hidden_states", hidden_states, 2, "(num_tokens, hidden_size)")
    check_ndim("down_weights", down_weights, 2, "(num_experts, hidden_size)")
    hidden_size = hidden_states.shape[1]
    if down_weights.shape[1] != hidden_size:
        raise ValueError(
            f"down_weights must have rows of hidden_size = {hidden_size} as hidden_states has, "
            f"got shape {tuple(down_weights.shape)}"
        )
    if up_weights.shape != down_weights.shape:
        raise ValueError(
            f"up_weights must have the shape of down_weights, {tuple(down_weights.shape)}, "
            f"got {tuple(up_weights.shape)}"
        )
    if down_weights.shape[0] > MAX_EXPERTS:
        raise ValueError(
            f"down_weights must have at most {MAX_EXPERTS} rows, got {down_weights.shape[0]}"
        )


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    check_dense(name, tensor)
    # By name, since this package does not import torch.distributed.
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: call the module whose tables "
            "flash_moe_dist.ExpertParallel has sharded, or pass full_tensor(); to_local() would "
            "be this rank's rows alone"
        )
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name} must have one of the dtypes {dtype_names(allowed)}, got {tensor.dtype}"
        )


def check_ndim(name: str, tensor: Tensor, ndim: int, shape: str) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_devices(**tensors: Tensor) -> None:
    expected = tensors["hidden_states"].device
    for name, tensor in tensors.items():
        if tensor.device != expected:
            raise ValueError(
                f"{name} must be on {expected}, where hidden_states is, got {tensor.device}"
            )
