"""Reports of what was measured: a table, JSON and a bar chart."""

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from flash_moe.bench.baselines import OURS
from flash_moe.bench.cases import Case
from flash_moe.bench.device_rates import DeviceRates
from flash_moe.bench.measure import DIRECTIONS, Result
from flash_moe.bench.roofline import RooflineTime, launch_bound


@dataclass(frozen=True)
class CaseReport:
    """Measurements of one case.

    largest_load: pairs of the expert that has most.
    touched_experts: number of experts that have any pairs.
    roofline_times: roofline time of each direction.
    launches: CUDA kernels of the op in each direction; empty unless the case has few tokens and
        runs on CUDA.
    results: measurements of each variant.
    left_out: a message for each baseline that could not run.
    """

    case: Case
    device: torch.device
    backend: str
    largest_load: int
    touched_experts: int
    device_rates: DeviceRates
    roofline_times: dict[str, RooflineTime]
    launches: dict[str, int]
    results: dict[str, Result]
    left_out: list[str]

    def roofline(self, direction: str) -> float:
        """Roofline time in seconds, with the formula for this case's routing."""
        times = self.roofline_times[direction]
        return times.skewed if self.case.skewed else times.uniform

    def bound(self, direction: str) -> float:
        """Seconds that the op should take at most from an idle device, launches included."""
        return launch_bound(self.roofline(direction), self.launches[direction])

    def median(self, name: str, direction: str) -> float:
        """Median seconds of a variant."""
        return statistics.median(self.results[name].seconds[direction])

    def idle_median(self, name: str, direction: str) -> float | None:
        """Median seconds of a variant on an idle device; None on the CPU."""
        seconds = self.results[name].idle_seconds[direction]
        return statistics.median(seconds) if seconds else None


def versions() -> dict[str, str]:
    """Versions of torch, triton and Python."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "Python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the number of cores that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} cores"


def header(report: CaseReport) -> str:
    """Lines above the table: the case, hardware, versions, device rates and load of the experts."""
    rates = report.device_rates
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"{report.case.name}: {report.case.description}, {report.device.type} "
        f"({device_name(report.device)}), {named}",
        f"  device rates: copy {_rate(rates.copy, 'B/s')}, gather {_rate(rates.gather, 'B/s')}, "
        f"matmul {_rate(rates.matrix, 'FLOP/s')}",
        f"  backend {report.backend}; {report.touched_experts} experts touched, "
        f"{report.largest_load} pairs at the busiest",
        *(f"  {line}" for line in report.left_out),
    ]
    return "\n".join(lines)


def table(report: CaseReport) -> str:
    """A row for each direction and variant, and the roofline time below each direction.

    "median ms", "20%" and "80%" are quantiles on a device that is busy until the pass has been
    launched, "idle ms" is the median on an idle device, "of roofline" the roofline time over the
    median, "ratio" the median over that of the op.
    """
    width = max(map(len, report.results)) + len("backward, ")
    lines = [
        f"  {'':{width}}{'median ms':>11}{'20%':>10}{'80%':>10}{'idle ms':>10}{'rate':>17}"
        f"{'of roofline':>13}{'ratio':>8}{'extra MB':>10}{'error':>9}"
    ]
    for direction in DIRECTIONS:
        for name in report.results:
            lines.append(f"  {direction + ', ' + name:{width}}  {_cells(report, direction, name)}")
        lines.append(f"  {_roofline_line(report, direction)}")
    return "\n".join(lines)


def _cells(report: CaseReport, direction: str, name: str) -> str:
    result = report.results[name]
    if result.failure:
        return result.failure
    median = report.median(name, direction)
    low, *_, high = statistics.quantiles(result.seconds[direction], n=5, method="inclusive")
    of_roofline = f"{report.roofline(direction) / median:.2f}" if name == OURS else ""
    idle = report.idle_median(name, direction)
    return (
        f"{median * 1e3:9.3f}{low * 1e3:10.3f}{high * 1e3:10.3f}"
        f"{'' if idle is None else f'{idle * 1e3:.3f}':>10}"
        f"{_work_rate(report, direction, median):>17}{of_roofline:>13}"
        f"{median / report.median(OURS, direction):7.2f}x"
        f"{result.extra_bytes[direction] / 1e6:10.1f}{result.errors[direction]:9.1e}"
    )


def _work_rate(report: CaseReport, direction: str, seconds: float) -> str:
    """Rate of gathered rows, or of dense products if these are cheaper for all experts together."""
    times, rates = report.roofline_times[direction], report.device_rates
    if times.gather <= times.dense:
        return _rate(times.gather * rates.gather / seconds, "B/s")
    return _rate(times.dense * rates.matrix / seconds, "FLOP/s")


def _rate(per_second: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if per_second >= 1e11 else (1e9, "G")
    return f"{per_second / scale:.3g} {prefix}{unit}"


def _roofline_line(report: CaseReport, direction: str) -> str:
    times, median = report.roofline_times[direction], report.median(OURS, direction)
    line = (
        f"{direction} roofline {report.roofline(direction) * 1e3:.3g} ms (gather "
        f"{times.gather * 1e3:.3g}, dense {times.dense * 1e3:.3g}, HBM {times.hbm * 1e3:.3g}"
    )
    if report.case.skewed:
        line += (
            f", hot/cold {times.hot_cold * 1e3:.3g}); {OURS} takes "
            f"{median / times.gather:.2f} x gather"
        )
    else:
        line += ")"
    if direction in report.launches:
        line += (
            f"; from idle at most {report.bound(direction) * 1e3:.3g} ms, 1.5 x roofline + "
            f"{report.launches[direction]} launches of 20 us"
        )
    return line


def write_json(path: Path, reports: list[CaseReport], command: list[str]) -> None:
    """Write all reports; times in seconds, sizes in bytes, rates in bytes/s and FLOP/s."""
    content = {
        "command": command,
        "versions": versions(),
        "cases": [_as_fields(report) for report in reports],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _as_fields(report: CaseReport) -> dict[str, Any]:
    fields = asdict(report)
    fields["device"] = {"type": report.device.type, "name": device_name(report.device)}
    for direction in DIRECTIONS:
        fields["roofline_times"][direction]["roofline"] = report.roofline(direction)
        if direction in report.launches:
            fields["roofline_times"][direction]["launch_bound"] = report.bound(direction)
    return fields


def write_plot(path: Path, reports: list[CaseReport]) -> None:
    """Draw median times as bars, a group for each case and direction, rooflines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(report, direction) for report in reports for direction in DIRECTIONS]
    names = list(dict.fromkeys(name for report in reports for name in report.results))
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(4 + 1.2 * len(groups), 5), layout="constrained")
    for column, name in enumerate(names):
        shown = [
            (group, report.median(name, direction) * 1e3)
            for group, (report, direction) in enumerate(groups)
            if name in report.results and not report.results[name].failure
        ]
        axes.bar(
            [group - 0.4 + (column + 0.5) * width for group, _ in shown],
            [milliseconds for _, milliseconds in shown],
            width,
            label=name,
        )
    axes.hlines(
        [report.roofline(direction) * 1e3 for report, direction in groups],
        [group - 0.4 for group in range(len(groups))],
        [group + 0.4 for group in range(len(groups))],
        colors="black",
        label="roofline",
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
