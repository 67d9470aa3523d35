"""Starts Python processes as forks of a server that has imported PyTorch, which takes seconds.

The server imports nothing of this project: each fork does. On a machine with GPUs, whose driver
does not survive a fork, processes start as usual.

All forks hash strings alike, so on all ranks a set of strings has one order. Tests of the examples
in READMEs and of launch/train.sh start their processes as usual everywhere.
"""

import ctypes
import gc
import multiprocessing.forkserver as forkserver
import os
import runpy
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.multiprocessing as mp

FORKS = not torch.cuda.is_available()
TORCHRUN = "torch.distributed.run"
PRELOADED = [
    TORCHRUN,
    "torch._dynamo.testing",
    "torch.distributed.checkpoint.format_utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.profiler",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "safetensors.torch",
    "tqdm",
    "pytest",
]


def start_context() -> Any:
    """The context of `multiprocessing` by which tests start processes."""
    if not FORKS:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # With more, NumPy starts threads as it is imported, and these do not survive a fork.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    return context


def share_imports() -> None:
    """Leave the memory of all that is imported to be shared with the server: to be called first.

    Collecting garbage, and freeing everything at the end, would write to each object.
    """
    gc.freeze()


def start_python(
    arguments: tuple[str, ...], environment: dict[str, str], fork: bool = True
) -> "Program":
    """Start `python ARGUMENTS` in a session of its own.

    Args:
        arguments: a script and its arguments, or "-m torch.distributed.run" and those of torchrun,
            whose workers are forked too.
        fork: False starts the process as usual.
    """
    if fork and FORKS:
        return ForkedPython(arguments, environment)
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class ForkedPython:
    """Offers what tests use of `subprocess.Popen`, with pipes for output and errors."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.args = (sys.executable, *arguments)
        context = start_context()
        (out, out_there), (err, err_there) = (context.Pipe(duplex=False) for _ in range(2))
        self._process = context.Process(
            target=_become, args=(self.args, environment, out_there, err_there)
        )
        self._process.start()
        out_there.close()
        err_there.close()
        self._readers = [_Reader(pipe) for pipe in (out, err)]

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it and its children printed, when all of them have ended."""
        end = None if timeout is None else time.monotonic() + timeout
        for reader in self._readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self._process.join()
        out, err = (reader.text for reader in self._readers)
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


Program = subprocess.Popen[str] | ForkedPython


class _Reader(threading.Thread):
    """Reads all that comes through a pipe."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self._pipe = pipe
        self.start()

    def run(self) -> None:
        with open(self._pipe.fileno(), closefd=False, errors="replace") as file:
            self.text = file.read()
        self._pipe.close()


def _become(
    command: tuple[str, ...], environment: dict[str, str], out: Connection, err: Connection
) -> None:
    share_imports()
    os.setsid()
    for pipe, standard in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(pipe.fileno(), standard.fileno())
        pipe.close()
    _, *arguments = command
    if arguments[:2] != ["-m", TORCHRUN]:
        _run_script(command, environment)
    _take(command, environment)
    _prepare_workers(arguments[2:])
    sys.argv = [TORCHRUN, *arguments[2:]]
    sys.modules[TORCHRUN].main()


def _take(command: tuple[str, ...], environment: dict[str, str]) -> None:
    """Take over what /proc shows, and what a new interpreter takes from the environment."""
    _, *fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[44]), int(fields[45])
    text = "\0".join(command).encode()
    assert len(text) < end - begin, "the command line of the server is too short for this one"
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)


def _run_script(command: tuple[str, ...], environment: dict[str, str]) -> None:
    """Run the script as an interpreter would, and end the process as it would, with finalizers."""
    _take(command, environment)
    script, *arguments = (word for word in command[1:] if word != "-u")
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    standard_output: Any = sys.stdout
    standard_output.reconfigure(line_buffering=True)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    ctypes.pythonapi.Py_Exit(code)


class _Worker:
    """What torchrun uses of `subprocess.Popen`: a child forked before torchrun started threads."""

    spare: ClassVar[list[tuple[int, Connection]]] = []

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **streams: Any) -> None:
        assert streams.pop("start_new_session")
        assert not any(streams.values()), "workers write where torchrun does"
        assert self.spare, "more restarts than workers were prepared for"
        self.pid, connection = self.spare.pop()
        connection.send((args, env))
        connection.close()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.01)
        return code


def _prepare_workers(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    patched: Any = subprocess_handler
    patched.Popen = _Worker
    options = sys.modules[TORCHRUN].parse_args(arguments)
    # A machine that joins or leaves restarts workers too.
    starts = options.max_restarts + 3
    for _ in range(starts * int(options.nproc_per_node)):
        here, there = mp.Pipe()
        pid = os.fork()
        if pid == 0:
            here.close()
            for _, other in _Worker.spare:
                other.close()
            try:
                command, environment = there.recv()
            except EOFError:
                os._exit(0)
            there.close()
            os.setsid()
            _run_script(command, environment)
        there.close()
        _Worker.spare.append((pid, here))
