"""Command line of `python -m flash_moe.bench`: parse the options, run the cases, print reports."""

import argparse
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from flash_moe import bench
from flash_moe.bench.baselines import OURS, load_func, variants
from flash_moe.bench.cases import CASES, DTYPES, ROUTINGS, Case, Func, make_inputs
from flash_moe.bench.device_rates import measure_device_rates
from flash_moe.bench.measure import count_launches, measure, one_pass
from flash_moe.bench.report import CaseReport, header, table, write_json, write_plot
from flash_moe.bench.roofline import pairs_per_expert, roofline_time
from flash_moe.bench.router import (
    RouterCase,
    measure_router,
    router_table,
    write_router_json,
)
from flash_moe.ops.backend_choice import choose_backend

# Defaults of the shape and routing options, by field of `Case`.
DEFAULTS: dict[str, Any] = {
    "tokens": 2048,
    "hidden_size": 512,
    "num_experts": 65536,
    "num_experts_per_tok": 64,
    "dtype": "float32",
    "routing": "uniform",
    "key_bias": 0.0,
}
REPEATS = {"cuda": 20, "cpu": 10}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Case] | RouterCase]:
    """Parse the options and choose the cases; exit with 2 and a message if they are invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_moe.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--list", action="store_true", help="print the named cases and exit (default: off)"
    )
    parser.add_argument(
        "--case",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="named cases to run; all: every case that is not for the CPU (default: a custom case)",
    )
    parser.add_argument(
        "--router",
        action="store_true",
        help="measure the choice of experts instead of the op, next to the plain operations that "
        "it replaces (default: off)",
    )
    shape = parser.add_argument_group("a custom case")
    for name, meaning in (
        ("tokens", "tokens of a pass"),
        ("hidden_size", "width of hidden states and table rows"),
        ("num_experts", "rows of each table"),
        ("num_experts_per_tok", "experts that each token uses"),
    ):
        default = f"(default: {DEFAULTS[name]})"
        shape.add_argument(_option(name), type=int, help=f"{meaning} {default}")
    shape.add_argument(
        "--dtype", choices=DTYPES, help=f"dtype of all tensors (default: {DEFAULTS['dtype']})"
    )
    shape.add_argument(
        "--routing",
        choices=ROUTINGS,
        help=f"how expert ids are drawn (default: {DEFAULTS['routing']})",
    )
    shape.add_argument(
        "--key-bias",
        type=float,
        help="how skewed routing product_keys is: standard deviation of a key's score between "
        "keys, in units of that between tokens (default: 0)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed passes of each variant (default: 20 on CUDA, 10 on CPU)",
    )
    parser.add_argument(
        "--baselines",
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the built-in baselines too; --peers is the old name (default: on)",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:FUNCTION",
        help="another baseline, called with the arguments of the op; may be repeated "
        "(default: none)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all measurements (default: none)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write a bar chart of times (default: none)"
    )
    args = parser.parse_args(argv)

    if args.repeats is not None and args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    for name in ("tokens", "hidden_size", "num_experts", "num_experts_per_tok"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"{_option(name)} must be positive, got {value}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            parser.error(f"{_option(name)} must be a file, got the folder {path}")
        if path is not None and not path.parent.is_dir():
            parser.error(f"{_option(name)} must be in a folder that exists, got {path}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        args.against = {name: load_func(name) for name in args.against}
    except ValueError as error:
        parser.error(f"--against: {error}")
    if args.router:
        return args, _router_case(parser, args)
    return args, _cases(parser, args)


# Options that --router has no use for; `baselines` is on without it.
NOT_FOR_ROUTER = ("case", "hidden_size", "routing", "key_bias", "against", "plot")


def _router_case(parser: argparse.ArgumentParser, args: argparse.Namespace) -> RouterCase:
    given = [name for name in NOT_FOR_ROUTER if getattr(args, name)]
    if given or not args.baselines:
        options = ", ".join([*map(_option, given), *["--no-baselines"][args.baselines :]])
        parser.error(f"--router cannot be combined with {options}")
    try:
        return RouterCase(
            **{
                field.name: DEFAULTS[field.name]
                if getattr(args, field.name) is None
                else getattr(args, field.name)
                for field in fields(RouterCase)
            }
        )
    except ValueError as error:
        parser.error(str(error))


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _cases(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Case]:
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if not args.case:
        try:
            return [Case("custom", **(DEFAULTS | given))]
        except ValueError as error:
            parser.error(str(error))
    if given:
        options = ", ".join(map(_option, given))
        parser.error(f"--case sets shape and routing, it cannot be combined with {options}")
    cases: dict[str, Case] = {}
    for name in args.case:
        if name != "all" and name not in CASES:
            parser.error(f"--case must be a name that --list prints, got {name!r}")
        names = [name] if name != "all" else [n for n, case in CASES.items() if not case.on_cpu]
        cases |= {n: CASES[n] for n in names}
    if "all" in args.case and not torch.cuda.is_available():
        parser.error("--case all needs a CUDA device")
    return list(cases.values())


def run_case(
    case: Case, with_baselines: bool, against: dict[str, Func], repeats: int | None
) -> CaseReport:
    """Measure one case on the GPU, or on the CPU if there is none or the case is for the CPU.

    repeats: timed passes of each variant; None for the default of the device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not case.on_cpu else "cpu")
    funcs, left_out = variants(device, with_baselines, against)
    inputs = make_inputs(case, device)
    loads = pairs_per_expert(inputs.indices, case.num_experts)
    rates = measure_device_rates(device, DTYPES[case.dtype])
    results = measure(inputs, funcs, repeats or REPEATS[device.type])
    launches: dict[str, int] = {}
    if case.few_tokens and device.type == "cuda":
        _, launches = one_pass(inputs, funcs[OURS], count_launches)
    return CaseReport(
        case=case,
        device=device,
        backend=choose_backend(None, *inputs.leaves[:3], case.num_experts_per_tok),
        largest_load=int(loads.max()),
        touched_experts=int((loads > 0).sum()),
        device_rates=rates,
        roofline_times=roofline_time(
            loads, case.tokens, case.hidden_size, inputs.grad.element_size(), rates
        ),
        launches=launches,
        results=results,
        left_out=left_out,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with the given options, by default those of the process.

    Returns:
        Exit status: 1 if a function of --against has failed or was wrong in any case, else 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, cases = parse(argv)
    if args.list:
        for case in CASES.values():
            print(f"{case.name:18}{case.description}{', on the CPU' if case.on_cpu else ''}")
        return 0
    if isinstance(cases, RouterCase):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = measure_router(cases, device, args.repeats or REPEATS[device.type])
        print(router_table(cases, device, results))
        if args.json:
            write_router_json(args.json, cases, device, results, argv)
        return 0
    reports: list[CaseReport] = []
    for case in cases:
        reports.append(run_case(case, args.baselines, args.against, args.repeats))
        # After every case, so that an interrupted run still has results.
        print(header(reports[-1]), table(reports[-1]), sep="\n", flush=True)
        if args.json:
            write_json(args.json, reports, argv)
        if args.plot:
            write_plot(args.plot, reports)
    return int(any(report.results[name].failure for report in reports for name in args.against))


if __name__ == "__main__":
    sys.exit(main())
