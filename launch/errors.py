"""Exit on an error that all ranks raise alike, with one message and without a traceback."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from flash_moe_dist.runtime import Runtime


class RaisingParser(argparse.ArgumentParser):
    """Parser that raises ValueError instead of exiting, so that all ranks can report one error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@contextmanager
def exit_on_shared_error(
    script: str,
    runtime: Runtime,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError),
) -> Iterator[None]:
    """Print an error of the block on the main rank, as one of `script`, and exit with status 2.

    kinds: types of exceptions that all ranks raise alike; others pass through.
    """
    try:
        yield
    except kinds as error:
        if runtime.is_main:
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        dist.barrier()
        sys.exit(2)
