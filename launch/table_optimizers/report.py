"""Reports of what was measured: a table and JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from flash_moe.bench.report import device_name, versions
from table_optimizers.measure import Result
from table_optimizers.training import PARTS, Case

UNITS = "times in seconds, sizes in bytes, errors relative"


def table(case: Case, device: torch.device, results: dict[str, Result]) -> str:
    """A row for each optimizer; columns as launch/README.md explains them."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    sizes = (case.tokens, case.hidden_size, case.num_experts, case.num_experts_per_tok)
    rows = {"": ["tables", "table part ms", *PARTS, "peak MB", "bytes", "peak bytes", "error"]}
    for name, result in results.items():
        rows[name] = [result.table_dtype, *_cells(case, result)]
    widths = [max(len(title) + 2, 10) for title in rows[""]]
    return "\n".join(
        [
            f"table optimizers: T, H, E, K = {sizes}, layers {case.num_layers}, {case.dtype}, "
            f"{device.type} ({device_name(device)}), {named}",
            *(
                f"  {name:14}" + "".join(map(str.rjust, cells, widths))
                for name, cells in rows.items()
            ),
        ]
    )


def _cells(case: Case, result: Result) -> list[str]:
    if result.failure:
        return ["  " + result.failure]
    seconds = (result.tables_median(), *map(result.median, PARTS))
    kept = result.table_bytes + result.state_bytes
    return [
        *(f"{one * 1e3:.3f}" for one in seconds),
        f"{result.peak_bytes / 1e6:.1f}",
        *(f"{one / case.num_parameters:.2f}" for one in (kept, result.peak_bytes)),
        f"{result.error:.1e}",
    ]


def write_json(
    path: Path, case: Case, device: torch.device, results: dict[str, Result], command: list[str]
) -> None:
    """Write all measurements."""
    content = {
        "command": command,
        "versions": versions(),
        "units": UNITS,
        "case": asdict(case),
        "device": {"type": device.type, "name": device_name(device)},
        "results": {name: asdict(result) for name, result in results.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
