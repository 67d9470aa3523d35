"""Options of launch/train.py."""

import argparse
from pathlib import Path

from errors import RaisingParser

MAX_OPTION = 2**31
POSITIVE = (
    *("steps", "batch_size", "seq_len", "hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_experts", "num_experts_per_tok", "validation_batches"),
    *("validation_interval", "checkpoint_interval", "keep", "vocab_size", "lr", "timeout"),
    *("ep_size", "grace"),
)


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ValueError for what no run could do."""
    parser = RaisingParser(
        prog="train.sh",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="text file, folder of text, .bin of uint16 token ids, or folder with train.bin and "
        "val.bin; without it, the source of Python's standard library",
    )
    add(
        "--vocab-size",
        type=int,
        help="token ids of the model; without it one more than the largest in the data, 256 for "
        "text",
    )
    add("--out", type=Path, default=Path("out/train"), help="folder for all results")
    add("--steps", type=int, default=250, help="optimizer steps")
    add(
        "--batch-size",
        type=int,
        help="sequences a step, over all ranks; without it that of the checkpoint, or 16, or the "
        "next multiple of the ranks",
    )
    add("--seq-len", type=int, default=256, help="tokens a sequence")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="of parameters and batches")
    add("--hidden-size", type=int, default=128)
    add("--intermediate-size", type=int, default=256, help="width of the shared MLP")
    add("--num-layers", type=int, default=4)
    add("--num-heads", type=int, default=4)
    add("--num-experts", type=int, default=16384, help="experts of each layer")
    add("--num-experts-per-tok", type=int, default=32)
    add(
        "--ep-size",
        type=int,
        help="ranks that share out the experts, the others of the ranks hold copies of theirs; "
        "without it, all",
    )
    add("--validation-batches", type=int, default=8, help="batches of the validation loss")
    add("--validation-interval", type=int, default=100, help="steps between validations")
    add("--checkpoint-interval", type=int, default=100, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add("--async-checkpoint", action="store_true", help="train on while a checkpoint is written")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, or start if there is none; what torchrun "
        "starts again after a failure always does",
    )
    add(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a step whose loss or gradient is not a finite number",
    )
    add("--sample-tokens", type=int, default=200, help="tokens to generate at the end")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of activations; bfloat16 on GPUs and float32 on CPUs unless given",
    )
    add("--timeout", type=float, default=600, help="seconds a collective may wait for a rank")
    add(
        "--grace",
        type=float,
        default=5,
        help="seconds after SIGTERM for the step under way, and a validation, to end; then a "
        "checkpoint is written",
    )
    add(
        "--time-steps",
        action="store_true",
        help="share of each step that expert layers over several ranks take for dispatch, experts, "
        "combine and for communication that nothing hides, in metrics.jsonl and at the end; each "
        "step waits for the device once more; layers on one rank have no such steps",
    )
    args = parser.parse_args(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < MAX_OPTION:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("sample_tokens", "seed"):
        value = getattr(args, name)
        if not 0 <= value < MAX_OPTION:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {value}")
    return args
