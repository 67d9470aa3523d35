"""Handle SIGTERM as a request to stop after the current step, with a checkpoint."""

import faulthandler
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Sigterm:
    """Context manager in which SIGTERM sets `received` instead of ending the process.

    torchrun sends SIGTERM to all processes when it is asked to stop, and to the remaining ones when
    one has failed. In the first case the run should save a checkpoint; in the second, a process may
    wait forever for the rank that failed. So collective work runs in a `deadline` block: a process
    that does not leave it in time prints its stack and exits with status 1.

    Args:
        grace: seconds from SIGTERM, or from the start of the block if that is later.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received = False
        # Both the watching thread and the main thread set and cancel the deadline.
        self._lock = threading.Lock()
        self._has_deadline = False

    def __enter__(self) -> "Sigterm":
        # Python runs signal handlers on the main thread, which may be blocked in a collective.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="sigterm", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Limit a block in which ranks wait for each other to `grace` seconds after SIGTERM."""
        with self._lock:
            self._has_deadline = True
            self._arm()
        try:
            yield
        finally:
            with self._lock:
                self._has_deadline = False
                faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while numbers := self._reader.recv(64):
            with self._lock:
                if signal.SIGTERM in numbers and not self.received:
                    self.received = True
                    self._arm()

    def _arm(self) -> None:
        if self.received and self._has_deadline:
            # A watchdog thread in C, which runs even if the main thread holds the GIL.
            faulthandler.dump_traceback_later(self.grace, exit=True)
