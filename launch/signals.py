"""Signals of a process that torchrun has started: it dies with torchrun, and stops when asked to.

Imports nothing but the standard library, so that a script can call `end_with_torchrun` before its
other imports, which take seconds.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

# Those that torchrun passes on to its processes, but for SIGQUIT, which ends them at once.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Constant of linux/prctl.h.
PR_SET_PDEATHSIG = 1


def end_with_torchrun() -> None:
    """Make Linux kill this process when its parent has died, now or earlier.

    The parent is torchrun, or a wrapper that it has started. launch/start.py passes on its pid, so
    that a death at any time is noticed. Without it, a death before this call is missed, so scripts
    call this before they import anything slow. Until `StopSignals` handles it, SIGINT ends the
    process without a traceback. Does nothing in a process that torchrun has not started.
    """
    parent = int(os.environ.get("FLASH_MOE_LAUNCHER_PID") or os.getppid())
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The signal does not come if the parent has died before it was asked for.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class StopSignals:
    """Context manager in which a signal to stop sets `received` instead of ending the process.

    torchrun sends the signal that it gets (SIGTERM, SIGINT, SIGHUP) to all processes, and SIGTERM
    to the remaining ones when one has failed. In the first case the run should save a checkpoint;
    in the second, a process may wait forever for the rank that failed. So collective work runs in a
    `deadline` block: a process that does not leave it in time prints its stack and exits with
    status 1.

    Attributes:
        received: number of the first signal; 0 before any.

    Args:
        grace: seconds from the signal, or from the start of the block if that is later.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received = 0
        # Both the watching thread and the main thread set and cancel the deadline.
        self._lock = threading.Lock()
        self._has_deadline = False

    def __enter__(self) -> "StopSignals":
        # Python runs signal handlers on the main thread, which may be blocked in a collective.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in STOP_SIGNALS
            # nohup has a process ignore SIGHUP.
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
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
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Limit a block in which ranks wait for each other to `grace` seconds after the signal."""
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
                stop = [number for number in numbers if number in self._handlers]
                if stop and not self.received:
                    self.received = stop[0]
                    self._arm()

    def _arm(self) -> None:
        if self.received and self._has_deadline:
            # A watchdog thread in C, which runs even if the main thread holds the GIL.
            faulthandler.dump_traceback_later(self.grace, exit=True)
