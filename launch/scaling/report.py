"""What was measured and predicted, as tables, as JSON and as plots."""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flash_moe.bench.report import device_name, versions
from flash_moe_dist.dispatch.symmetric_memory import symmetric_memory_bytes
from flash_moe_dist.phases import PHASES
from flash_moe_dist.runtime import Runtime
from scaling.predict import Network, Prediction
from scaling.problems import Problem
from scaling.results import ALONE, CONVENTIONAL, Result
from scaling.traffic import Traffic

PARTS = (*PHASES, "other")
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
    """The first point is of one rank; extrapolated: predictions by ranks and dispatcher.

    launching_hidden: times other than of loops are begun on devices that have work before.
    """

    problem: Problem
    repeats: int
    launching_hidden: bool
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
        f"{beyond.between_hosts / 1e9:g} GB/s between hosts at most",
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
            label = _label(report, point.ranks, name)
            rows.append(label + _cells(report, point, name, result))
            if result.steps:
                parts = "".join(f"{_ms(result.steps.get(part, 0.0)):>15}" for part in PARTS)
                steps.append(f"{label}{point.traffic.load:>8.2f}{parts}")
    for ranks, predictions in report.extrapolated.items():
        for name, prediction in predictions.items():
            rows.append(
                f"{_label(report, ranks, name)}{'':48}{_predicted(report, ranks, prediction)}"
                f"  predicted only: communication {_ms(prediction.communication)}"
            )
    title = f"  {'ranks':>5}  {'dispatcher':18}"
    begun = "begun on busy devices" if report.launching_hidden else "begun together"
    return "\n".join(
        [
            report.problem.name,
            f"  ms, medians of {report.repeats}, of the rank that took longest; eff.: efficiency "
            "against one rank;",
            "  loop: a pass of many without a wait, launching included; other times: " + begun,
            f"{title}{'forward':>9}{'backward':>9}{'total':>9}{'eff.':>6}{'loop':>9}{'eff.':>6}"
            f"{'predicted':>10}{'eff.':>6}{'peak MB':>10}{'error':>9}",
            *rows,
            "  steps of both passes, ms, means over ranks of passes of their own; load: pairs of "
            "the busiest rank over",
            "  the mean; communication: what nothing else hides, and waiting for busier ranks",
            title + f"{'load':>8}" + "".join(f"{part:>15}" for part in PARTS),
            *steps,
        ]
    )


def _label(report: ProblemReport, ranks: int, name: str) -> str:
    shown = f"{name} (auto)" if name == report.problem.auto(ranks) else name
    return f"  {ranks:5}  {shown:18}"


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
    args: argparse.Namespace,
    runtime: Runtime,
    near: dict[int, Network],
    beyond: Network | None,
    reports: list[ProblemReport],
) -> None:
    """The whole file at once, so that nobody finds half of it."""
    device = runtime.device
    content = {
        "units": "seconds, bytes, bytes/s; predictions and extrapolated were not measured",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "options": {name: _plain(value) for name, value in vars(args).items()},
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith("FLASH_MOE_")
        },
        "versions": versions() | _library_versions(device),
        "device": {"type": device.type, "name": device_name(device)},
        "backend": dist.get_backend(),
        "ranks_read_each_others_memory": symmetric_memory_bytes() > 0,
        "world_size": runtime.world_size,
        "ranks_of_a_host": int(os.environ["LOCAL_WORLD_SIZE"]),
        "networks": {ranks: asdict(network) for ranks, network in near.items()},
        "assumed_network": None if beyond is None else asdict(beyond),
        "problems": [
            {
                "problem": asdict(report.problem),
                "points": [_as_fields(report, point) for point in report.points],
                "extrapolated": {
                    ranks: _predictions(report, ranks, predictions)
                    for ranks, predictions in report.extrapolated.items()
                },
            }
            for report in reports
        ],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _library_versions(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    nccl: Any = torch.cuda.nccl
    return {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl.version()))}


def _predictions(
    report: ProblemReport, ranks: int, predictions: dict[Any, Prediction]
) -> dict[str, dict[str, float]]:
    return {
        name: {
            **asdict(one),
            "total": one.total,
            "efficiency": report.efficiency(ranks, one.total),
        }
        for name, one in predictions.items()
    }


def _as_fields(report: ProblemReport, point: Point) -> dict[str, Any]:
    return {
        "ranks": point.ranks,
        "auto": report.problem.auto(point.ranks) if point.ranks > 1 else None,
        "rows_sent": point.traffic.rows_WW.tolist(),
        "pairs_sent": point.traffic.pairs_WW.tolist(),
        "results": {name: asdict(result) for name, result in point.results.items()},
        "load": point.traffic.load,
        "predictions": _predictions(report, point.ranks, dict(point.predictions)),
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

    figure = Figure(figsize=(16, 4.6 * len(reports)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(reports), 3, squeeze=False)
    for (times, efficiencies, steps), report in zip(rows, reports, strict=True):
        _plot_against_ranks(times, efficiencies, report)
        _plot_steps(steps, report)
    figure.savefig(path, dpi=100)


def _plot_against_ranks(times: Any, efficiencies: Any, report: ProblemReport) -> None:
    """Solid where measured; dotted where predicted, with crosses where there is nothing else."""
    from matplotlib.ticker import LogFormatter

    ones = {1: report.one_rank("total")}
    all_ranks = [*(point.ranks for point in report.points), *report.extrapolated]
    ideal = [ones[1] * report.efficiency(ranks, ones[1]) for ranks in all_ranks]
    times.plot(all_ranks, [1e3 * seconds for seconds in ideal], "--", color="grey", label="ideal")
    efficiencies.axhline(1, linestyle="--", color="grey", label="ideal")
    for name, colour in COLOURS.items():
        measured = ones | {
            point.ranks: point.results[name].median("total")
            for point in report.points[1:]
            if name in point.results
        }
        predicted = {
            point.ranks: point.predictions[name].total
            for point in report.points
            if name in point.predictions
        }
        only = {ranks: one[name].total for ranks, one in report.extrapolated.items()}
        for seconds, form, label in (
            (measured, "o-", name),
            (predicted | only, ":", f"{name}, predicted"),
            (only, "x", None),
        ):
            if not seconds:
                continue
            ranks = list(seconds)
            times.plot(ranks, [seconds[n] * 1e3 for n in ranks], form, color=colour, label=label)
            shares = [report.efficiency(n, seconds[n]) for n in ranks]
            efficiencies.plot(ranks, shares, form, color=colour, label=label)
    for axes in (times, efficiencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_ranks, list(map(str, all_ranks)))
        axes.set_xlabel("ranks")
        axes.legend(fontsize="small")
    times.set_yscale("log")
    times.yaxis.set_major_formatter(LogFormatter())
    times.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    times.set(ylabel="ms, forward and backward")
    times.set_title(report.problem.name, fontsize="small", loc="left")
    efficiencies.set(ylabel="efficiency", title="efficiency against one rank")
    efficiencies.set_ylim(bottom=0)


def _plot_steps(axes: Any, report: ProblemReport) -> None:
    bars = [
        (f"{point.ranks} {name}", result.steps)
        for point in report.points
        for name, result in point.results.items()
        if result.steps
    ]
    left = [0.0] * len(bars)
    for part in PARTS:
        widths = [max(0.0, steps.get(part, 0.0)) * 1e3 for _, steps in bars]
        axes.barh(range(len(bars)), widths, left=left, label=part, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize="small")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set(xlabel="ms, forward and backward", title="steps, by ranks and dispatcher")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5)
