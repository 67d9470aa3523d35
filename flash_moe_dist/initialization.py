"""Initialization of models that are built on the meta device because they exceed one device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flash_moe.arguments import check_type, checked_device, checked_number
from flash_moe.layers import normal_rows


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Allocate a model that was built on the meta device on `device`, and initialize it.

        with torch.device("meta"):
            model = Transformer(config)
        parallelize_module(model, ep_mesh, {"layers.*.moe.experts": ExpertParallel()})
        torch.manual_seed(seed)
        materialize(model, device)

    Calls `reset_parameters` of every module that has one, children before their parents. Each
    rank fills its own shard of the tables of `flash_moe.FlashExperts`, with values that do not
    depend on the number of ranks; a module of your own gets the same by calling
    `init_normal_rows_` in its `reset_parameters`. Seed every rank alike: all other parameters are
    then equal on all ranks. Tied parameters stay tied.

    Apply `fully_shard` to the tables (over the efsdp axis) before or after this call, and to all
    other parameters after it.

    Args:
        model: its parameters and buffers may be on any device; their values are discarded.
        device: where to allocate them.

    Raises:
        TypeError: `model` is no module, or `device` no device.
        ValueError: `device` is meta or none that PyTorch knows, or a module has parameters or
            buffers of its own but no `reset_parameters`.
    """
    check_type("model", model, nn.Module)
    if checked_device("device", device).type == "meta":
        raise ValueError(f"device must be one that holds values, got {device}")
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not hasattr(module, "reset_parameters"):
            raise ValueError(
                f"every module with parameters or buffers must have reset_parameters, "
                f"{type(module).__name__} at {name!r} has none"
            )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    model.to_empty(device=device)
    for name, *others in names.values():
        # to_empty allocates a tied parameter once for each of its names.
        for other in others:
            path, _, attribute = other.rpartition(".")
            model.get_submodule(path).register_parameter(attribute, model.get_parameter(name))

    def reset(module: nn.Module) -> None:
        resettable: Any = module
        if hasattr(module, "reset_parameters"):
            resettable.reset_parameters()

    model.apply(reset)


def init_normal_rows_(table: Tensor, std: float) -> None:
    """Fill this rank's shard of a table with normal values of mean 0.

    Every element gets the value that it would have if the whole table were on one device, as drawn
    by `flash_moe.layers.normal_rows.normal_rows_`: seed every rank alike before.

    Args:
        table: (E, H), a DTensor on any mesh or a plain tensor.
        std: standard deviation.

    Raises:
        TypeError: `table` is no tensor of floats, or `std` no number.
        ValueError: `table` does not have two dimensions, or `std` is negative.
    """
    check_type("table", table, Tensor)
    if table.ndim != 2 or not table.is_floating_point():
        error = ValueError if table.is_floating_point() else TypeError
        raise error(
            "table must be floats of shape (num_experts, hidden_size), got "
            f"{table.dtype} of shape {tuple(table.shape)}"
        )
    std = checked_number("std", std, 0)
    if not isinstance(table, DTensor):
        normal_rows.normal_rows_(table, std)
        return
    _, (first_row, first_column) = compute_local_shape_and_global_offset(
        table.shape, table.device_mesh, table.placements
    )
    shape = (table.shape[0], table.shape[1])
    normal_rows.normal_rows_(table.to_local(), std, first_row, first_column, shape)
