"""Options of launch/bench_scaling.py, and the problems they make."""

import argparse
import importlib.util
import itertools
import math
import os
from pathlib import Path

from errors import RaisingParser
from flash_moe.bench.cases import DTYPES, ROUTINGS
from flash_moe.ops.triton_launch import cdiv
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from scaling.problems import Problem
from scaling.results import ALONE, CONVENTIONAL

AUTO = "auto"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
DISPATCHERS: tuple[DispatcherName, ...] = ("all_to_all", "all_gather")
# What fits the device, and a minute or two.
TOTAL_TOKENS = {True: 16384, False: 1024}
ON_GPUS = {
    "tokens": [8192],
    "num_experts_per_tok": [64, 512],
    "hidden_size": [1024],
    "num_experts": [102_400],
    "dtype": "bfloat16",
    "repeats": 20,
}
ON_CPUS = {
    "tokens": [512],
    "num_experts_per_tok": [8, 64],
    "hidden_size": [256],
    "num_experts": [8192],
    "dtype": "float32",
    "repeats": 5,
}


def parse(description: str, argv: list[str], on_gpus: bool, world_size: int) -> argparse.Namespace:
    """Raises ValueError for what cannot be measured; exits for --help."""
    parser = RaisingParser(
        prog="bench_scaling.py",
        description=description,
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add(
        "--scaling",
        nargs="+",
        choices=("weak", "strong"),
        default=["weak", "strong"],
        help="weak: each rank's tokens stay the same; strong: all ranks' tokens together do",
    )
    for name, help in (
        ("tokens", "of each rank, in weak scaling"),
        (
            "total_tokens",
            f"of all ranks together, in strong scaling; without it {TOTAL_TOKENS[on_gpus]}, or the "
            "next number that all numbers of ranks divide",
        ),
        ("num_experts_per_tok", "K"),
        ("hidden_size", "H"),
        ("num_experts", "E, over all ranks; one rank must be able to hold all"),
    ):
        add(_option(name), type=int, nargs="+", help=help)
    add("--dtype", choices=DTYPES, help="of everything")
    add("--routing", nargs="+", choices=ROUTINGS, default=["uniform"], help="of tokens to experts")
    add("--key-bias", type=float, default=0.0, help="of product keys: how much keys differ")
    add("--ranks", type=int, nargs="+", help="besides 1; without it 2, 4, ... and all")
    add(
        "--dispatcher",
        nargs="+",
        choices=(AUTO, *DISPATCHERS, CONVENTIONAL),
        default=[AUTO, *DISPATCHERS, CONVENTIONAL],
        help="conventional: each pair carries its row, forward only",
    )
    add("--repeats", type=int, help="of each time")
    add("--ranks-per-host", type=int, default=8, help="of more ranks than there are")
    add("--link", type=float, help="GB/s of a rank to others of its host; without it as measured")
    add("--network", type=float, default=50.0, help="GB/s of a rank to other hosts, at most --link")
    add(
        "--latency",
        type=float,
        help="us of a message between more ranks than there are; without it as measured on all",
    )
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds that a rank may wait for others, as do those that a measurement leaves out",
    )
    add("--json", type=Path, metavar="FILE", help="write all that was measured")
    add("--plot", type=Path, metavar="FILE.png", help="time, efficiency, steps against ranks")
    parser.set_defaults(**(ON_GPUS if on_gpus else ON_CPUS))
    args = parser.parse_args(argv)

    numbers = ("tokens", "total_tokens", "num_experts_per_tok", "hidden_size", "num_experts")
    for name in (*numbers, "repeats", "ranks_per_host", "link", "network", "latency", "timeout"):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not 0 < one < math.inf:
                parser.error(f"{_option(name)} must be positive, got {one}")
    if args.ranks is None:
        args.ranks = [2**power for power in range(world_size.bit_length())] + [world_size]
    args.ranks = sorted({1, *args.ranks})
    if args.ranks[0] < 1 or args.ranks[-1] > world_size:
        parser.error(f"--ranks must be from 1 to the {world_size} there are, got {args.ranks}")
    if args.total_tokens is None:
        least = math.lcm(*args.ranks)
        args.total_tokens = [cdiv(TOTAL_TOKENS[on_gpus], least) * least]
    for name in (*numbers, "scaling", "routing", "dispatcher"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.key_bias and "product_keys" not in args.routing:
        parser.error(f"--key-bias is for --routing product_keys, got {' '.join(args.routing)}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(
                f"{_option(name)} must be a file in a folder that exists and can be written to, "
                f"got {path}"
            )
    if args.plot and args.plot.suffix.lower() not in PLOT_SUFFIXES:
        parser.error(f"--plot must end in one of {', '.join(PLOT_SUFFIXES)}, got {args.plot}")
    if args.plot and args.plot == args.json:
        parser.error(f"--plot and --json must be two files, got {args.plot} for both")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.dispatcher == [CONVENTIONAL]:
        parser.error(f"--dispatcher {CONVENTIONAL} needs another one to be compared with")
    return args


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def variants(chosen: list[str], problem: Problem, ranks: int) -> list[str]:
    """What is measured on so many ranks, "auto" being the dispatcher that it stands for."""
    if ranks == 1:
        return [ALONE]
    meant = [problem.auto(ranks) if name == AUTO else name for name in chosen]
    return list(dict.fromkeys(meant))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """Every combination of the options. Raises ValueError for what no case can be made of."""
    problems = []
    for scaling in args.scaling:
        for tokens, hidden_size, num_experts, slots, routing in itertools.product(
            args.tokens if scaling == "weak" else args.total_tokens,
            args.hidden_size,
            args.num_experts,
            args.num_experts_per_tok,
            args.routing,
        ):
            bias = args.key_bias if routing == "product_keys" else 0.0
            sizes = (tokens, hidden_size, num_experts, slots)
            problem = Problem(scaling, *sizes, args.dtype, routing, bias)
            for ranks in args.ranks:
                try:
                    problem.case(ranks)
                except ValueError as error:
                    if routing != "product_keys":
                        raise
                    option = "--routing product_keys with --num-experts, --num-experts-per-tok"
                    raise ValueError(f"{option}: {error}") from error
            problems.append(problem)
    return problems
