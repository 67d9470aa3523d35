"""Options of launch/bench_scaling.py, and the problems they stand for."""

import argparse
import importlib.util
import itertools
import math
import os
from pathlib import Path

from flash_moe.bench.cases import DTYPES, ROUTINGS
from flash_moe.ops.triton_launch import cdiv
from flash_moe_dist.dispatch.comm_volume import DispatcherName
from option_parser import RaisingParser
from scaling.problems import Problem
from scaling.results import CONVENTIONAL, SINGLE_RANK

# In messages and --help.
SCRIPT = "bench_scaling.py"
AUTO = "auto"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
DISPATCHERS: tuple[DispatcherName, ...] = ("all_to_all", "all_gather")
# Defaults by whether there are GPUs: they fit into memory and run in a minute or two.
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
    """Parse the options; exits for --help.

    Raises:
        ValueError: options that cannot be measured on `world_size` ranks.
    """
    parser = RaisingParser(SCRIPT, description)
    add = parser.add_argument
    add(
        "--scaling",
        nargs="+",
        choices=("weak", "strong"),
        default=["weak", "strong"],
        help="weak: the tokens of each rank stay the same; strong: those of all ranks together do",
    )
    for name, help in (
        ("tokens", "tokens of each rank in weak scaling"),
        (
            "total_tokens",
            "tokens of all ranks together in strong scaling (default: "
            f"{TOTAL_TOKENS[on_gpus]} rounded up to a multiple of every number of ranks)",
        ),
        ("num_experts_per_tok", "experts per token, K"),
        ("hidden_size", "hidden size, H"),
        ("num_experts", "experts of all ranks, E; a single rank must have memory for all"),
    ):
        add(_option(name), type=int, nargs="+", help=help)
    add("--dtype", choices=DTYPES, help="dtype of hidden states, tables and routing weights")
    add(
        "--routing",
        nargs="+",
        choices=ROUTINGS,
        default=["uniform"],
        help="how expert ids are drawn",
    )
    add(
        "--key-bias",
        type=float,
        default=0.0,
        help="how skewed routing product_keys is: standard deviation of a key's score between "
        "keys, in units of that between tokens",
    )
    add(
        "--ranks",
        type=int,
        nargs="+",
        help="numbers of ranks to measure, besides 1 (default: 2, 4, ... and all)",
    )
    add(
        "--dispatcher",
        nargs="+",
        choices=(AUTO, *DISPATCHERS, CONVENTIONAL),
        default=[AUTO, *DISPATCHERS, CONVENTIONAL],
        help="dispatchers to measure; conventional: a row for each pair, forward pass only",
    )
    add("--repeats", type=int, help="timed passes of each variant")
    add(
        "--ranks-per-host",
        type=int,
        default=8,
        help="in predictions for more ranks than there are: ranks of a host",
    )
    add(
        "--link",
        type=float,
        help="in predictions for more ranks than there are: GB/s of a rank to others of its host "
        "(default: measured)",
    )
    add(
        "--network",
        type=float,
        default=50.0,
        help="in predictions: GB/s of a rank to other hosts, at most --link",
    )
    add(
        "--latency",
        type=float,
        help="in predictions for more ranks than there are: microseconds of an empty message "
        "(default: measured)",
    )
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds that a collective may take; ranks that a measurement does not use wait in "
        "one until it ends",
    )
    add("--json", type=Path, metavar="FILE", help="write all measurements and predictions")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot time and efficiency against the number of ranks, and the phases",
    )
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
        multiple = math.lcm(*args.ranks)
        args.total_tokens = [cdiv(TOTAL_TOKENS[on_gpus], multiple) * multiple]
    for name in (*numbers, "scaling", "routing", "dispatcher"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.key_bias and "product_keys" not in args.routing:
        parser.error(f"--key-bias is for --routing product_keys, got {' '.join(args.routing)}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(
                f"{_option(name)} must be a file in a folder that exists and is writable, "
                f"got {path}"
            )
    if args.plot and args.plot.suffix.lower() not in PLOT_SUFFIXES:
        parser.error(f"--plot must end in one of {', '.join(PLOT_SUFFIXES)}, got {args.plot}")
    if args.plot and args.plot == args.json:
        parser.error(f"--plot and --json must be different files, got {args.plot} for both")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if args.dispatcher == [CONVENTIONAL]:
        parser.error(
            f"--dispatcher must name one other than {CONVENTIONAL}, which is only compared with it"
        )
    return args


def variants(chosen: list[str], problem: Problem, ranks: int) -> list[str]:
    """Variants to measure on this many ranks, with "auto" replaced by the dispatcher it chooses."""
    if ranks == 1:
        return [SINGLE_RANK]
    names = [problem.auto(ranks) if name == AUTO else name for name in chosen]
    return list(dict.fromkeys(names))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """Make a problem of every combination of the options.

    Raises:
        ValueError: a combination for which `Problem.case` raises.
    """
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
