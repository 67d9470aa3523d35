"""Ending all ranks with success when something fails on one of them after the work is done."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

POLL_SECONDS = 0.1
# How long rank 0 waits for the others to end.
MAX_SECONDS_FOR_OTHERS = 5


@contextmanager
def note_failure_after_work(note: str) -> Iterator[None]:
    """Print `note` and the error if the block fails on any rank; the script still succeeds.

    Collective. Each rank that ends adds one to a counter in the store. The first is one on which
    the block has failed; the others, which may wait for it in a collective, watch the counter in a
    thread. All end with status 0, rank 0 last, as it may serve the store. A single rank goes on.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        try:
            yield
        except Exception as error:
            _print_note(note, error)
        return
    store, done = _get_default_store(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, note, done), daemon=True)
    watcher.start()
    try:
        yield
        dist.barrier()
    except Exception as error:
        # Otherwise it would end this process before the note is printed.
        done.set()
        watcher.join()
        _end(store, note, error)
    done.set()
    watcher.join()


def _watch(store: Store, note: str, done: threading.Event) -> None:
    """End this process once another rank has begun to end, until `done` is set."""
    # Raised when the rank that serves the store has been killed.
    with suppress(RuntimeError):
        while not store.check([note]):
            if done.wait(POLL_SECONDS):
                return
    _end(store, note)


def _end(store: Store, note: str, error: Exception | None = None) -> NoReturn:
    """Count this rank, print its error if it is the first, and end the process."""
    with suppress(RuntimeError):
        # Later errors may be a consequence of the first.
        if store.add(note, 1) == 1 and error is not None:
            _print_note(note, error)
        give_up = time.monotonic() + MAX_SECONDS_FOR_OTHERS
        while dist.get_rank() == 0 and store.add(note, 0) < dist.get_world_size():
            if time.monotonic() > give_up:
                break
            time.sleep(0.01)
    os._exit(0)


def _print_note(note: str, error: Exception) -> None:
    with suppress(OSError):
        print(f"{note}: {error!r}", file=sys.stderr, flush=True)
