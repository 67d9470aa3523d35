"""What was measured and predicted, as tables, as JSON and as plots."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flash_moe_dist.volume import DispatcherName, Load
from scaling.measure import CONVENTIONAL, STEPS, Result
from scaling.predict import Prediction
from scaling.problems import Problem

PARTS = (*STEPS, "other")
AUTO = "auto"


@dataclass(frozen=True)
class Point:
    """A problem on some ranks.

    means: the dispatcher that "auto" stands for; loads: of each rank; results: by variant;
    predictions: by variant, on more than one rank.
    """

    ranks: int
    means: DispatcherName
    loads: list[Load]
    results: dict[str, Result]
    predictions: dict[str, Prediction] = field(default_factory=dict)


@dataclass(frozen=True)
class ProblemReport:
    """extrapolated: predictions by number of ranks and dispatcher, for even routing."""

    problem: Problem
    points: list[Point] = field(default_factory=list)
    extrapolated: dict[int, dict[str, Prediction]] = field(default_factory=dict)

    def one_rank(self, what: str) -> float:
        """Seconds on one rank, which has nothing to dispatch."""
        results = self.points[0].results
        return next(iter(results.values())).median(what)

    def efficiency(self, ranks: int, seconds: float, what: str = "total") -> float:
        """1 where time stays as on one rank (weak scaling), or falls to 1/ranks of it (strong)."""
        shared = 1 if self.problem.scaling == "weak" else ranks
        return self.one_rank(what) / (seconds * shared)


def table(report: ProblemReport) -> str:
    """A line for each number of ranks and variant; times in ms, of the rank that took longest.

    "loop" is a step of a training loop; other times are those of a device that the host is ahead
    of. "eff." is against one rank. Then the steps of forward and backward pass together, means
    over ranks, "communication" being what nothing hides.
    """
    rows, steps = [], []
    for point in report.points:
        for name, result in point.results.items():
            shown = f"{name} ({point.means})" if name == AUTO and point.ranks > 1 else name
            label = f"  {point.ranks:5}  {shown:18}"
            rows.append(label + _cells(report, point, name, result))
            if result.steps:
                parts = "".join(f"{_ms(result.steps.get(part, 0.0)):>15}" for part in PARTS)
                steps.append(label + parts)
    for ranks, predictions in report.extrapolated.items():
        for name, prediction in predictions.items():
            rows.append(
                f"  {ranks:5}  {name:18}{'':48}{_predicted(report, ranks, prediction)}  predicted "
                f"only: communication {_ms(prediction.communication)}"
            )
    title = f"  {'ranks':>5}  {'dispatcher':18}"
    return "\n".join(
        [
            report.problem.name,
            f"{title}{'forward':>9}{'backward':>9}{'total':>9}{'eff.':>6}{'loop':>9}{'eff.':>6}"
            f"{'predicted':>10}{'eff.':>6}{'peak MB':>10}{'error':>9}",
            *rows,
            title + "".join(f"{part:>15}" for part in PARTS),
            *steps,
        ]
    )


def _cells(report: ProblemReport, point: Point, name: str, result: Result) -> str:
    if result.failure:
        return f"  {result.failure}"
    forward = result.median("forward")
    if name == CONVENTIONAL:
        best = min(
            other.median("forward") for key, other in point.results.items() if key != CONVENTIONAL
        )
        return f"{_ms(forward):>9}  {forward / best:.1f} x the fastest, error {result.error:.1e}"
    total, loop = result.median("total"), result.median("loop")
    return (
        f"{_ms(forward):>9}{_ms(result.median('backward')):>9}{_ms(total):>9}"
        f"{report.efficiency(point.ranks, total):6.2f}"
        f"{_ms(loop):>9}{report.efficiency(point.ranks, loop, 'loop'):6.2f}"
        f"{_predicted(report, point.ranks, point.predictions.get(name))}"
        f"{result.peak_bytes / 1e6:10.0f}{result.error:9.1e}"
    )


def _predicted(report: ProblemReport, ranks: int, prediction: Prediction | None) -> str:
    if prediction is None:
        return " " * 16
    return f"{_ms(prediction.total):>10}{report.efficiency(ranks, prediction.total):6.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def write_json(path: Path, about: dict[str, Any], reports: list[ProblemReport]) -> None:
    """Seconds, bytes, bytes/s."""
    fields = [
        asdict(report)
        | {
            "efficiencies": {
                point.ranks: {
                    name: {
                        what: report.efficiency(point.ranks, result.median(what), what)
                        for what in ("total", "loop")
                    }
                    for name, result in point.results.items()
                    if name != CONVENTIONAL
                }
                for point in report.points
            }
        }
        for report in reports
    ]
    path.write_text(json.dumps(about | {"problems": fields}, indent=1) + "\n")


def write_plot(path: Path, title: str, reports: list[ProblemReport]) -> None:
    """For each problem: time and efficiency against ranks, and the steps of the largest number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4 * len(reports)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(reports), 3, squeeze=False)
    for (times, efficiencies, steps), report in zip(rows, reports, strict=True):
        _plot_against_ranks(times, efficiencies, report)
        _plot_steps(steps, report)
    figure.savefig(path, format="png", dpi=100)


def _plot_against_ranks(times: Any, efficiencies: Any, report: ProblemReport) -> None:
    names = [name for name in report.points[-1].results if name != CONVENTIONAL]
    for name in names:
        # One rank dispatches nothing: one time for all.
        seconds = {
            point.ranks: point.results.get(name, next(iter(point.results.values()))).median("total")
            for point in report.points
        }
        _lines(times, efficiencies, report, seconds, "o-", name)
    predicted: dict[str, dict[int, float]] = {}
    by_ranks = {point.ranks: point.predictions for point in report.points} | report.extrapolated
    for ranks, predictions in by_ranks.items():
        for name, prediction in predictions.items():
            if name != AUTO:
                predicted.setdefault(name, {})[ranks] = prediction.total
    for name, seconds in predicted.items():
        _lines(times, efficiencies, report, seconds, "x:", f"{name}, predicted")
    for axes in (times, efficiencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_ranks), list(map(str, by_ranks)))
        axes.set_xlabel("ranks")
        axes.legend(fontsize="small")
    problem = report.problem
    times.set_yscale("log")
    times.set(ylabel="ms, forward and backward", title=f"{problem.scaling} scaling")
    efficiencies.set(
        ylabel="efficiency",
        ylim=(0, 1.1),
        title=f"{problem.tokens} tokens, K={problem.num_experts_per_tok}, {problem.routing}",
    )


def _lines(
    times: Any,
    efficiencies: Any,
    report: ProblemReport,
    seconds: dict[int, float],
    form: str,
    label: str,
) -> None:
    ranks = sorted(seconds)
    times.plot(ranks, [seconds[n] * 1e3 for n in ranks], form, label=label)
    efficiencies.plot(ranks, [report.efficiency(n, seconds[n]) for n in ranks], form, label=label)


def _plot_steps(axes: Any, report: ProblemReport) -> None:
    bars = [
        (f"{point.ranks}\n{name}", result.steps)
        for point in report.points
        for name, result in point.results.items()
        if result.steps
    ]
    bottom = [0.0] * len(bars)
    for part in PARTS:
        heights = [max(0.0, steps.get(part, 0.0)) * 1e3 for _, steps in bars]
        axes.bar(range(len(bars)), heights, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize="x-small")
    axes.set(ylabel="ms", title="steps, by ranks and dispatcher")
    # Beside the bars, not over them.
    axes.set_xlim(right=1.6 * len(bars))
    axes.legend(fontsize="small", loc="upper right")
