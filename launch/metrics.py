"""Metrics of a run: metrics.jsonl with a line for each step, the loss curve, a summary of speed."""

import json
import statistics
from pathlib import Path
from typing import Any

from flash_moe_dist.phases import PHASES
from out_folder import replacing

Line = dict[str, Any]


class MetricsFile:
    """File with a line of JSON for each step, written by one process.

    `lines` holds all of them as dictionaries, including those written before a restart.

    Args:
        last_step: step of the checkpoint that the run resumes from. Lines of later steps, which the
            run repeats, are dropped, as is an incomplete line.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.lines = [line for line in _read(path) if line["step"] <= last_step]
        with replacing(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._file = path.open("a", buffering=1)

    def close(self) -> None:
        self._file.close()

    def write(self, line: Line) -> None:
        """Append a line, and flush it to the file."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")


def plot_losses(path: Path, lines: list[Line], single_token_entropy: float) -> None:
    """Plot training and validation loss against the step."""
    from matplotlib.figure import Figure

    training = {line["step"]: line["loss"] for line in lines if line["loss"] is not None}
    validation = {
        line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
    }
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(list(training), list(training.values()), linewidth=0.8, label="training")
    axes.plot(list(validation), list(validation.values()), "o-", label="validation")
    axes.axhline(single_token_entropy, color="grey", linestyle="--", label="single-token entropy")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
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
