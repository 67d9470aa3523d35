"""What was measured and predicted, as tables, as JSON and as plots."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flash_moe.bench.report import device_name, versions
from flash_moe_dist.runtime import Runtime
from flash_moe_dist.steps import STEPS
from scaling.predict import Network, Prediction
from scaling.problems import Problem
from scaling.results import ALONE, CONVENTIONAL, Result
from scaling.traffic import Traffic

PARTS = (*STEPS, "other")
COLOURS = {"all_to_all": "tab:blue", "all_gather": "tab:orange"}


@dataclass(frozen=True)
class Point:
    """A problem on some ranks.

    results: by variant; traffic: of these ranks; further: of more ranks, from one rank's tokens;
    predictions: by dispatcher.
    """

    ranks: int
    results: dict[str, Result]
    traffic: Traffic
    further: dict[int, Traffic] = field(default_factory=dict)
    predictions: dict[str, Prediction] = field(default_factory=dict)


@dataclass(frozen=True)
class ProblemReport:
    """The first point is of one rank; extrapolated: predictions by ranks and dispatcher."""

    problem: Problem
    repeats: int
    points: list[Point] = field(default_factory=list)
    extrapolated: dict[int, dict[str, Prediction]] = field(default_factory=dict)

    def one_rank(self, what: str) -> float:
        """Seconds on one rank, which has nothing to dispatch."""
        return self.points[0].results[ALONE].median(what)

    def efficiency(self, ranks: int, seconds: float, what: str = "total") -> float:
        """1 where time stays as on one rank (weak scaling), or falls to 1/ranks of it (strong)."""
        shared = 1 if self.problem.scaling == "weak" else ranks
        return self.one_rank(what) / (seconds * shared)


def assumptions(near: dict[int, Network], beyond: Network | None) -> list[str]:
    """What predictions are made from: a line for each number of ranks."""
    lines = [_rates(f"links of {ranks} ranks", network) for ranks, network in near.items()]
    if beyond is None:
        return [*lines, "no links between ranks to measure: nothing is predicted"]
    return [
        *lines,
        f"{_rates('predicted for more ranks', beyond)}; {beyond.ranks_per_host} ranks a host, "
        f"{beyond.between_hosts / 1e9:g} GB/s between hosts at most, latencies as here",
    ]


def _rates(what: str, network: Network) -> str:
    links = ", ".join(
        f"{name} {link.latency * 1e3:.3f} ms and {link.rate / 1e9:.3g} GB/s"
        for name, link in network.links.items()
    )
    return f"{what}: {links}; memory {network.memory / 1e9:.3g} GB/s"


def table(report: ProblemReport) -> str:
    """A line for each number of ranks and variant, then one for the steps of each."""
    rows, steps = [], []
    for point in report.points:
        for name, result in point.results.items():
            shown = f"{name} (auto)" if name == report.problem.auto(point.ranks) else name
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
            f"  ms, medians of {report.repeats}, of the rank that took longest; eff.: efficiency "
            "against one rank;",
            "  loop: a pass of many without a wait, launching included; other times: begun on busy "
            "devices",
            f"{title}{'forward':>9}{'backward':>9}{'total':>9}{'eff.':>6}{'loop':>9}{'eff.':>6}"
            f"{'predicted':>10}{'eff.':>6}{'peak MB':>10}{'error':>9}",
            *rows,
            "  steps of both passes, ms, means over ranks; communication: what nothing else hides",
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
    peak = f"{result.peak_bytes / 1e6:.0f}" if result.peak_bytes else ""
    error = f"{result.error:.1e}" if name != ALONE else ""
    return (
        f"{_ms(forward):>9}{_ms(result.median('backward')):>9}{_ms(total):>9}"
        f"{report.efficiency(point.ranks, total):6.2f}"
        f"{_ms(loop):>9}{report.efficiency(point.ranks, loop, 'loop'):6.2f}"
        f"{_predicted(report, point.ranks, point.predictions.get(name))}{peak:>10}{error:>9}"
    )


def _predicted(report: ProblemReport, ranks: int, prediction: Prediction | None) -> str:
    if prediction is None:
        return " " * 16
    return f"{_ms(prediction.total):>10}{report.efficiency(ranks, prediction.total):6.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def write_json(
    path: Path,
    runtime: Runtime,
    near: dict[int, Network],
    beyond: Network | None,
    reports: list[ProblemReport],
) -> None:
    """Seconds, bytes, bytes/s."""
    device = runtime.device
    content = {
        "command": sys.argv[1:],
        "versions": versions(),
        "device": {"type": device.type, "name": device_name(device)},
        "world_size": runtime.world_size,
        "networks": {ranks: asdict(network) for ranks, network in near.items()},
        "assumed_network": None if beyond is None else asdict(beyond),
        "problems": [
            {
                "problem": asdict(report.problem),
                "points": [_as_fields(report, point) for point in report.points],
                "extrapolated": {
                    ranks: {name: asdict(one) for name, one in predictions.items()}
                    for ranks, predictions in report.extrapolated.items()
                },
            }
            for report in reports
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _as_fields(report: ProblemReport, point: Point) -> dict[str, Any]:
    return {
        "ranks": point.ranks,
        "auto": report.problem.auto(point.ranks) if point.ranks > 1 else None,
        "rows_sent": point.traffic.rows_WW.tolist(),
        "pairs_sent": point.traffic.pairs_WW.tolist(),
        "results": {name: asdict(result) for name, result in point.results.items()},
        "predictions": {name: asdict(one) for name, one in point.predictions.items()},
        "efficiencies": {
            name: {
                what: report.efficiency(point.ranks, result.median(what), what)
                for what in ("total", "loop")
            }
            for name, result in point.results.items()
            if name != CONVENTIONAL
        },
    }


def write_plot(path: Path, title: str, reports: list[ProblemReport]) -> None:
    """For each problem: time and efficiency against ranks, and the steps on all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2 * len(reports)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(reports), 3, squeeze=False)
    for (times, efficiencies, steps), report in zip(rows, reports, strict=True):
        _plot_against_ranks(times, efficiencies, report)
        _plot_steps(steps, report)
    figure.savefig(path, format="png", dpi=100)


def _plot_against_ranks(times: Any, efficiencies: Any, report: ProblemReport) -> None:
    """Solid where measured, dotted where predicted; crosses where there is nothing else."""
    one_rank = {1: report.one_rank("total")}
    for name, colour in COLOURS.items():
        measured = one_rank | {
            point.ranks: point.results[name].median("total")
            for point in report.points[1:]
            if name in point.results
        }
        predicted = one_rank | {
            point.ranks: point.predictions[name].total for point in report.points[1:]
        }
        only = {ranks: one[name].total for ranks, one in report.extrapolated.items()}
        for seconds, form, label in (
            (measured, "o-", name),
            (predicted | only, ":", f"{name}, predicted"),
            (only, "x", None),
        ):
            ranks = list(seconds)
            times.plot(ranks, [seconds[n] * 1e3 for n in ranks], form, color=colour, label=label)
            shares = [report.efficiency(n, seconds[n]) for n in ranks]
            efficiencies.plot(ranks, shares, form, color=colour, label=label)
    all_ranks = [*(point.ranks for point in report.points), *report.extrapolated]
    for axes in (times, efficiencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_ranks, list(map(str, all_ranks)))
        axes.set_xlabel("ranks")
        axes.legend(fontsize="small")
    times.set_yscale("log")
    times.set(ylabel="ms, forward and backward")
    times.set_title(report.problem.name, fontsize="small", loc="left")
    efficiencies.set(ylabel="efficiency against one rank")
    efficiencies.set_ylim(bottom=0)


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
    axes.set(ylabel="ms, forward and backward", title="steps, by ranks and dispatcher")
    # Beside the bars, not over them.
    axes.set_xlim(right=1.6 * len(bars))
    axes.legend(fontsize="small", loc="upper right")
