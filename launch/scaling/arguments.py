"""Options of launch/bench_scaling.py, and the problems they make."""

import argparse
import importlib.util
import itertools
from pathlib import Path

import torch

from flash_moe.bench.cases import DTYPES, ROUTINGS
from flash_moe_dist.volume import DispatcherName
from options import RaisingParser
from scaling.measure import CONVENTIONAL
from scaling.problems import Problem
from scaling.report import AUTO

DISPATCHERS: tuple[DispatcherName, ...] = ("all_to_all", "all_gather")
REPEATS = {"cuda": 20, "cpu": 5}


def parse(
    description: str, argv: list[str], device: torch.device, world_size: int
) -> argparse.Namespace:
    """Raises ValueError for what cannot be measured; exits for --help."""
    parser = RaisingParser(
        prog="bench_scaling.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sizes = default_sizes(device)
    add("--scaling", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    for name, help in (
        ("tokens", "of each rank, in weak scaling"),
        ("total_tokens", "of all ranks together, in strong scaling"),
        ("num_experts_per_tok", "K"),
        ("hidden_size", "H"),
        ("num_experts", "E, over all ranks"),
    ):
        add(_option(name), type=int, nargs="+", default=sizes[name], help=help)
    add("--dtype", choices=DTYPES, default="bfloat16" if device.type == "cuda" else "float32")
    add("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    add("--key-bias", type=float, default=0.0, help="of product keys: how much keys differ")
    add("--ranks", type=int, nargs="+", help="1 and more; 1, 2, 4, ... and all if not given")
    add(
        "--dispatcher",
        nargs="+",
        choices=(AUTO, *DISPATCHERS, CONVENTIONAL),
        default=[AUTO, *DISPATCHERS, CONVENTIONAL],
        help="conventional: each pair carries its row, forward only",
    )
    add("--repeats", type=int, default=REPEATS[device.type])
    add("--ranks-per-host", type=int, default=8, help="of more ranks than there are")
    add("--link", type=float, help="GB/s of a rank to others of its host; measured if not given")
    add("--network", type=float, default=50.0, help="GB/s of a rank to other hosts")
    add("--json", type=Path, metavar="FILE", help="write all that was measured")
    add("--plot", type=Path, metavar="FILE.png", help="time, efficiency, steps against ranks")
    args = parser.parse_args(argv)

    numbers = ("tokens", "total_tokens", "num_experts_per_tok", "hidden_size", "num_experts")
    for name in (*numbers, "repeats", "ranks_per_host", "link", "network"):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one <= 0:
                parser.error(f"{_option(name)} must be positive, got {one}")
    if args.ranks is None:
        doubled = [2**power for power in range(world_size.bit_length())]
        args.ranks = [*doubled, world_size]
    args.ranks = sorted({1, *args.ranks})
    if args.ranks[0] < 1 or args.ranks[-1] > world_size:
        parser.error(f"--ranks must be from 1 to the {world_size} there are, got {args.ranks}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{_option(name)} must be a file in a folder that exists, got {path}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    args.dispatcher = list(dict.fromkeys(args.dispatcher))
    if args.dispatcher == [CONVENTIONAL]:
        parser.error(f"--dispatcher {CONVENTIONAL} needs another one to be compared with")
    return args


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
                problem.case(ranks)
            problems.append(problem)
    return problems


def default_sizes(device: torch.device) -> dict[str, list[int]]:
    """Of the options that are not given: what fits the device, and a minute."""
    if device.type == "cuda":
        return {
            "tokens": [8192],
            "total_tokens": [16384],
            "num_experts_per_tok": [64, 512],
            "hidden_size": [1024],
            "num_experts": [102_400],
        }
    return {
        "tokens": [512],
        "total_tokens": [1024],
        "num_experts_per_tok": [8, 64],
        "hidden_size": [256],
        "num_experts": [8192],
    }
