"""Set-up of a process that torchrun has started: process group, device, meshes, timeout."""

import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flash_moe.arguments import check_type, checked_int
from flash_moe_dist.dispatch.pass_order import check_backward_passes
from flash_moe_dist.rendezvous import store_of_this_attempt, store_on_loopback

DEFAULT_TIMEOUT = timedelta(minutes=10)
MAX_SECONDS_FOR_GLOO_THREADS = 10
# Constant of linux/prctl.h.
PR_SET_PDEATHSIG = 1
# The parent is torchrun, or a wrapper that it has started; that of a fork is another.
PID_AT_IMPORT, PARENT_AT_IMPORT = os.getpid(), os.getppid()


@dataclass(frozen=True)
class Runtime:
    """Rank, device and device meshes of this process.

    mesh: axes "efsdp" and "ep", of world_size = efsdp x ep ranks. Ranks along "ep" own different
        experts and exchange tokens; ranks along "efsdp" own the same experts, whose tables
        `fully_shard` may shard further.
    dp_mesh: axis "dp", all ranks: each rank has its own data, and `fully_shard` shards all
        parameters but the tables.
    timeout: how long a collective on these meshes may take.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    dp_mesh: DeviceMesh
    timeout: timedelta

    @classmethod
    def of_world(
        cls,
        device: torch.device,
        ep_size: int | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> "Runtime":
        """Build the meshes on the default process group, which must be initialized; collective.

        Args:
            device: device that this process uses.
            ep_size, timeout: arguments of `distributed`.

        Raises:
            TypeError: `ep_size` is no int.
            ValueError: `ep_size` does not divide the number of ranks.
        """
        world_size = dist.get_world_size()
        ep_size = world_size if ep_size is None else checked_int("ep_size", ep_size, 1)
        if world_size % ep_size:
            raise ValueError(
                f"ep_size must divide the number of ranks = {world_size}, got {ep_size}"
            )
        ranks = torch.arange(world_size, device="cpu").view(-1, ep_size)
        # init_device_mesh would create the groups with the default timeout.
        groups = [_own_group(ranks.t(), timeout), _own_group(ranks, timeout)]
        mesh = DeviceMesh.from_group(
            groups, device.type, mesh=ranks, mesh_dim_names=("efsdp", "ep")
        )
        dp_mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp",))
        return cls(dist.get_rank(), world_size, device, mesh, dp_mesh, timeout)

    @property
    def ep_mesh(self) -> DeviceMesh:
        return self.mesh["ep"]

    @property
    def efsdp_mesh(self) -> DeviceMesh:
        return self.mesh["efsdp"]

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _own_group(ranks: Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """Create a process group for each row of `ranks`; return this process's. Collective."""
    if len(ranks) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    own, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    return own


@contextmanager
def distributed(
    timeout: timedelta = DEFAULT_TIMEOUT, ep_size: int | None = None
) -> Iterator[Runtime]:
    """Join the process group that torchrun's environment describes; leave it after the block.

    Uses nccl with one GPU for each process where there are GPUs, otherwise gloo. A collective that
    waits longer than `timeout` fails, and with nccl ends the process; for that,
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1, torchrun's default, becomes 3 (0 and 2 are left unchanged).
    A key of a `parallelize_module` plan that matches no module raises, where PyTorch only warns.
    If the block raises, the process does not wait for the group: it ends at once, and torchrun
    ends the other processes. On Linux, the processes also end when torchrun is killed.

    Args:
        timeout: how long each collective, and joining, may take.
        ep_size: number of ranks over which the experts are sharded; must divide the number of
            ranks. None: all ranks.

    Raises:
        RuntimeError: the process was not started by torchrun, there are more processes than GPUs
            on this machine, or not all ranks have joined within `timeout`.
        TypeError: `ep_size` is no int, or `timeout` no timedelta.
        ValueError: `ep_size` does not divide the number of ranks; `timeout` is not positive; or at
            the end of the block, on every rank of the ep mesh, sharded layers ran their last
            backward passes in another order on some rank.
    """
    check_timeout(timeout)
    device = own_device()
    _end_with_torchrun()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _configure_nccl_watchdog()
        dist.init_process_group(
            "nccl", timeout=timeout, device_id=device, **_rendezvous_arguments(timeout)
        )
    else:
        dist.init_process_group("gloo", timeout=timeout, **_rendezvous_arguments(timeout))
    runtime = Runtime.of_world(device, ep_size, timeout)
    with warnings.catch_warnings():
        # Experts that were not sharded would train to other values on each rank.
        warnings.filterwarnings("error", message="Parallelize plan key")
        yield runtime
    check_backward_passes(runtime.ep_mesh.get_group())
    leave_group()


def own_device() -> torch.device:
    """Return the device that torchrun's environment gives to this process.

    Raises:
        RuntimeError: the process was not started by torchrun, or there are more processes than GPUs
            on this machine.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"environment variables {', '.join(missing)} are not set: start this with torchrun, "
            f"for example torchrun --standalone --nproc-per-node 2 {sys.argv[0] or 'script.py'}"
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"--nproc-per-node must be at most the {torch.cuda.device_count()} GPUs of this "
            f"machine, got at least {local_rank + 1}"
        )
    return torch.device("cuda", local_rank)


def check_timeout(timeout: timedelta) -> None:
    """Raise unless `timeout` is a positive timedelta."""
    check_type("timeout", timeout, timedelta)
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")


def leave_group() -> None:
    """Wait for all ranks, and end the process group such that this process can end."""
    dist.barrier()
    dist.destroy_process_group()
    _wait_for_gloo_threads()


def _wait_for_gloo_threads() -> None:
    """Wait until gloo's threads have freed the tensors of collectives that are complete.

    Freeing a tensor takes Python's global lock. A thread that asks for it while Python is ending
    aborts the process. Linux only; elsewhere this returns at once.
    """
    before, end = None, time.monotonic() + MAX_SECONDS_FOR_GLOO_THREADS
    while time.monotonic() < end:
        now = _states_of_gloo_threads()
        # One that sleeps because it waits for the lock gets it during the pause, and runs.
        if now == before and all("S" in one for one in now):
            return
        before = now
        time.sleep(0.01)


def _states_of_gloo_threads() -> list[list[str]]:
    """State and numbers of context switches of each thread in which gloo runs collectives."""
    states = []
    for folder in sorted(Path("/proc/self/task").glob("*")):
        try:
            status = (folder / "status").read_text().splitlines()
        except OSError:
            continue
        if status[0].endswith("pt_gloo_runloop"):
            fields = ("State:", "voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:")
            states.append([line.split()[1] for line in status if line.startswith(fields)])
    return states


def _rendezvous_arguments(timeout: timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` by which the ranks find each other.

    A store of this attempt where the ranks share torchrun's store; elsewhere a store on the
    loopback if torchrun has started all ranks on this machine, and PyTorch's default if not.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        shared = TCPStore(address, port, is_master=False, timeout=timeout)
        store = store_of_this_attempt(shared, rank, world_size, timeout)
    elif os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = store_on_loopback(port, rank, world_size, timeout)
    else:
        return {}
    return {"store": store, "rank": rank, "world_size": world_size}


def _configure_nccl_watchdog() -> None:
    """Make NCCL's watchdog end this process as soon as a collective has timed out."""
    # The watchdog waits four times this long for a debug dump, which defaults to 15 s.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")
    # 1 aborts the communicator first, which waits for all kernels on the device, including those
    # that spin until another rank arrives; 3, PyTorch's own default, does not.
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "1":
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"


def _end_with_torchrun() -> None:
    """Make Linux kill this process when its parent, torchrun, has died, now or earlier.

    A torchrun that was killed cannot end its processes, and one started in its place would run the
    same ranks a second time. A death before this module was imported is noticed if init has become
    the parent, but not if a subreaper (such as systemd --user) has.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = os.getppid()
        # The signal does not come if the parent has died before it was asked for.
        before = PARENT_AT_IMPORT if os.getpid() == PID_AT_IMPORT else parent
        if parent != before or (parent == 1 and not _is_python(1)):
            os.kill(os.getpid(), signal.SIGKILL)


def _is_python(pid: int) -> bool:
    """Whether a process runs the interpreter of this one, as torchrun does."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:
        # Another user's, as init is.
        return False
