"""Refusals of a script: one line without a traceback, and exit status 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    # Imports torch, which takes seconds.
    from flash_moe_dist.runtime import Runtime

# Exit status of a script that was asked for what it cannot do.
REFUSED = 2


def refuse(script: str, reason: str) -> NoReturn:
    """Print why as the last line, and exit with status 2."""
    print(f"{script}: error: {reason}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


@contextmanager
def exit_on_error(script: str, kind: type[Exception]) -> Iterator[None]:
    """Refuse what the block raises; for checks of one process, before it joins any group.

    Args:
        kind: type of the exceptions that refuse something; others pass through.
    """
    try:
        yield
    except kind as error:
        refuse(script, str(error))


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
        from flash_moe_dist.agreement import reason_in
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
