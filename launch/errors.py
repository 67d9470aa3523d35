"""Exit on an error that all ranks raise alike, with one message and without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flash_moe_dist.runtime import Runtime, leave_group

# Exit status of a script that was asked for what it cannot do.
REFUSED = 2


@contextmanager
def exit_on_shared_error(
    script: str,
    runtime: Runtime,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError),
) -> Iterator[None]:
    """Print an error of the block on the main rank, as one of `script`, and exit with status 2.

    Under launch/start.py, which prints the error once torchrun has ended, the process hands it the
    error and exits with status 0: after any other, torchrun would start the processes again.

    Args:
        kinds: types of exceptions that all ranks raise alike; others pass through.
    """
    try:
        yield
    except kinds as error:
        file = os.environ.get("FLASH_MOE_REFUSAL_FILE")
        if file is None and runtime.is_main:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        elif file is not None and os.environ["LOCAL_RANK"] == "0":
            Path(file).write_text(str(error) or type(error).__name__, encoding="utf-8")
        leave_group()
        sys.exit(REFUSED if file is None else 0)
