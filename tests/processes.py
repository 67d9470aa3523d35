"""Check that a run leaves no process and no port behind."""

import os
import socket
import time
from pathlib import Path


def assert_nothing_left(marker: str, port: int | None = None) -> None:
    """Assert that no process was given `marker`, a path say, and that none listens at `port`."""
    for _ in range(50):
        left = _processes_with(marker)
        if not left:
            break
        time.sleep(0.1)
    assert not left, left
    if port is not None:
        with socket.socket() as free:
            # A connection that was closed a moment ago does not count.
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for_listener(port: int) -> None:
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at port {port}")


def _processes_with(marker: str) -> dict[int, str]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if marker in command:
                found[int(folder.name)] = command
    return found
