"""Base of the tables' optimizers: whatever does not depend on the formula."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from flash_moe.arguments import checked_int, checked_number
from flash_moe.ops.pair_grads import PairGrad, RowGrads, collect_pair_grads, stop_collecting
from flash_moe.ops.row_updates import RowState, RowUpdateOptions, has_row_kernels, update_rows
from flash_moe.optim.split_float import join, split
from flash_moe.optim.stochastic_rounding import round_stochastically, start_of_seed

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# Names of state that does not depend on the formula.
BETAS = "betas must be two numbers from 0 to less than 1"
LOW_BITS, TOUCHES = "low_bits", "touches"


class StateTensor(NamedTuple):
    """Shape and dtype of a state tensor; the first dimension is that of the rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TouchedRows(NamedTuple):
    """Rows of a table that a step updates.

    weights, grads: (U, H) float32, or float64 for such tables.
    norms: (U,), of the rows of `grads`.
    state: rows of the state tensors, by name.
    """

    weights: Tensor
    grads: Tensor
    norms: Tensor
    state: dict[str, Tensor]


class TableOptimizer(torch.optim.Optimizer, ABC):
    """Optimizer whose backward pass gives gradients as pairs, and whose step sums them row by row.

    As long as it lives, backward passes of its tables leave `.grad` as None and give their
    gradients here. `step` applies and drops them, `zero_grad` drops them; several backward passes
    before a step add up. A step whose gradients were clipped by a norm that is not finite changes
    nothing; without clipping, a row whose gradient is not finite is left as it is (in float32, also
    one longer than 1.8e19).

    Option `max_row_norm` of a group scales the gradient of each row down to that norm, as it is
    summed: cheaper than a norm over all gradients, for which rows are summed twice.

    A bfloat16 table keeps the 16 bits that it lacks as state, `low_bits`: both are the float32
    weights exactly (`split_float`), so that training is that of a float32 table whose forward and
    backward passes read it rounded. With `stochastic_rounding` it has none of these, and each
    update is rounded up or down at random.

    Args:
        params: tables (E, H) of bfloat16, float32 or float64, plain or sharded on dim 0 by
            `flash_moe_dist.ExpertParallel`; or groups of them.
        defaults: options of groups.
        stochastic_rounding: round updates of bfloat16 tables at random.
        seed: of the random numbers.

    Raises:
        TypeError: a parameter has another dtype, or an option another type.
        ValueError: a parameter is no table, is not sharded on dim 0, or an option is out of range.
    """

    # Attributes that copies have too.
    settings: tuple[str, ...] = ("stochastic_rounding", "seed")
    # Names of the state that averages gradients, and of that which adds up or averages squares.
    first_moment: str | None = None
    second_moment: str | None = None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        stochastic_rounding: bool,
        seed: int,
    ) -> None:
        if not isinstance(stochastic_rounding, bool):
            raise TypeError(
                f"stochastic_rounding must be True or False, got {stochastic_rounding!r}"
            )
        self.stochastic_rounding = stochastic_rounding
        self.seed = checked_int("seed", seed, 0)
        super().__init__(params, defaults)

    @abstractmethod
    def state_of(self, num_rows: int, hidden_size: int) -> dict[str, StateTensor]:
        """Name the state tensors of a table."""

    @abstractmethod
    def update(self, touched: TouchedRows, group: dict[str, Any]) -> None:
        """Update touched rows and their state by the options of a group.

        Weights change in place, new state goes into `touched.state`; tensors may be overwritten.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            checked_number("lr", group["lr"], 0)
            for name in ("eps", "weight_decay", "max_row_norm"):
                # As numbers of Python, which a step need not read from a GPU.
                if name in group and (name != "max_row_norm" or group[name] is not None):
                    group[name] = checked_number(name, group[name], 0)
            if "betas" in group:
                group["betas"] = checked_betas(group["betas"])
            for table in group["params"]:
                _check_table(table)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._collect(group["params"])
        for table in group["params"]:
            self.state[table] = self._new_state(table)

    def _collect(self, tables: list[Tensor]) -> None:
        """Take gradients of the tables as pairs, for as long as this optimizer lives."""
        for table in tables:
            collect_pair_grads(table).num_optimizers += 1
        finalize(self, stop_collecting, list(tables)).atexit = False

    def _new_state(self, table: Tensor) -> dict[str, Tensor]:
        wanted = self.state_of(*table.shape)
        if table.dtype == torch.bfloat16:
            if self.stochastic_rounding:
                wanted[TOUCHES] = StateTensor((table.shape[0],), torch.int32)
            else:
                # As bytes, since neither gloo nor NCCL takes 16-bit integers.
                shape = (table.shape[0], 2 * table.shape[1])
                wanted[LOW_BITS] = StateTensor(shape, torch.uint8)
        return {name: _zeros_like_rows(table, one) for name, one in wanted.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the touched rows, and drop the gradients.

        Raises:
            RuntimeError: a table has a dense gradient, or another dtype than before. No table has
                been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [(table, group) for group in self.param_groups for table in group["params"]]
        # All before any is changed.
        for table, _ in tables:
            self._check_before_step(table)
        for table, group in tables:
            self._step_table(table, group)
        return loss

    def _check_before_step(self, table: Tensor) -> None:
        if table.grad is not None:
            raise RuntimeError(
                f"tables must have no dense gradient with {type(self).__name__}, got one of shape "
                f"{tuple(table.shape)}: it is no table of FlashExperts, or fully_shard shards it, "
                "or it is used other than by the expert op, or was so before the optimizer was made"
            )
        keeps_bits = table.dtype == torch.bfloat16 and not self.stochastic_rounding
        if keeps_bits != (LOW_BITS in self.state[table]):
            raise RuntimeError(
                "tables must have the dtype that they had when their optimizer was made, got "
                f"{table.dtype}: convert the model before"
            )

    def _step_table(self, table: Tensor, group: dict[str, Any]) -> None:
        collected = collect_pair_grads(table)
        state = {name: _local(one) for name, one in self.state[table].items()}
        local, first_row = _local(table), _first_row(table)
        joined = collected.joined()
        if joined is not None and _has_kernel(joined, local):
            options = RowUpdateOptions(
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group.get("eps", 0.0),
                max_row_norm=group["max_row_norm"],
                betas=group.get("betas", (0.0, 0.0)),
                seed_bits=start_of_seed(self.seed),
                first_row=first_row,
            )
            low_bits = state.get(LOW_BITS)
            arrays = RowState(
                local,
                low_bits=None if low_bits is None else low_bits.view(torch.int16),
                first=state.get(self.first_moment or ""),
                second=state.get(self.second_moment or ""),
                touches=state.get(TOUCHES),
            )
            update_rows(joined.values, joined.rows, joined.pairs, collected.factor, arrays, options)
        elif collected.factor is None or bool(collected.factor.isfinite()):
            for touched in collected.row_grads():
                self._update_by_operations(local, touched, state, group, first_row)
        collected.clear()

    def _update_by_operations(
        self,
        table: Tensor,
        touched: RowGrads,
        state: dict[str, Tensor],
        group: dict[str, Any],
        first_row: int,
    ) -> None:
        rows, grads = touched
        norms = torch.linalg.vector_norm(grads, dim=1)
        if not bool((is_finite := norms.isfinite()).all()):
            rows, grads, norms = rows[is_finite], grads[is_finite], norms[is_finite]
        if group["max_row_norm"] is not None:
            shrink = (group["max_row_norm"] / (norms + 1e-6)).clamp(max=1.0)
            grads, norms = grads.mul_(shrink.unsqueeze(1)), norms * shrink
        before = {name: one.index_select(0, rows) for name, one in state.items()}
        after = dict(before)
        weights = table.index_select(0, rows)
        if LOW_BITS in before:
            weights = join(weights, before[LOW_BITS].view(torch.int16))
        wide = torch.promote_types(weights.dtype, torch.float32)
        weights, grads, norms = weights.to(wide), grads.to(wide), norms.to(wide)
        self.update(TouchedRows(weights, grads, norms, after), group)
        if LOW_BITS in before:
            weights, low = split(weights)
            after[LOW_BITS] = low.view(torch.uint8)
        elif table.dtype == torch.bfloat16:
            touches = before[TOUCHES]
            after[TOUCHES] = touches + 1
            weights = round_stochastically(weights, rows + first_row, touches, self.seed)
        table.index_copy_(0, rows, weights.to(table.dtype))
        for name, one in state.items():
            one.index_copy_(0, rows, after[name].to(one.dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all tables."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for table in group["params"]:
                collect_pair_grads(table).clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load options and state, each tensor in its own dtype; see `torch.optim.Optimizer`.

        PyTorch's own would convert state of floats to the dtype of the table.
        """
        kept = {table: dict(state) for table, state in self.state.items()}
        tables = [table for group in self.param_groups for table in group["params"]]
        ids = [one for group in state_dict["param_groups"] for one in group["params"]]
        states = [state_dict["state"].get(one, {}) for one in ids]
        for table, loaded in zip(tables, states, strict=False):
            own = kept[table]
            if loaded.keys() != own.keys():
                raise ValueError(
                    f"state_dict must hold {_listed(own)} of each table, got {_listed(loaded)}"
                )
            shapes = [(name, one.shape, loaded[name].shape) for name, one in own.items()]
            for name, wanted, got in shapes:
                if wanted != got:
                    raise ValueError(
                        f"state_dict must hold {name} of shape {tuple(wanted)}, got {tuple(got)}"
                    )
        # Refuses other numbers of tables.
        super().load_state_dict(state_dict)
        for table, loaded in zip(tables, states, strict=True):
            for name, tensor in kept[table].items():
                tensor.copy_(loaded[name])
            self.state[table] = kept[table]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # State from before there was this option.
            group.setdefault("max_row_norm", None)
            self._collect(group["params"])


def checked_betas(betas: Any) -> tuple[float, float]:
    """Return two numbers in [0, 1); raise ValueError or TypeError for anything else."""
    try:
        first, second = (checked_number("betas", one, 0) for one in betas)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{BETAS}, got {betas!r}") from error
    if first >= 1 or second >= 1:
        raise ValueError(f"{BETAS}, got {betas!r}")
    return first, second


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _check_table(table: Tensor) -> None:
    if table.dtype not in DTYPES:
        raise TypeError(f"tables must be bfloat16, float32 or float64, got {table.dtype}")
    if table.ndim != 2:
        raise ValueError(
            "tables must have shape (num_experts, hidden_size), got a parameter of shape "
            f"{tuple(table.shape)}: give other parameters to an optimizer of torch.optim"
        )
    placements: Any = getattr(table, "placements", ())
    mesh: Any = getattr(table, "device_mesh", None)
    for dimension, placement in enumerate(placements):
        if not placement.is_shard(0) and mesh.size(dimension) > 1:
            raise ValueError(
                "tables must be sharded on dim 0 over all axes of their mesh, as ExpertParallel "
                f"alone shards them, got {placements} over {mesh}: give tables that several ranks "
                "hold, or that fully_shard shards, to an optimizer of torch.optim"
            )
    if len(placements) > 1:
        raise ValueError(f"tables must be on a mesh of one axis, got {mesh}")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _has_kernel(grad: PairGrad, table: Tensor) -> bool:
    return (
        table.dtype != torch.float64
        and table.stride(1) == 1
        and has_row_kernels(grad.values, grad.rows)
    )


def _first_row(table: Any) -> int:
    """Row of the whole table at which this rank's part begins."""
    if not hasattr(table, "to_local"):
        return 0
    ranks = table.device_mesh.size()
    return -(-table.shape[0] // ranks) * table.device_mesh.get_local_rank()


def _zeros_like_rows(table: Any, wanted: StateTensor) -> Tensor:
    """Zeros that are placed as the rows of the table."""
    local = _local(table)
    shape = (local.shape[0], *wanted.shape[1:])
    zeros = torch.zeros(shape, dtype=wanted.dtype, device=local.device)
    if local is table:
        return zeros
    # A DTensor, without importing torch.distributed.
    return type(table.data).from_local(
        zeros,
        table.device_mesh,
        table.placements,
        run_check=False,
        shape=torch.Size(wanted.shape),
        stride=torch.empty(wanted.shape, device="meta").stride(),
    )
