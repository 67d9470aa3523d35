"""Metrics of a run: metrics.jsonl with a line for each step, their plot, a summary of speed."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from flash_moe_dist.phases import PHASES
from out_folder import replacing

Line = dict[str, Any]
# Figures of `flash_moe_dist.ExpertLoad` that are plotted, with title and label of the axis.
LOAD_PANELS = {
    "usage": ("Usage: experts that got any routing weight", "share of experts"),
    "unevenness": ("Unevenness of the experts' routing weights", "nats"),
}


class MetricsFile:
    """File with a line of JSON for each step, written by one process.

    A number that is not finite is written as null, as JSON has none.

    `lines` holds all of them as dictionaries, including those written before a restart.

    Args:
        last_step: step of the checkpoint that the run resumes from. Lines of later steps, which the
            run repeats, are dropped, as is an incomplete line.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.lines = [line for line in _read(path) if line["step"] <= last_step]
        with replacing(path) as file:
            file.write("".join(map(_as_json, self.lines)).encode())
        self._file = path.open("a", buffering=1)

    def close(self) -> None:
        self._file.close()

    def write(self, line: Line) -> None:
        """Append a line, and flush it to the file."""
        self.lines.append(line)
        self._file.write(_as_json(line))


def plot_metrics(path: Path, lines: list[Line], single_token_entropy: float) -> None:
    """Plot training and validation loss against the step, and the load of experts below.

    Usage and unevenness have a panel each, with the mean of the layers and their range at each
    validation. A panel is left out where no line has its figures, as in runs of older versions.
    """
    from matplotlib.figure import Figure

    training = {line["step"]: line["loss"] for line in lines if line["loss"] is not None}
    validation = {
        line["step"]: line["validation_loss"]
        for line in lines
        if line.get("validation_loss") is not None
    }
    panels = {name: found for name in LOAD_PANELS if (found := _of_layers(lines, name))}
    figure = Figure(figsize=(7, 4 + 2.2 * len(panels)), layout="constrained")
    grid = figure.subplots(
        1 + len(panels), sharex=True, squeeze=False, height_ratios=[2, *(1 for _ in panels)]
    )
    axes, *load_axes = grid[:, 0]
    axes.plot(list(training), list(training.values()), linewidth=0.8, label="training")
    axes.plot(list(validation), list(validation.values()), "o-", label="validation")
    axes.axhline(single_token_entropy, color="grey", linestyle="--", label="single-token entropy")
    axes.set(title="Loss", ylabel="nats per token")
    axes.legend()
    for axes, (name, of_layers) in zip(load_axes, panels.items(), strict=True):
        title, label = LOAD_PANELS[name]
        steps, layers = list(of_layers), list(of_layers.values())
        low, high, color = list(map(min, layers)), list(map(max, layers)), "tab:orange"
        # With an outline, as the range of a single validation has no area.
        axes.fill_between(
            steps, low, high, color=color, alpha=0.25, linewidth=2, label="range of layers"
        )
        axes.plot(
            steps, list(map(statistics.fmean, layers)), ".-", color=color, label="mean of layers"
        )
        axes.set(title=f"{title}, at validation", ylabel=label, ylim=(0, None))
        axes.legend()
    grid[-1, 0].set(xlabel="step")
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def speed(lines: list[Line]) -> str:
    """Summarize speed: median tokens/s, and the median share of a step that each phase takes.

    Medians leave out the slow first steps, which also compile. A phase's shares of the forward and
    the backward pass are added.
    """
    rate = statistics.median(line["tokens_per_s"] for line in lines) if lines else 0.0
    shares: dict[str, list[float]] = {}
    for line in lines:
        of_step: dict[str, float] = {}
        for name, share in line.get("share_of_step", {}).items():
            both = name.removesuffix("_backward")
            of_step[both] = of_step.get(both, 0.0) + share
        for name, share in of_step.items():
            shares.setdefault(name, []).append(share)
    medians = [f"{name} {statistics.median(shares[name]):.1%}" for name in PHASES if name in shares]
    text = f"median of {rate:,.0f} tokens/s"
    return f"{text}; phases of expert layers, of a step: {', '.join(medians)}" if medians else text


def _of_layers(lines: list[Line], name: str) -> dict[int, list[float]]:
    """Collect the figure of that name of the layers, by the step of the validation."""
    found = {}
    for line in lines:
        values = [load.get(name) for load in line.get("expert_load", {}).values()]
        if finite := [value for value in values if value is not None and math.isfinite(value)]:
            found[line["step"]] = finite
    return found


def _as_json(line: Line) -> str:
    """Serialize a line as strict JSON."""
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> list[Line]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
