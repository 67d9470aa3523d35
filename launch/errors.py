"""Errors of a script: refusals in one line without a traceback, and failures after its work."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    # Imports torch, which takes seconds.
    from flash_moe_dist.runtime import Runtime

# Exit status of a script that was asked for what it cannot do.
REFUSED = 2


def reason_in(error: BaseException) -> str:
    """Message of an error; its type if it has none."""
    return str(error) or type(error).__name__


def refuse(script: str, reason: str) -> NoReturn:
    """Print why as the last line, and exit with status 2."""
    print(f"{script}: error: {reason}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


@contextmanager
def exit_on_error(script: str) -> Iterator[None]:
    """Refuse what the block raises; for checks of one process, before it joins any group."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        refuse(script, reason_in(error))


@contextmanager
def exit_on_shared_error(
    script: str,
    runtime: "Runtime",
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError),
) -> Iterator[None]:
    """Refuse what the block raises on all ranks alike, printed by the main rank.

    Under launch/start.py, which prints the error once torchrun has ended, the process hands it the
    error and exits with status 0: after any other, torchrun would start the processes again.

    Args:
        kinds: types of exceptions that all ranks raise alike; others pass through.
    """
    try:
        yield
    except kinds as error:
        from flash_moe_dist.runtime import leave_group

        file = os.environ.get("FLASH_MOE_REFUSAL_FILE")
        if file is not None and os.environ["LOCAL_RANK"] == "0":
            Path(file).write_text(reason_in(error), encoding="utf-8")
        leave_group()
        if file is not None:
            sys.exit(0)
        if runtime.is_main:
            refuse(script, reason_in(error))
        sys.exit(REFUSED)


@contextmanager
def note_failure_after_work(note: str) -> Iterator[None]:
    """Print `note` and the error if the block fails on any rank; the script still succeeds.

    Collective. A rank on which the block fails ends at once, with status 0; the others, which may
    wait for it in a collective, notice that in the store, and end too. A single rank goes on.
    """
    # These take seconds.
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    def print_note(error: Exception) -> None:
        with suppress(OSError):
            print(f"{note}: {error!r}", file=sys.stderr, flush=True)

    if not dist.is_initialized() or dist.get_world_size() == 1:
        try:
            yield
        except Exception as error:
            print_note(error)
        return
    store, left = _get_default_store(), threading.Event()

    def watch() -> None:
        # It raises when the rank that serves the store has ended.
        with suppress(RuntimeError):
            while not store.check([note]):
                if left.wait(0.1):
                    return
        os._exit(0)

    thread = threading.Thread(target=watch, name="failure of other ranks", daemon=True)
    thread.start()
    try:
        yield
        dist.barrier()
    except Exception as error:
        with suppress(RuntimeError):
            # The others may fail because this one has ended.
            if store.add(note, 1) == 1:
                print_note(error)
        os._exit(0)
    left.set()
    thread.join()
