"""What was measured, as a table, as JSON and as a bar chart."""

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from flash_moe.bench.cases import Case
from flash_moe.bench.ceilings import Ceilings
from flash_moe.bench.floors import Floor, launch_bound
from flash_moe.bench.measure import DIRECTIONS, Result
from flash_moe.bench.peers import SUBJECT


@dataclass(frozen=True)
class CaseReport:
    """All about one case; floors and kernel launches (few tokens, CUDA) by direction.

    `left_out` says which peers could not run at all, and why.
    """

    case: Case
    device: torch.device
    backend: str
    largest_load: int
    touched_experts: int
    ceilings: Ceilings
    floors: dict[str, Floor]
    launches: dict[str, int]
    results: dict[str, Result]
    left_out: list[str]

    def floor(self, direction: str) -> float:
        floor = self.floors[direction]
        return floor.skewed if self.case.skewed else floor.uniform

    def bound(self, direction: str) -> float:
        return launch_bound(self.floor(direction), self.launches[direction])

    def median(self, name: str, direction: str) -> float:
        return statistics.median(self.results[name].seconds[direction])

    def idle_median(self, name: str, direction: str) -> float | None:
        """None on the CPU, where every call is launched and awaited."""
        seconds = self.results[name].idle_seconds[direction]
        return statistics.median(seconds) if seconds else None


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "Python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} cores"


def header(report: CaseReport) -> str:
    """What ran, where, and what the device can do."""
    ceilings = report.ceilings
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"{report.case.name}: {report.case.description}, {report.device.type} "
        f"({device_name(report.device)}), {named}",
        f"  ceilings: copy {_rate(ceilings.copy, 'B/s')}, gather {_rate(ceilings.gather, 'B/s')}, "
        f"products {_rate(ceilings.matrix, 'FLOP/s')}",
        f"  backend {report.backend}; {report.touched_experts} experts touched, "
        f"{report.largest_load} pairs at the busiest",
        *(f"  {line}" for line in report.left_out),
    ]
    return "\n".join(lines)


def table(report: CaseReport) -> str:
    """A row for each direction and variant; the floor below each direction.

    Times are those of a device that the host is ahead of; "idle ms" those of one that was idle.
    "of floor" is the share that the floor has in the time.
    """
    width = max(map(len, report.results)) + len("backward, ")
    lines = [
        f"  {'':{width}}{'median ms':>11}{'20%':>10}{'80%':>10}{'idle ms':>10}{'rate':>17}"
        f"{'of floor':>9}{'ratio':>8}{'extra MB':>10}{'error':>9}"
    ]
    for direction in DIRECTIONS:
        for name in report.results:
            lines.append(f"  {direction + ', ' + name:{width}}  {_cells(report, direction, name)}")
        lines.append(f"  {_floor_line(report, direction)}")
    return "\n".join(lines)


def _cells(report: CaseReport, direction: str, name: str) -> str:
    result = report.results[name]
    if result.failure:
        return result.failure
    median = report.median(name, direction)
    low, *_, high = statistics.quantiles(result.seconds[direction], n=5, method="inclusive")
    of_floor = f"{report.floor(direction) / median:.2f}" if name == SUBJECT else ""
    idle = report.idle_median(name, direction)
    return (
        f"{median * 1e3:9.3f}{low * 1e3:10.3f}{high * 1e3:10.3f}"
        f"{'' if idle is None else f'{idle * 1e3:.3f}':>10}"
        f"{_work_rate(report, direction, median):>17}{of_floor:>9}"
        f"{median / report.median(SUBJECT, direction):7.2f}x"
        f"{result.extra_bytes[direction] / 1e6:10.1f}{result.errors[direction]:9.1e}"
    )


def _work_rate(report: CaseReport, direction: str, seconds: float) -> str:
    """Of rows gathered; of products where these are the cheaper way for all experts."""
    floor, ceilings = report.floors[direction], report.ceilings
    if floor.gather <= floor.dense:
        return _rate(floor.gather * ceilings.gather / seconds, "B/s")
    return _rate(floor.dense * ceilings.matrix / seconds, "FLOP/s")


def _rate(per_second: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if per_second >= 1e11 else (1e9, "G")
    return f"{per_second / scale:.3g} {prefix}{unit}"


def _floor_line(report: CaseReport, direction: str) -> str:
    floor, median = report.floors[direction], report.median(SUBJECT, direction)
    line = (
        f"{direction} floor {report.floor(direction) * 1e3:.3g} ms (gather "
        f"{floor.gather * 1e3:.3g}, dense {floor.dense * 1e3:.3g}, HBM {floor.hbm * 1e3:.3g}"
    )
    if report.case.skewed:
        line += (
            f", hot/cold {floor.hot_cold * 1e3:.3g}); {SUBJECT} takes "
            f"{median / floor.gather:.2f} of the all-gather floor"
        )
    else:
        line += ")"
    if direction in report.launches:
        line += (
            f"; 1.5 floors and {report.launches[direction]} launches of 20 us: "
            f"{report.bound(direction) * 1e3:.3g} ms, from idle"
        )
    return line


def write_json(path: Path, reports: list[CaseReport], command: list[str]) -> None:
    content = {
        "command": command,
        "versions": versions(),
        "cases": [_as_fields(report) for report in reports],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _as_fields(report: CaseReport) -> dict[str, Any]:
    """Times in seconds, rates in bytes/s and FLOP/s."""
    fields = asdict(report)
    fields["device"] = {"type": report.device.type, "name": device_name(report.device)}
    for direction in DIRECTIONS:
        fields["floors"][direction]["floor"] = report.floor(direction)
        if direction in report.launches:
            fields["floors"][direction]["launch_bound"] = report.bound(direction)
    return fields


def write_plot(path: Path, reports: list[CaseReport]) -> None:
    """Median times as bars, for each case and direction a group with its floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(report, direction) for report in reports for direction in DIRECTIONS]
    names = list(dict.fromkeys(name for report in reports for name in report.results))
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(4 + 1.2 * len(groups), 5), layout="constrained")
    for place, name in enumerate(names):
        shown = [
            (group, report.median(name, direction) * 1e3)
            for group, (report, direction) in enumerate(groups)
            if name in report.results and not report.results[name].failure
        ]
        axes.bar(
            [group - 0.4 + (place + 0.5) * width for group, _ in shown],
            [milliseconds for _, milliseconds in shown],
            width,
            label=name,
        )
    axes.hlines(
        [report.floor(direction) * 1e3 for report, direction in groups],
        [group - 0.4 for group in range(len(groups))],
        [group + 0.4 for group in range(len(groups))],
        colors="black",
        label="floor",
    )
    axes.set_xticks(
        range(len(groups)), [f"{report.case.name}\n{direction}" for report, direction in groups]
    )
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title(", ".join(dict.fromkeys(device_name(report.device) for report in reports)))
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png")
    pyplot.close(figure)
