"""Several optimizers of one model as one, as far as a checkpoint needs it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from flash_moe.arguments import check_type
from flash_moe.optim.table_optimizer import TableOptimizer


class JoinedOptimizers:
    """Parameter groups and state of optimizers, one after another.

    Args:
        optimizers: one, or several that have no parameter in common.

    Raises:
        TypeError: these are no optimizers.
        ValueError: there is none, or two have the same parameter.
    """

    def __init__(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        several = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        if not isinstance(several, Sequence):
            check_type("optimizer", several, Optimizer)
        for one in several:
            check_type("optimizer", one, Optimizer)
        if not several:
            raise ValueError("optimizer must be an optimizer or several, got none")
        self._optimizers = list(several)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(set(parameters)) < len(parameters) and len(several) > 1:
            raise ValueError(
                "optimizer must be optimizers of different parameters, got two with the same"
            )

    @property
    def kind(self) -> str:
        """Class names of the optimizers, separated by commas."""
        return ", ".join(type(one).__name__ for one in self._optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self._optimizers for group in one.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: value for one in self._optimizers for name, value in one.defaults.items()}

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """State of each parameter that has any; changes of an inner dict are the optimizer's."""
        return {parameter: own for one in self._optimizers for parameter, own in one.state.items()}

    @property
    def fixed_state(self) -> dict[Tensor, set[str]]:
        """Names of the state of each table whose optimizer has state from the start."""
        return {
            table: set(own)
            for one in self._optimizers
            if isinstance(one, TableOptimizer)
            for table, own in one.state.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what `Optimizer.state_dict` does, with the parameters of all numbered in turn."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for one in self._optimizers:
            packed = one.state_dict()
            for number, own in packed["state"].items():
                state[first + number if isinstance(number, int) else number] = own
            for group in packed["param_groups"]:
                numbers = [first + number for number in group["params"]]
                groups.append({**group, "params": numbers})
            first += _num_parameters(one)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give each optimizer its part of `state_dict`; the first also state of no parameter."""
        groups = list(state_dict["param_groups"])
        left = dict(state_dict["state"])
        first = 0
        parts: list[dict[str, Any]] = []
        for one in self._optimizers:
            end = first + _num_parameters(one)
            numbers = [number for number in range(first, end) if number in left]
            own_state = {number - first: left.pop(number) for number in numbers}
            own_groups = [
                {**group, "params": [number - first for number in group["params"]]}
                for group in groups[: len(one.param_groups)]
            ]
            parts.append({"state": own_state, "param_groups": own_groups})
            del groups[: len(one.param_groups)]
            first = end
        parts[0]["state"].update(left)
        for one, part in zip(self._optimizers, parts, strict=True):
            one.load_state_dict(part)


def _num_parameters(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
