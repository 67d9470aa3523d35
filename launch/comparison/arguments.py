"""Options of launch/compare.py."""

import argparse
from pathlib import Path

from bpe import check_vocab_size
from comparison.variants import BUILT_IN, parse_variant
from option_parser import RaisingParser
from options import add_shared_options, check_ranges, path

# In messages and --help.
SCRIPT = "compare.py"
POSITIVE = (
    *("steps", "batch_size", "seq_len", "hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_experts", "num_experts_per_tok", "validation_interval"),
    *("validation_batches", "lr", "table_lr_scale", "time_limit"),
)


def parse(description: str, argv: list[str]) -> argparse.Namespace:
    """Parse the options; exits for --help.

    Raises:
        ValueError: unknown options, or values that are invalid on their own.
    """
    parser = RaisingParser(SCRIPT, description)
    add = parser.add_argument
    add_shared_options(parser)
    add("--out", type=path, default=Path("out/compare"), help="folder for all results")
    add(
        "--bpe-vocab",
        type=int,
        help="token ids of a BPE vocabulary that is trained on the text, up to 65,535; losses are "
        "then in nats per such token (default: the text's bytes, or the ids, as they are)",
    )
    add(
        "--variants",
        nargs="*",
        choices=BUILT_IN,
        default=list(BUILT_IN),
        help="dense: the shared MLP alone, wider by 2/3 K units, which are as many active "
        "parameters as K experts; plain: routers without any balancing; default: the defaults of "
        "FlashMoE; batch-norm: score_norm=batch alone (default: all four)",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="a further variant, by the settings in which it differs from `default`: sizes, "
        "options of routers, lr, table_lr_scale, table_optimizer; may be given several times "
        "(default: none)",
    )
    add(
        "--num-experts",
        type=int,
        nargs="+",
        default=[16384],
        help="experts of each layer (default: 16384)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of parameters and batches (default: 0)",
    )
    add("--steps", type=int, default=150, help="optimizer steps of each variant")
    add("--batch-size", type=int, default=16, help="sequences of a step")
    add("--validation-batches", type=int, default=8, help="batches of a validation")
    add("--validation-interval", type=int, default=50, help="steps between validations")
    add(
        "--time-limit",
        type=float,
        help="seconds after which to stop, between two validations; the same command goes on",
    )
    args = parser.parse_args(argv)
    check_ranges(args, POSITIVE, ["seeds"])
    args.variant = [parse_variant(text) for text in args.variant]
    if not args.variants and not args.variant:
        parser.error("--variants must name some, or --variant describe one, got none")
    if args.bpe_vocab is not None:
        check_vocab_size(args.bpe_vocab)
    return args
