"""State of an optimizer by names of parameters, saved and restored exactly as it is.

`get_state_dict` of torch.distributed.checkpoint gives an optimizer without state one, by a step
with zero gradients. That is not the state of a new optimizer where the step decays weights into its
moments, and what it makes depends on which parameters are frozen or have gradients. Here, a
parameter without state is saved and restored without. Entries have the same names in a checkpoint,
`optimizer.state.PARAMETER.KEY` and `optimizer.param_groups.NUMBER.OPTION`.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import empty as empty_dtensor

from flash_moe_dist.joined_optimizers import JoinedOptimizers

STATE = "optimizer.state."


def optimizer_state(model: nn.Module, optimizer: JoinedOptimizers) -> dict[str, Any]:
    """Collect what a checkpoint stores of an optimizer; changes nothing.

    Returns:
        "kind", the name of its class, or of several; "state", that of each parameter that has any,
        by the parameter's (first) name in `model`; and "param_groups", with names as "params".

    Raises:
        ValueError: the optimizer has a parameter that is not one of `model`.
        TypeError: a dict has a key that is no str.
    """
    packed = optimizer.state_dict()
    names = _group_names(_names(model), optimizer)
    by_id = {
        number: name
        for group, own in zip(packed["param_groups"], names, strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    state = {by_id.get(number, number): one for number, one in packed["state"].items()}
    groups = [
        {**group, "params": own} for group, own in zip(packed["param_groups"], names, strict=True)
    ]
    storable: dict[str, Any] = _storable(
        {"kind": optimizer.kind, "state": state, "param_groups": groups}, "optimizer"
    )
    return storable


class SavedOptimizer:
    """An optimizer in a checkpoint, to be read in two parts: its options, then its state.

        saved = SavedOptimizer(metadata, path, model, optimizer)
        load(saved.options, ...)
        saved.match_groups()
        entries = saved.state_entries()
        load(entries, ...)
        saved.restore(entries)

    Nothing is changed before `restore`.

    Args:
        metadata, path: metadata and folder of the checkpoint.
        model, optimizer: what to restore.

    Raises:
        ValueError: see `optimizer_state`.

    Attributes:
        options: entries of the checkpoint by name, to be read before `match_groups`.
    """

    def __init__(
        self, metadata: Metadata, path: Path, model: nn.Module, optimizer: JoinedOptimizers
    ) -> None:
        self._metadata, self._path, self._optimizer = metadata, path, optimizer
        names = _names(model)
        self._parameters = {name: one for one, several in names.items() for name in several}
        self._first_name = {name: names[one][0] for name, one in self._parameters.items()}
        self._group_names = _group_names(names, optimizer)
        self._groups: list[dict[str, Any]] = []
        self.options = {
            name: torch.empty(one.size, dtype=one.properties.dtype, device="cpu")
            if isinstance(one, TensorStorageMetadata)
            else None
            for name, one in metadata.state_dict_metadata.items()
            if name.startswith("optimizer.") and not name.startswith(STATE)
        }

    def match_groups(self) -> None:
        """Find the saved options of each parameter group, once `options` has been read.

        Raises:
            ValueError: the optimizer is of another kind, its parameters are in other groups, or
                its groups have options that were not saved.
        """
        saved = self._nested(self.options)
        kind, here = saved.get("kind"), self._optimizer.kind
        if kind not in (None, here):
            raise ValueError(
                f"{self._path} was saved from a different model or optimizer: "
                f"optimizer.kind: saved {kind}, here {here}"
            )
        groups = saved.get("param_groups", [])
        names = [group["params"] for group in groups]
        first_names = [sorted(self._first_name.get(name, name) for name in own) for own in names]
        left = list(range(len(groups)))
        self._groups = []
        for number, own in enumerate(self._group_names):
            same = next((one for one in left if first_names[one] == sorted(own)), None)
            if same is None:
                raise ValueError(_other_groups(names, self._group_names, self._path))
            left.remove(same)
            # Another version of PyTorch may have more options. Without a kind, the optimizer may
            # be another one.
            may_lack = self._optimizer.defaults.keys() if kind else set()
            self._groups.append(self._options_of(number, groups[same], may_lack))
        if left:
            raise ValueError(_other_groups(names, self._group_names, self._path))

    def state_entries(self) -> dict[str, Any]:
        """Name the entries that hold state, each with an uninitialized tensor, or None for others.

        Raises:
            ValueError: the state of a table is not what its optimizer keeps.

        Tensors get the layout of what the optimizer has in their place, else, where they have the
        shape of their parameter, its layout; others are whole on every rank.
        """
        groups = {
            parameter: group
            for own, group in zip(self._optimizer.param_groups, self._groups, strict=True)
            for parameter in own["params"]
        }
        now = self._optimizer.state
        entries: dict[str, Any] = {}
        keys: dict[Any, set[str]] = {}
        for name, one in self._metadata.state_dict_metadata.items():
            if name.startswith(STATE):
                owner, *key = self._metadata.planner_data[name][2:]
                parameter = self._parameters.get(owner)
                keys.setdefault(parameter, set()).add(".".join(map(str, key)))
                if not isinstance(one, TensorStorageMetadata):
                    entries[name] = None
                elif parameter is None:
                    entries[name] = torch.empty(one.size, dtype=one.properties.dtype, device="cpu")
                else:
                    own = now.get(parameter, {}).get(key[0]) if len(key) == 1 else None
                    entries[name] = _empty(one, key, parameter, groups[parameter], own)
        for table, wanted in self._optimizer.fixed_state.items():
            if (saved := keys.get(table, set())) != wanted:
                raise ValueError(
                    f"{self._path} was saved from a different optimizer: its tables have "
                    f"{_listed(saved)}, here {_listed(wanted)}: stochastic_rounding and the dtype "
                    "of the tables must be the same"
                )
        return entries

    def restore(self, entries: Mapping[str, Any]) -> None:
        """Replace the optimizer's state and options.

        entries: those of `state_entries`, read.
        """
        state = {
            self._first_name.get(name, name): one
            for name, one in self._nested(entries).get("state", {}).items()
        }
        numbers = {name: number for number, name in enumerate(chain(*self._group_names))}
        self._optimizer.load_state_dict(
            {
                "state": {numbers.get(name, name): one for name, one in state.items()},
                "param_groups": [
                    {**group, "params": [numbers[name] for name in own]}
                    for group, own in zip(self._groups, self._group_names, strict=True)
                ],
            }
        )
        all_state, own_dtypes = self._optimizer.state, self._optimizer.fixed_state
        for name in state.keys() & numbers.keys():
            parameter = self._parameters[name]
            now = all_state[parameter]
            for key, value in () if parameter in own_dtypes else state[name].items():
                # load_state_dict casts all but "step" to the dtype of the parameter.
                if isinstance(value, Tensor) and now[key].dtype != value.dtype:
                    now[key] = value

    def _nested(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries by name as the nested dict and lists that were saved."""
        nested: Any = unflatten_state_dict(dict(entries), self._metadata.planner_data)
        found: dict[str, Any] = nested.get("optimizer", {})
        return found

    def _options_of(
        self, number: int, saved: Mapping[str, Any], may_lack: Iterable[str]
    ) -> dict[str, Any]:
        """Options of the group of that number: the saved ones, and its own that `saved` lacks."""
        own = self._optimizer.param_groups[number]
        missing = own.keys() - saved.keys() - set(may_lack) - {"params", "param_names"}
        if missing:
            raise ValueError(
                f"{self._path} has no {', '.join(sorted(missing))} in param_groups[{number}], "
                "which the optimizer has here: if a learning rate scheduler was added since, load "
                "first, then make the scheduler; otherwise the checkpoint was saved from a "
                "different model or optimizer"
            )
        options = {**own, **saved}
        for name, value in options.items():
            if isinstance(value, Tensor) and isinstance(own.get(name), Tensor):
                options[name] = value.to(own[name].device)
        # Names of parameters may differ where parameters are tied.
        if "param_names" in own:
            options["param_names"] = own["param_names"]
        else:
            options.pop("param_names", None)
        return options


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no state"


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter, without those of wrappers such as a compiled module."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("model must be sharded by fully_shard, got FullyShardedDataParallel")
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).extend(_get_fqns(model, name))
    return names


def _group_names(
    names: Mapping[nn.Parameter, list[str]], optimizer: JoinedOptimizers
) -> list[list[str]]:
    """First names of the parameters of each group."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"optimizer must have parameters of the model only, got one of shape "
                    f"{tuple(parameter.shape)} in param_groups[{number}] that is none; "
                    "parallelize_module and fully_shard replace parameters: make the optimizer "
                    "after them"
                )
    return [
        [names[parameter][0] for parameter in group["params"]] for group in optimizer.param_groups
    ]


def _storable(value: Any, name: str) -> Any:
    """Return `value` with Python's numbers for NumPy's; raise TypeError for keys that are no str.

    torch.distributed.checkpoint would turn those into strings.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} must have strings as keys, got {key!r}")
        return {key: _storable(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [_storable(one, f"{name}.{number}") for number, one in enumerate(value)]
    # A number of NumPy, which PyTorch does without.
    if getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _other_groups(saved: list[list[str]], own: list[list[str]], path: Path) -> str:
    """Message about parameters that are in other groups than saved."""
    there, here = (
        {name: i for i, names in enumerate(one) for name in names} for one in (saved, own)
    )
    where = [
        f"{name} was in {_group(there.get(name))}, is in {_group(here.get(name))}; "
        for name in [*here, *there]
        if here.get(name) != there.get(name)
    ]
    return (
        f"{path} was saved with {_sizes(saved)}, the optimizer has {_sizes(own)}: "
        f"{''.join(where[:1])}load into an optimizer with the groups of that time, then change them"
    )


def _group(number: int | None) -> str:
    return "none" if number is None else f"param_groups[{number}]"


def _sizes(groups: list[list[str]]) -> str:
    sizes = ", ".join(str(len(group)) for group in groups)
    return f"parameter groups of {sizes} parameters"


def _empty(
    saved: TensorStorageMetadata,
    key: list[Any],
    parameter: nn.Parameter,
    group: Mapping[str, Any],
    own: Any,
) -> Tensor:
    """Allocate a tensor of a parameter's state as the optimizer would, uninitialized.

    own: what the optimizer has under that key now, if anything.
    """
    size, dtype = saved.size, saved.properties.dtype
    if isinstance(own, DTensor) and own.shape == size:
        # Sharded as the optimizer shards it, which may be unlike the parameter.
        return torch.empty_like(own, dtype=dtype)
    is_step = key == ["step"]
    # As Optimizer.load_state_dict does: kernels that read the step need it on their device.
    on_cpu = is_step and not (group.get("capturable") or group.get("fused"))
    if size == parameter.shape and not is_step:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if isinstance(parameter, DTensor) and len(size) and not is_step:
        mesh = parameter.device_mesh
        whole = [Replicate()] * mesh.ndim
        return empty_dtensor(size, dtype=dtype, device_mesh=mesh, placements=whole)
    return torch.empty(size, dtype=dtype, device="cpu" if on_cpu else parameter.device)
