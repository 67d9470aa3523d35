"""What was measured of each variant: rows of compare.json, and how they are compared."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from out_folder import replacing


@dataclass
class Point:
    """State of a variant after `step` steps.

    tokens: trained on so far.
    seconds: time of the training steps so far, without validations; the first few, which compile,
        count as the median of the others.
    training_loss: mean of the steps since the point before, in nats per token; None at step 0.
    validation_loss: in nats per token.
    usage, unevenness: of each layer, over the validation; empty without experts.
    batches: SHA-256 of all inputs and targets trained on so far.
    """

    step: int
    tokens: int
    seconds: float
    training_loss: float | None
    validation_loss: float
    usage: list[float]
    unevenness: list[float]
    batches: str


@dataclass
class Row:
    """A variant that was trained with one seed and number of experts.

    settings: sizes and options of its model, and its learning rates.
    environment: device, versions and commit.
    tokens_per_s: by the median duration of a step.
    peak_bytes: GPU memory allocated at most; None on CPUs.
    finished: whether all steps were taken.
    failure: why training ended before; None if it did not, or for lack of time.
    """

    variant: str
    num_experts: int
    seed: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    parameters: int = 0
    curve: list[Point] = field(default_factory=list)
    tokens_per_s: float = 0.0
    peak_bytes: int | None = None
    finished: bool = False
    failure: str | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.variant, self.num_experts, self.seed

    def at_step(self, step: int) -> Point:
        return next(point for point in self.curve if point.step == step)

    def loss_at_seconds(self, seconds: float) -> float:
        """Validation loss after that many seconds of training, on straight lines between points."""
        times = [point.seconds for point in self.curve]
        losses = [point.validation_loss for point in self.curve]
        return float(np.interp(seconds, times, losses))


class Common(NamedTuple):
    """Where rows are compared: the last step that all have reached, and the end of the fastest."""

    step: int
    seconds: float


def common(rows: Iterable[Row]) -> Common:
    """Find where to compare `rows`, all finished."""
    steps = set.intersection(*({point.step for point in row.curve} for row in rows))
    return Common(max(steps), min(row.curve[-1].seconds for row in rows))


def check_same_batches(rows: Iterable[Row]) -> None:
    """Raise RuntimeError unless rows of one seed saw the same tokens up to each step."""
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for row in rows:
        for point in row.curve:
            before, batches = seen.setdefault((row.seed, point.step), (row.variant, point.batches))
            if batches != point.batches:
                raise RuntimeError(
                    f"{row.variant} and {before} were trained on different tokens up to step "
                    f"{point.step} with seed {row.seed}"
                )


def write_rows(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write compare.json: `header`, then the rows, each with the figures of its last point."""
    content = {**header, "rows": [{**asdict(row), "final": _final(row)} for row in rows]}
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def read_rows(path: Path, header: dict[str, Any]) -> list[Row]:
    """Read rows of an earlier call; none if there are none.

    Raises:
        ValueError: the file is damaged, or its header has other options or data than `header`.
    """
    try:
        content = json.loads(path.read_bytes())
        before = {part: content[part] for part in ("options", "data")}
        rows = [
            Row(
                **{name: value for name, value in row.items() if name not in ("curve", "final")},
                curve=[Point(**point) for point in row["curve"]],
            )
            for row in content["rows"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out must be free of damaged files, got {path}: {error!r}") from error
    for part, values in before.items():
        for name, value in header[part].items():
            if values.get(name) != value:
                raise ValueError(
                    f"--out {path.parent} holds results with {name} = {values.get(name)}, here "
                    f"{value}: another --out starts a new comparison"
                )
    return rows


def _final(row: Row) -> dict[str, float | None]:
    if not row.curve:
        return {}
    last = row.curve[-1]
    figures: dict[str, float | None] = {
        "training_loss": last.training_loss,
        "validation_loss": last.validation_loss,
        "seconds": last.seconds,
    }
    if last.usage:
        figures["usage"] = statistics.mean(last.usage)
        figures["unevenness"] = statistics.mean(last.unevenness)
        figures["max_unevenness"] = max(last.unevenness)
    return figures
