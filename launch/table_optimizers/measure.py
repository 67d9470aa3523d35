"""Error, times and memory of the tables' part of a training step, for each optimizer."""

import gc
import statistics
from dataclasses import dataclass, field

import torch

from flash_moe.bench.measure import Clock, peak_bytes, reset_peak_bytes, unobserved
from table_optimizers.training import (
    KINDS,
    PARTS,
    Case,
    LayerInputs,
    Training,
    make_inputs,
)
from table_optimizers.verify import verify


@dataclass
class Result:
    """Measurements of one optimizer.

    table_dtype: without "torch.".
    failure: "out of memory" if dense gradients did not fit, otherwise empty.
    error: largest relative error of the change of table rows in two steps.
    seconds: time of each repeat, by part; on CUDA each on a device that is busy until the part has
        been launched. "frozen backward" is a backward pass that gives tables no gradients.
    table_bytes, state_bytes: of all tables, and of the optimizer's state.
    peak_bytes: peak memory of a training step beyond its inputs, tables and state included.
    """

    table_dtype: str
    failure: str = ""
    error: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    table_bytes: int = 0
    state_bytes: int = 0
    peak_bytes: int = 0

    def median(self, part: str) -> float:
        """Median seconds of a part."""
        return statistics.median(self.seconds[part])

    def tables_median(self) -> float:
        """Median seconds of the tables' part: backward - frozen backward + clip + step."""
        columns = (self.seconds[part] for part in ("backward", "frozen backward", "clip", "step"))
        return statistics.median(
            backward - frozen + clip + step
            for backward, frozen, clip, step in zip(*columns, strict=True)
        )


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Result]:
    """Verify and measure each optimizer, one after the other, so that one set of tables must fit.

    Returns:
        Results by name of the optimizer.

    Raises:
        RuntimeError: an optimizer's result is wrong.
    """
    inputs, clock = make_inputs(case, device), Clock(device)
    results = {}
    for kind in KINDS:
        # Optimizers are in cycles of references.
        gc.collect()
        result = Result(str(case.table_dtype(kind)).removeprefix("torch."))
        try:
            _measure_kind(kind, case, inputs, clock, repeats, result)
        except torch.OutOfMemoryError:
            if kind is not torch.optim.AdamW:
                raise
            result = Result(result.table_dtype, failure="out of memory")
        results[kind.__name__] = result
    return results


def _measure_kind(
    kind: type[torch.optim.Optimizer],
    case: Case,
    inputs: list[LayerInputs],
    clock: Clock,
    repeats: int,
    result: Result,
) -> None:
    device = inputs[0].grad.device
    inputs_bytes = reset_peak_bytes(device)
    training = Training(case, inputs, kind)
    result.error = verify(training)
    state = [one for by_name in training.optimizer.state.values() for one in by_name.values()]
    result.table_bytes = sum(table.nbytes for table in training.tables)
    result.state_bytes = sum(one.nbytes for one in state if isinstance(one, torch.Tensor))
    training.frozen_backward(unobserved)
    reset_peak_bytes(device)
    training.step(unobserved)
    result.peak_bytes = peak_bytes(device) - inputs_bytes
    for _ in range(repeats):
        _, seconds = training.step(clock)
        seconds["frozen backward"] = training.frozen_backward(clock)
        for part, one in seconds.items():
            result.seconds[part].append(one)
