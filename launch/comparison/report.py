"""Table and plot of a comparison."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from comparison.results import Point, Row, common
from out_folder import replacing


def table(rows: list[Row]) -> str:
    """Markdown table of the finished rows, means over seeds, and a line for each other row."""
    finished = [row for row in rows if row.finished]
    lines = [_table(finished)] if finished else []
    for row in rows:
        if not row.finished:
            step = row.curve[-1].step if row.curve else 0
            reason = row.failure or f"ended after step {step}"
            lines.append(
                f"not finished: {row.variant}, {_experts(row)} experts, seed {row.seed}: {reason}"
            )
    return "\n".join(lines)


def _table(rows: list[Row]) -> str:
    step, seconds = common(rows)
    tokens = rows[0].at_step(step).tokens

    def layers(row: Row, figure: Callable[[Point], list[float]], of: Callable[..., float]) -> float:
        values = figure(row.at_step(step))
        return of(values) if values else float("nan")

    columns: dict[str, tuple[Callable[[Row], float], str]] = {
        f"loss at {tokens:,} tokens": (lambda row: row.at_step(step).validation_loss, ".4f"),
        f"loss at {seconds:.1f} s": (lambda row: row.loss_at_seconds(seconds), ".4f"),
        "usage": (lambda row: layers(row, lambda point: point.usage, np.mean), ".3f"),
        "unevenness": (lambda row: layers(row, lambda point: point.unevenness, np.mean), ".2f"),
        "largest": (lambda row: layers(row, lambda point: point.unevenness, max), ".2f"),
        "tokens/s": (lambda row: row.tokens_per_s, ",.0f"),
        "seconds": (lambda row: row.curve[-1].seconds, ".1f"),
        "peak GB": (lambda row: (row.peak_bytes or float("nan")) / 1e9, ".1f"),
        "parameters": (lambda row: row.parameters, ",.0f"),
    }
    cells = [["variant", "experts", "seeds", *columns]]
    for same in _by_variant(rows):
        texts = [_mean([value(row) for row in same], form) for value, form in columns.values()]
        cells.append([same[0].variant, _experts(same[0]), str(len(same)), *texts])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def plot(path: Path, rows: list[Row]) -> None:
    """Plot validation loss over tokens and over seconds, and mean usage, a line for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_tokens, by_seconds, usage = figure.subplots(1, 3)
    for number, same in enumerate(_by_variant(rows)):
        for row in same:
            label = f"{row.variant}, {_experts(row)} experts" if row is same[0] else None
            style = {"color": f"C{number % 10}", "label": label, "linewidth": 1}
            # The loss at step 0 would hide the differences.
            points = row.curve[1:]
            losses = [point.validation_loss for point in points]
            by_tokens.plot([point.tokens for point in points], losses, **style)
            by_seconds.plot([point.seconds for point in points], losses, **style)
            if row.num_experts:
                tokens = [point.tokens for point in row.curve]
                usage.plot(tokens, [np.mean(point.usage) for point in row.curve], **style)
    by_tokens.set(xlabel="tokens", ylabel="validation loss, nats per token")
    by_seconds.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
    usage.set(xlabel="tokens", ylabel="share of experts used", ylim=(0, 1.02))
    by_tokens.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _by_variant(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in their seeds alone, together."""
    ordered = sorted(rows, key=lambda row: row.num_experts)
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in ordered:
        groups.setdefault((row.variant, row.num_experts), []).append(row)
    return list(groups.values())


def _mean(values: list[float], form: str) -> str:
    """Mean, and standard deviation of several values; empty where there is no value."""
    if np.isnan(values).any():
        return ""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len({*values}) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def _experts(row: Row) -> str:
    return f"{row.num_experts:,}" if row.num_experts else "no"
