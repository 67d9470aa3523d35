"""The folder of a run's results: made once the run is accepted, held by one run at a time, and
written to in whole files."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = "lock"
# A process that was just killed holds its lock until it has given back its memory.
WAIT_SECONDS = 5.0


def hold_folder(folder: Path, create: bool) -> IO[str] | None:
    """Lock the folder for this process, until it closes the file returned or ends.

    Uses flock on a file that is left behind. Whether it excludes processes of other machines is up
    to the file system; where there is no flock, a note says that the folder is not locked.

    Args:
        folder: folder of the results.
        create: make the folder and the file if they are missing.

    Returns:
        The locked file; None if there is none and `create` is false.

    Raises:
        ValueError: the folder cannot be written to, or another process holds it.
    """
    path = folder / LOCK
    try:
        if create or folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        if not create and not path.exists():
            return None
        file = open(path, "r+", opener=_create_unless_link)  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"--out must be a writable folder, got {error}") from error
    deadline = time.monotonic() + WAIT_SECONDS
    while not _lock(file):
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read().strip() or "another run"
            file.close()
            raise ValueError(f"--out {folder} is in use by {holder}: choose another, or end that")
        time.sleep(0.1)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path`, which takes its place once it is complete."""
    partial = path.with_name(path.name + ".partial")
    # Removed first, as it may be a link, which would be followed.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        yield file
    os.replace(partial, path)


def _create_unless_link(path: str, flags: int) -> int:
    """Open the lock file, which is emptied: never what a link points to."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _lock(file: IO[str]) -> bool:
    """Try to lock; also true, with a note, where the file system cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"train.sh: {file.name} is not locked: {error}", file=sys.stderr)
    return True
