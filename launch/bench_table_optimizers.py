"""Measure what the tables of a layer add to a training step, for each optimizer of tables.

    python launch/bench_table_optimizers.py
    python launch/bench_table_optimizers.py --num-experts 1048576 --json FILE

The part of the tables is the backward pass, less one of frozen tables, clipping, and the
optimizer's step. The optimizers of flash_moe.optim take gradients as pairs, torch.optim.AdamW dense
ones. Each must agree with exact operations in two steps before it is timed. Optimizers are measured
one after the other, not interleaved, since tables are large.
"""

import gc
import signal
import sys
from dataclasses import fields

import torch

from errors import exit_on_error
from table_optimizers.arguments import SCRIPT, parse
from table_optimizers.measure import measure
from table_optimizers.report import table, write_json
from table_optimizers.training import Case


def main() -> None:
    """Measure what the options ask for, on a GPU if there is one."""
    # Ctrl-C ends this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with exit_on_error(SCRIPT, ValueError):
        args = parse(__doc__ or "", sys.argv[1:], device.type == "cuda")
    case = Case(**{field.name: getattr(args, field.name) for field in fields(Case)})
    results = measure(case, device, args.repeats)
    print(table(case, device, results))
    if args.json:
        write_json(args.json, case, device, results, sys.argv[1:])


if __name__ == "__main__":
    # Garbage collections skip what was imported.
    gc.freeze()
    main()
