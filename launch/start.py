"""Check options and environment, then run torchrun in this process; called by launch/train.sh.

What cannot work is refused with one line, the last on the screen, and exit status 2: before any
process has started, or as the processes of launch/train.py report it.
"""

import os
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from errors import exit_on_error, refuse
from options import DESCRIPTION, SCRIPT, parse_args


def positive_number(name: str, default: int) -> int:
    """Read a positive number from the environment.

    Raises:
        ValueError: it is another text; names the variable.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text, re.ASCII):
        raise ValueError(f"{name} must be a positive number, got {text}")
    return int(text)


class Torchrun(NamedTuple):
    """What the environment says of torchrun: its options, and how many processes it is to start."""

    options: list[str]
    processes: int


def prepare_environment() -> Torchrun:
    """Check the environment, and set what processes need and is not set.

    Raises:
        ValueError: names the variable that has a wrong value.
    """
    import torch
    from torch.distributed.run import get_args_parser

    gpus = torch.cuda.device_count()
    processes = positive_number("NPROC_PER_NODE", gpus or 2)
    if 0 < gpus < processes:
        raise ValueError(
            f"NPROC_PER_NODE must be at most the {gpus} GPUs of this machine, got {processes}"
        )
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    threads_of_levels = os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", threads_of_levels, re.ASCII):
        raise ValueError(f"OMP_NUM_THREADS must be a positive number, got {threads_of_levels}")
    positive_number("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)
    # torchrun (torch 2.11 to 2.13) reuses a shared store after restarts; when the machines come
    # back in another order, they do not agree on which machine has it.
    not_shared = os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if not_shared not in ("0", "1"):
        raise ValueError(f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 0 or 1, got {not_shared}")

    given = os.environ.get("TORCHRUN_ARGS") or "--standalone"
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise ValueError(f"TORCHRUN_ARGS must be options of torchrun, got {given!r}: {message}")

    parser.error = error  # type: ignore[method-assign]
    try:
        words = shlex.split(given)
    except ValueError as unpaired:
        error(str(unpaired))
    if parser.parse_args([*words, "script"]).training_script != "script":
        error("a script is among them")
    return Torchrun(words, processes)


def run_torchrun(arguments: list[str]) -> None:
    """Run torchrun with these arguments; exits where it does not succeed."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Warnings that processes are sent a signal, which the processes report themselves.
    for module in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.ERROR)
    os.environ["FLASH_MOE_LAUNCHER_PID"] = str(os.getpid())
    with tempfile.NamedTemporaryFile("r", prefix="flash-moe-", encoding="utf-8") as refusal:
        os.environ["FLASH_MOE_REFUSAL_FILE"] = refusal.name
        try:
            torchrun(arguments)
        except SignalException as stopped:
            # As a shell reports a process that a signal has ended.
            sys.exit(128 + stopped.sigval)
        except ChildFailedError as failed:
            print(failed, file=sys.stderr, flush=True)
            sys.exit(1)
        if reason := refusal.read():
            refuse(SCRIPT, reason)


def main() -> None:
    """Start the processes of launch/train.py, with the options of this process."""
    # Until torchrun handles it: Ctrl-C ends this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = sys.argv[1:]
    with exit_on_error(SCRIPT, ValueError):
        parse_args(DESCRIPTION, options)
        torchrun = prepare_environment()
    # The note on it has been printed.
    options = ["--time-phases" if option == "--time-steps" else option for option in options]
    script = str(Path(__file__).with_name("train.py"))
    processes = str(torchrun.processes)
    run_torchrun([*torchrun.options, "--nproc-per-node", processes, script, *options])


if __name__ == "__main__":
    main()
