"""Reports of what was measured and predicted: tables, JSON and plots."""

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
from scaling.results import CONVENTIONAL, SINGLE_RANK, Result
from scaling.traffic import Traffic

ALL_PHASES = (*PHASES, "other")
COLOURS = {"all_to_all": "tab:blue", "all_gather": "tab:orange"}
# What JSON fields of a result hold, for readers of the file.
FIELDS = {
    "seconds.forward, seconds.backward": "device time of each repeat, of the slowest rank; on CPUs "
    "host time",
    "seconds.loop": "wall clock of a forward and backward pass in a loop of options.repeats "
    "passes, launching included, of the slowest rank; one number for each loop",
    "phases": "device time of a forward and backward pass by phase, mean over ranks and repeats",
    "efficiencies.total": "weak- or strong-scaling efficiency by medians of forward + backward",
    "efficiencies.loop": "weak- or strong-scaling efficiency by the median of seconds.loop",
    "load": "pairs of the busiest rank over the mean of all ranks",
}


@dataclass(frozen=True)
class Point:
    """A problem measured on one number of ranks.

    results: measurements of each variant.
    traffic: what these ranks send each other.
    extrapolated_traffic: the same for more ranks than there are, by number of ranks.
    predictions: predicted times of each dispatcher.
    """

    ranks: int
    results: dict[str, Result]
    traffic: Traffic
    extrapolated_traffic: dict[int, Traffic] = field(default_factory=dict)
    predictions: dict[str, Prediction] = field(default_factory=dict)


@dataclass(frozen=True)
class ProblemReport:
    """Measurements and predictions of one problem.

    launching_hidden: whether forward and backward passes begin on devices that are busy until the
        pass has been launched, so that their times are device times.
    points: measurements of each number of ranks, of which the first is one rank.
    extrapolated: predictions for more ranks than there are, by number of ranks and dispatcher.
    """

    problem: Problem
    repeats: int
    launching_hidden: bool
    points: list[Point] = field(default_factory=list)
    extrapolated: dict[int, dict[str, Prediction]] = field(default_factory=dict)

    def one_rank(self, what: str) -> float:
        """Median seconds on one rank, which dispatches nothing."""
        return self.points[0].results[SINGLE_RANK].median(what)

    def efficiency(self, ranks: int, seconds: float, what: str = "total") -> float:
        """Scaling efficiency of `ranks` ranks that take `seconds`; 1 is ideal.

        Weak scaling: time on one rank over time on `ranks`; strong scaling: that over `ranks`.
        """
        speedup = 1 if self.problem.scaling == "weak" else ranks
        return self.one_rank(what) / (seconds * speedup)


def assumptions(measured_links: dict[int, Network], assumed_links: Network | None) -> list[str]:
    """Lines with the rates that predictions use, by number of ranks."""
    lines = [_rates(f"links of {ranks} ranks", net) for ranks, net in measured_links.items()]
    if assumed_links is None:
        return [*lines, "no links between ranks to measure: nothing is predicted"]
    return [
        *lines,
        f"{_rates('assumed for more ranks', assumed_links)}; "
        f"{assumed_links.ranks_per_host} ranks per host, "
        f"{assumed_links.between_hosts / 1e9:g} GB/s between hosts at most",
    ]


def _rates(what: str, network: Network) -> str:
    links = ", ".join(
        f"{name} {link.latency * 1e3:.3f} ms and {link.rate / 1e9:.3g} GB/s"
        for name, link in network.links.items()
    )
    return f"{what}: {links}; memory {network.memory / 1e9:.3g} GB/s"


def table(report: ProblemReport) -> str:
    """Two tables, each with a row for every number of ranks and variant: times, then phases."""
    rows, phases = [], []
    for point in report.points:
        for name, result in point.results.items():
            label = _label(report, point.ranks, name)
            rows.append(label + _cells(report, point, name, result))
            if result.phases:
                cells = "".join(f"{_ms(result.phases.get(one, 0.0)):>15}" for one in ALL_PHASES)
                phases.append(f"{label}{point.traffic.imbalance:>11.2f}{cells}")
    for ranks, predictions in report.extrapolated.items():
        for name, prediction in predictions.items():
            rows.append(
                f"{_label(report, ranks, name)}{'':58}{_predicted(report, ranks, prediction)}"
                f"  predicted only: communication {_ms(prediction.communication)}"
            )
    if report.launching_hidden:
        clock, begun = "device time", "begun on devices that are busy until it has been launched"
    else:
        clock, begun = "host time", "begun on all ranks at once"
    scaling = report.problem.scaling
    ratio = "time on one rank / time" + ("" if scaling == "weak" else " / ranks")
    label = f"  {'ranks':>5}  {'dispatcher':18}"
    return "\n".join(
        [
            report.problem.name,
            f"  ms, medians of {report.repeats}, of the slowest rank; "
            f"{scaling}-scaling efficiency: {ratio}",
            f"  {clock}: a pass {begun}",
            f"  wall clock: a forward and backward pass in a loop of {report.repeats}, launching "
            "included",
            f"{'':{len(label)}}{clock:>38}{'wall clock':>20}{'predicted':>21}",
            f"{label}{'forward':>9}{'backward':>9}{'total':>9}{'efficiency':>11}{'loop':>9}"
            f"{'efficiency':>11}{'total':>10}{'efficiency':>11}{'peak MB':>10}{'error':>9}",
            *rows,
            f"  phases of a forward and backward pass, {clock} in ms, mean over ranks",
            "  imbalance: pairs of the busiest rank / mean; communication: waits for other ranks "
            "that no work overlaps",
            label + f"{'imbalance':>11}" + "".join(f"{phase:>15}" for phase in ALL_PHASES),
            *phases,
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
    error = f"{result.error:.1e}" if name != SINGLE_RANK else ""
    return (
        f"{_ms(forward):>9}{_ms(result.median('backward')):>9}{_ms(total):>9}"
        f"{report.efficiency(point.ranks, total):11.2f}"
        f"{_ms(loop):>9}{report.efficiency(point.ranks, loop, 'loop'):11.2f}"
        f"{_predicted(report, point.ranks, point.predictions.get(name))}{peak:>10}{error:>9}"
    )


def _predicted(report: ProblemReport, ranks: int, prediction: Prediction | None) -> str:
    if prediction is None:
        return " " * 21
    return f"{_ms(prediction.total):>10}{report.efficiency(ranks, prediction.total):11.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def write_json(
    path: Path,
    args: argparse.Namespace,
    runtime: Runtime,
    measured_links: dict[int, Network],
    assumed_links: Network | None,
    reports: list[ProblemReport],
) -> None:
    """Write options, environment, links, measurements and predictions; replaces `path` at once."""
    device = runtime.device
    content = {
        "units": "seconds, bytes, bytes/s; predictions and extrapolated were not measured",
        "fields": FIELDS,
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
        "networks": {ranks: asdict(network) for ranks, network in measured_links.items()},
        "assumed_network": None if assumed_links is None else asdict(assumed_links),
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
        "load": point.traffic.imbalance,
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
    """Plot time and efficiency against the number of ranks, and phases; a row for each problem."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.6 * len(reports)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(reports), 3, squeeze=False)
    for (times, efficiencies, phases), report in zip(rows, reports, strict=True):
        _plot_against_ranks(times, efficiencies, report)
        _plot_phases(phases, report)
    figure.savefig(path, dpi=100)


def _plot_against_ranks(times: Any, efficiencies: Any, report: ProblemReport) -> None:
    """Draw measurements as solid lines, predictions dotted; crosses are predicted only."""
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
    clock = "device time" if report.launching_hidden else "host time"
    title = f"{report.problem.scaling}-scaling efficiency ({clock})"
    efficiencies.set(ylabel="efficiency", title=title)
    efficiencies.set_ylim(bottom=0)


def _plot_phases(axes: Any, report: ProblemReport) -> None:
    bars = [
        (f"{point.ranks} {name}", result.phases)
        for point in report.points
        for name, result in point.results.items()
        if result.phases
    ]
    left = [0.0] * len(bars)
    for phase in ALL_PHASES:
        widths = [max(0.0, phases.get(phase, 0.0)) * 1e3 for _, phases in bars]
        axes.barh(range(len(bars)), widths, left=left, label=phase, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize="small")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set(xlabel="ms, forward and backward", title="phases, by ranks and dispatcher")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5)
