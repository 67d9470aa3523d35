"""Compare variants of a transformer, trained on the same tokens, by validation loss and speed.

    python launch/compare.py
    python launch/compare.py --data corpus --bpe-vocab 16384 --num-experts 262144 1048576 \\
        --variant "tables-x4:table_lr_scale=4" --out out/experts

Runs in one process, on a GPU if there is one. Writes to --out, after each validation, compare.json
with a row for each variant, seed and number of experts; at the end compare.md, a table, and
compare.png. Called again with the same --out, it keeps the rows that are finished.
"""

import argparse
import gc
import math
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bpe import encoded_corpus
from comparison.arguments import SCRIPT, parse
from comparison.report import plot, table
from comparison.results import Row, check_same_batches, read_rows, write_rows
from comparison.training import train
from comparison.variants import Case, cases_of
from data import Corpus, load_corpus
from errors import exit_on_error
from flash_moe.bench.report import device_name, versions
from out_folder import hold_folder, replacing

JSON, TABLE, PLOT = "compare.json", "compare.md", "compare.png"
# Options that all rows share; those of the model are settings of each.
SHARED = (
    *("steps", "batch_size", "seq_len", "validation_interval", "validation_batches"),
    *("bpe_vocab", "precision"),
)


def commit() -> str | None:
    """Commit of this checkout; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def header(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Options and data that all rows of a comparison share."""
    return {
        "units": "losses in nats per token, times in seconds, memory in bytes",
        "options": {name: getattr(args, name) for name in SHARED},
        "data": {
            "source": corpus.source,
            "training_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "vocab_size": corpus.vocab_size,
            "single_token_entropy": corpus.single_token_entropy(),
        },
    }


def cases_left(cases: list[Case], rows: list[Row]) -> list[Case]:
    """Those that no row has finished.

    Raises:
        ValueError: a row of the same variant has other settings.
    """
    by_key = {row.key: row for row in rows}
    left = []
    for case in cases:
        row = by_key.get((case.variant, case.config.num_experts, case.seed))
        for name, value in case.settings.items() if row else ():
            assert row is not None
            if row.settings.get(name) != value:
                raise ValueError(
                    f"--out holds results of {case} with {name} = {row.settings.get(name)}, here "
                    f"{value}: give the variant another name, or choose another --out"
                )
        if row is None or not row.finished:
            left.append(case)
    return left


class Comparison(NamedTuple):
    """What a call is to do: `left` of all cases, with the rows that earlier calls have made.

    shared: see `header`.
    """

    corpus: Corpus
    cases: list[Case]
    left: list[Case]
    rows: list[Row]
    shared: dict[str, Any]


def prepare(args: argparse.Namespace, corpus: Corpus, cases: list[Case]) -> Comparison:
    """Encode the data if asked for, and find what earlier calls have left to train.

    Raises:
        ValueError: a vocabulary that does not suit the data, or other results in --out.
    """
    if args.bpe_vocab is not None:
        folder = args.out / f"bpe-{args.bpe_vocab}"
        corpus = encoded_corpus(corpus, args.bpe_vocab, folder, args.seq_len)
    shared = header(args, corpus)
    rows = read_rows(args.out / JSON, shared)
    return Comparison(corpus, cases, cases_left(cases, rows), rows, shared)


def compare(comparison: Comparison, args: argparse.Namespace, deadline: float) -> None:
    """Train the cases that are left until `deadline` (time.monotonic()), and report all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = {"device": device_name(device), "versions": versions(), "commit": commit()}
    corpus, cases, left, rows, shared = comparison
    print(
        f"{device_name(device)}; {len(corpus.train):,} training tokens from {corpus.source}, "
        f"{corpus.vocab_size:,} token ids; {len(left)} of {len(cases)} cases to train",
        flush=True,
    )
    for case in left:
        row = Row(case.variant, case.config.num_experts, case.seed, case.settings, environment)
        rows = [*(one for one in rows if one.key != row.key), row]
        save = partial(write_rows, args.out / JSON, shared, rows)
        train(case, row, corpus, args, device, deadline, save)
        save()
        check_same_batches(rows)
        if not row.finished and row.failure is None:
            break
    report = table(rows)
    with replacing(args.out / TABLE) as file:
        file.write(report.encode() + b"\n")
    plot(args.out / PLOT, rows)
    print(report)
    if still := len(cases_left(cases, rows)):
        print(f"{still} of {len(cases)} cases are not finished: the same command goes on")
    print(f"{JSON}, {TABLE} and {PLOT} are in {args.out}")


def main() -> None:
    """Compare what the options ask for, on a GPU if there is one."""
    begin = time.monotonic()
    # Ctrl-C ends this without a traceback; what is in --out is complete.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with exit_on_error(SCRIPT, ValueError):
        args = parse(__doc__ or "", sys.argv[1:])
        if args.precision is None:
            args.precision = "bfloat16" if torch.cuda.is_available() else "float32"
        corpus = load_corpus(args.data, args.seq_len)
        cases = cases_of(args, args.bpe_vocab or corpus.vocab_size)
        # Last, so that what is refused so far leaves no folder.
        held = hold_folder(args.out, create=True)
    with held or nullcontext():
        with exit_on_error(SCRIPT, ValueError):
            comparison = prepare(args, corpus, cases)
        compare(comparison, args, begin + (args.time_limit or math.inf))


if __name__ == "__main__":
    # Garbage collections skip what was imported.
    gc.freeze()
    main()
