"""An error that all ranks raise, printed once and without a traceback."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from flash_moe_dist.runtime import Runtime


class RaisingParser(argparse.ArgumentParser):
    """Raises ValueError instead of exiting, so that all ranks can report an error as one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@contextmanager
def an_error_of_all_ranks_ends_the_run(
    script: str,
    runtime: Runtime,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError),
) -> Iterator[None]:
    """Prints the error on one rank, in the name of the script, and exits with 2.

    kinds: of exceptions that no rank raises alone.
    """
    try:
        yield
    except kinds as error:
        if runtime.is_main:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        dist.barrier()
        sys.exit(2)
