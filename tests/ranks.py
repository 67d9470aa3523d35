"""Groups of processes, started once, in which tests run a function on every rank."""

import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from forking import share_imports, start_context
from poison import poison_fresh_memory

if TYPE_CHECKING:
    from flash_moe_dist.runtime import Runtime

TIMEOUT = timedelta(seconds=60)
KERNELS = "gloo with kernels"
# The longest function needs a sixth of this on two cores.
ANSWER_SECONDS = 300


@dataclass
class Failure:
    """An exception on a rank."""

    kind: str
    message: str
    trace: str


class RankPools:
    """Runs functions on any number of ranks, with one group of processes for each number."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], Pool] = {}

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
    ) -> list[Any]:
        """Call `function(*args)` on every rank; return the results by rank.

        `backend`: "gloo", "nccl" (a GPU for each rank), "gloo on cuda" (ranks share GPUs), or
        "gloo with kernels" (interpreted, as on a GPU otherwise; the others use what users get).

        Raises AssertionError with the traceback if a rank failed.
        """
        results = self.outcomes(world_size, function, *args, backend=backend)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank}: {result.trace}"
        return results

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
    ) -> list[Any]:
        """Run like `run`, but return what a rank raised as a `Failure`."""
        key = (world_size, backend)
        if key not in self._pools:
            self._pools[key] = Pool(world_size, backend)
        try:
            return self._pools[key].run(function, args)
        except (TimeoutError, EOFError):
            # A rank hangs or has died: the next test gets a new group.
            self._pools.pop(key).kill()
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.kill()


class Pool:
    def __init__(self, world_size: int, backend: str) -> None:
        context = start_context()
        store = tempfile.mktemp(prefix="flash-moe-test-store-")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, backend, store, there), daemon=True
            )
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for connection in self.connections:
            connection.send((function, args))
        results = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(ANSWER_SECONDS):
                raise TimeoutError(f"rank {rank} did not answer")
            results.append(connection.recv())
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def rank_device() -> torch.device:
    """The device of this rank."""
    return _device


@cache
def rank_runtime(ep_size: int | None = None) -> "Runtime":
    """The `Runtime` of this pool's ranks; collective when first called.

    Made once, because each gloo group has threads that wake up 100 times a second.
    """
    # Imported here, because importing this project fixes whether Triton is interpreted.
    from flash_moe_dist.runtime import Runtime

    return Runtime.of_world(rank_device(), ep_size)


_device = torch.device("cpu")


def _serve(rank: int, world_size: int, backend: str, store: str, connection: Connection) -> None:
    global _device
    share_imports()
    # Read when Triton's functions are made, which is when this project imports them.
    os.environ.pop("TRITON_INTERPRET", None)
    if backend == KERNELS:
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.speed_up()
    torch.set_num_threads(1)
    poison_fresh_memory()
    backend, _, on = backend.partition(" ")
    if backend == "nccl" or on == "on cuda":
        _device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(_device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    while True:
        function, args = connection.recv()
        try:
            result = function(*args)
        except BaseException as error:
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        connection.send(result)
