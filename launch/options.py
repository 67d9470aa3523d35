"""Options of launch/train.py, and those that launch/compare.py shares with it."""

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from flash_moe.layers.router import BIAS_UPDATE_RATE
from optimizer import TableOptimizerName
from option_parser import RaisingParser

# In messages and --help.
SCRIPT = "train.sh"
DESCRIPTION = "Train a language model whose experts are sharded over ranks."

# Upper bound of all numbers.
MAX_OPTION = 2**31
POSITIVE = (
    *("steps", "batch_size", "seq_len", "hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_experts", "num_experts_per_tok", "validation_batches"),
    *("validation_interval", "checkpoint_interval", "keep", "vocab_size", "lr", "timeout"),
    *("ep_size", "grace", "table_lr_scale"),
)
NOT_NEGATIVE = ("sample_tokens", "seed", "aux_loss_coef", "z_loss_coef", "bias_update_rate")
# What --score-norm stands for.
SCORE_NORMS: dict[str, Literal["batch"] | None] = {"batch": "batch", "none": None}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, by default those of the process; exits for --help.

    Returns:
        The options, and the names of those that were given as `given`.

    Raises:
        ValueError: unknown options, or values that are invalid on their own.
    """
    parser = RaisingParser(SCRIPT, description)
    add = parser.add_argument
    add_shared_options(parser)
    add(
        "--vocab-size",
        type=int,
        help="number of token ids of the model (default: one more than the largest in the data, "
        "256 for text)",
    )
    add("--out", type=path, default=Path("out/train"), help="folder for all results")
    add("--steps", type=int, default=250, help="optimizer steps")
    add(
        "--batch-size",
        type=int,
        help="sequences of a step, over all ranks (default: that of the checkpoint, or 16, rounded "
        "up to a multiple of the number of ranks)",
    )
    add("--seed", type=int, default=0, help="seed of parameters and batches")
    add("--num-experts", type=int, default=16384, help="experts of each layer")
    add(
        "--score-norm",
        choices=SCORE_NORMS,
        default="batch",
        help="how routers normalize the scores of keys: each over the tokens of a step, or not",
    )
    add("--aux-loss-coef", type=float, default=0.0, help="weight of the load-balancing loss")
    add("--z-loss-coef", type=float, default=0.0, help="weight of the z-loss of routers")
    add(
        "--bias-update-rate",
        type=float,
        default=BIAS_UPDATE_RATE,
        help="how far a step moves the biases that balance the keys; 0 for no biases",
    )
    add(
        "--force-load-balance",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw experts evenly at random, to measure speed whatever routers have learnt",
    )
    add(
        "--ep-size",
        type=int,
        help="ranks over which the experts are distributed; with fewer than all ranks, each group "
        "of this size has all experts (default: all ranks)",
    )
    add("--validation-batches", type=int, default=8, help="batches of a validation")
    add("--validation-interval", type=int, default=100, help="steps between validations")
    add("--checkpoint-interval", type=int, default=100, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="newest checkpoints to keep; older ones are removed")
    add(
        "--async-checkpoint",
        action="store_true",
        help="continue training while a checkpoint is written",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --out, or start if there is none; a run that "
        "torchrun restarts after a failure always does",
    )
    add(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a step whose loss or gradient is not finite",
    )
    add("--sample-tokens", type=int, default=200, help="tokens to generate at the end")
    add("--timeout", type=float, default=600, help="seconds a collective may wait for a rank")
    add(
        "--grace",
        type=float,
        default=5,
        help="seconds after SIGTERM or Ctrl-C for the current step, and a validation, to end; "
        "then a checkpoint is written",
    )
    add(
        "--time-phases",
        action="store_true",
        help="record in metrics.jsonl, and summarize at the end, the share of each step that "
        "sharded expert layers take for dispatch, experts, combine and communication that no work "
        "overlaps; waits for the device once more in each step; layers on one rank have no phases",
    )
    add("--time-steps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # Attributes that exist already are not set to defaults.
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    args.given = {
        name for name, one in vars(parser.parse_args(argv, unset)).items() if one is not None
    }
    if vars(args).pop("time_steps"):
        args.time_phases = True
        # Every rank parses the options; one note is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"{SCRIPT}: --time-steps is deprecated, use --time-phases", file=sys.stderr)
    check_ranges(args, POSITIVE, NOT_NEGATIVE)
    return args


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of data, sizes, learning rates and precision."""
    add = parser.add_argument
    add(
        "--data",
        type=path,
        help="text file, folder of text, .bin of uint16 token ids, or folder with train.bin and "
        "val.bin (default: the source of Python's standard library)",
    )
    add("--seq-len", type=int, default=256, help="tokens of a sequence")
    add("--lr", type=float, help="peak learning rate of AdamW (default: 2e-3 * sqrt(128 / H))")
    add(
        "--table-lr-scale",
        type=float,
        help="learning rate of the experts' tables over that of the other parameters (default: 4 "
        "with rowwise-adagrad, else 512 / H, from 1 to 4)",
    )
    add(
        "--table-optimizer",
        choices=get_args(TableOptimizerName),
        help="optimizer of the experts' tables; all but adamw touch only the rows that a step "
        "used, and keep tables in bfloat16 where activations are (default: rowwise-adagrad; adamw "
        "where --ep-size is less than the number of ranks)",
    )
    add("--hidden-size", type=int, default=128, help="width H of the residual stream")
    add("--intermediate-size", type=int, default=256, help="width of the shared MLP")
    add("--num-layers", type=int, default=4, help="transformer blocks")
    add("--num-heads", type=int, default=4, help="attention heads of each layer")
    add("--num-experts-per-tok", type=int, default=32, help="experts that each token uses")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="dtype of activations (default: bfloat16 on GPUs, float32 on CPUs)",
    )


def default_lr(hidden_size: int) -> float:
    """Peak learning rate of AdamW for a hidden size H, if none is given: 2e-3 * sqrt(128 / H).

    Wider models need smaller steps: the best rates measured fall from 2e-3 at H=128 to 5e-4 at
    H=1024, with batches of 4,096 tokens (findings/router_balance.md).
    """
    return 2e-3 * math.sqrt(128 / hidden_size)


def default_table_lr_scale(hidden_size: int, table_optimizer: TableOptimizerName) -> float:
    """Factor of the learning rate for the experts' tables if none is given.

    4 with "rowwise-adagrad" (best at H=128 and 512: findings/table_optimizers.md), else 512 / H,
    from 1 to 4 (AdamW: 4 is best at H=128, 1 at H=512: findings/router_balance.md).
    """
    if table_optimizer == "rowwise-adagrad":
        return 4.0
    return min(4.0, max(1.0, 512 / hidden_size))


def check_ranges(
    args: argparse.Namespace, positive: Iterable[str], not_negative: Iterable[str]
) -> None:
    """Check the options of these names, where given; each value of those that take several.

    Raises:
        ValueError: a value is out of range.
    """
    for names, words in ((positive, "be positive"), (not_negative, "not be negative")):
        for name in names:
            given = getattr(args, name)
            for value in given if isinstance(given, list) else [given]:
                if value is None or 0 < value < MAX_OPTION:
                    continue
                if words == "be positive" or value != 0:
                    raise ValueError(f"--{name.replace('_', '-')} must {words}, got {value}")


def path(text: str) -> Path:
    """Parse a path that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty one")
    return Path(text)
