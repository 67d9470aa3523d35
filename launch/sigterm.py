"""SIGTERM as a request to end after the step under way, with a checkpoint."""

import faulthandler
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Sigterm:
    """Within its block SIGTERM is noted: `received`. It ends the process only by `deadline`.

    torchrun sends SIGTERM to all processes when it is asked to end, and also to those that are
    left when one has failed. The first calls for a checkpoint; in the second a process may wait
    for what never comes. So work that other ranks take part in has a deadline: a process that
    does not come out of it in time prints where it is and exits with 1.

    Args:
        grace: seconds from SIGTERM, or from the beginning of the work if that is later.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received = False
        # The watching thread arms, the main thread disarms.
        self._lock = threading.Lock()
        self._has_deadline = False

    def __enter__(self) -> "Sigterm":
        # A handler in Python would wait for the main thread to come back from a collective.
        self._noted, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
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
        self._signals.close()
        self._thread.join()
        self._noted.close()

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """For a part of the loop in which ranks wait for each other."""
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
        while numbers := self._noted.recv(64):
            with self._lock:
                if signal.SIGTERM in numbers and not self.received:
                    self.received = True
                    self._arm()

    def _arm(self) -> None:
        if self.received and self._has_deadline:
            # In C: no code in Python that hangs can keep it from running.
            faulthandler.dump_traceback_later(self.grace, exit=True)
