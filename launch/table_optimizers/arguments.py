"""Options of launch/bench_table_optimizers.py."""

import argparse
from pathlib import Path

from flash_moe.bench.cases import DTYPES
from option_parser import RaisingParser

# In messages and --help.
SCRIPT = "bench_table_optimizers.py"
# Defaults by whether there is a GPU.
ON_GPUS = {
    "tokens": 16384,
    "hidden_size": 1024,
    "num_experts": 102_400,
    "num_experts_per_tok": 64,
    "dtype": "bfloat16",
    "repeats": 20,
}
ON_CPUS = {
    "tokens": 1024,
    "hidden_size": 256,
    "num_experts": 16384,
    "num_experts_per_tok": 32,
    "dtype": "float32",
    "repeats": 5,
}


def parse(description: str, argv: list[str], on_gpu: bool) -> argparse.Namespace:
    """Parse the options; exits for --help.

    Raises:
        ValueError: an option that cannot be used.
    """
    parser = RaisingParser(SCRIPT, description)
    add = parser.add_argument
    sizes = {
        "tokens": "tokens of a pass, T",
        "hidden_size": "width of hidden states and table rows, H",
        "num_experts": "rows of each table, E",
        "num_experts_per_tok": "experts that each token uses, K; drawn uniformly",
        "num_layers": "layers, each with two tables",
    }
    for name, help in sizes.items():
        add(_option(name), type=int, default=1, help=help)
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of hidden states; for bfloat16 also of tables, but for AdamW's",
    )
    add("--repeats", type=int, help="timed training steps of each optimizer")
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.set_defaults(**(ON_GPUS if on_gpu else ON_CPUS))
    args = parser.parse_args(argv)
    for name in (*sizes, "repeats"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"{_option(name)} must be positive, got {value}")
    if args.json is not None and args.json.is_dir():
        parser.error(f"--json must be a file, got the folder {args.json}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json must be in a folder that exists, got {args.json}")
    return args


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
