"""Initial values of models whose tables are too large for one device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flash_moe.layers import normal_rows


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model that was built on the meta device memory on `device`, and its first values.

        with torch.device("meta"):
            model = Transformer(config)
        parallelize_module(model, ep_mesh, {"layers.*.moe.experts": ExpertParallel()})
        torch.manual_seed(seed)
        materialize(model, device)

    Calls `reset_parameters` of every module that has one, of children before their parents.
    Tables of `flash_moe.FlashExperts` are filled shard by shard, with values that do not depend
    on the number of ranks; call `init_normal_rows_` in the `reset_parameters` of a module of your
    own. Seed every rank alike; parameters that are no tables are then equal on all. Parameters
    that are one under several names stay one. Apply `fully_shard` to these after this, to tables
    (over another axis) before or after.

    Raises:
        ValueError: a module has parameters or buffers of its own, and no `reset_parameters`.
    """
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
        # to_empty gives each name memory of its own.
        for other in others:
            path, _, last = other.rpartition(".")
            model.get_submodule(path).register_parameter(last, model.get_parameter(name))

    def reset(module: nn.Module) -> None:
        resettable: Any = module
        if hasattr(module, "reset_parameters"):
            resettable.reset_parameters()

    model.apply(reset)


def init_normal_rows_(table: Tensor, std: float) -> None:
    """`flash_moe.layers.normal_rows.normal_rows_` for a table (E, H) sharded over any meshes."""
    if not isinstance(table, DTensor):
        normal_rows.normal_rows_(table, std)
        return
    _, (first_row, first_column) = compute_local_shape_and_global_offset(
        table.shape, table.device_mesh, table.placements
    )
    shape = (table.shape[0], table.shape[1])
    normal_rows.normal_rows_(table.to_local(), std, first_row, first_column, shape)
