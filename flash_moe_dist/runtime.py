"""Start and end of a distributed process: group, backend, device, timeout."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flash_moe_dist.rendezvous import store_of_this_attempt

DEFAULT_TIMEOUT = timedelta(minutes=10)
# Of linux/prctl.h.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Runtime:
    """This process among its peers.

    mesh: axes "efsdp" and "ep", of world_size = efsdp x ep ranks. Ranks along "ep" own different
        experts and exchange tokens; along "efsdp" they share the same experts, whose tables
        `fully_shard` may cut further.
    dp_mesh: axis "dp", all ranks: each has data of its own, and `fully_shard` cuts everything
        that is no table.
    timeout: of every collective on these meshes.
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
        """This process in the process group there is; arguments as `distributed` takes them.

        Raises:
            ValueError: the number of ranks is no multiple of `ep_size`.
        """
        world_size = dist.get_world_size()
        ep_size = world_size if ep_size is None else ep_size
        if ep_size < 1 or world_size % ep_size:
            raise ValueError(
                f"ep_size must divide the number of ranks = {world_size}, got {ep_size}"
            )
        ranks = torch.arange(world_size).view(-1, ep_size)
        # init_device_mesh would give its groups a timeout of its own.
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
    """Of the groups that are the rows of `ranks`, the one this process is in; collective."""
    if len(ranks) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    own, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    return own


@contextmanager
def distributed(
    timeout: timedelta = DEFAULT_TIMEOUT, ep_size: int | None = None
) -> Iterator[Runtime]:
    """Join the process group that torchrun's environment describes; leave it at the end.

    nccl with one GPU a process where there are GPUs, otherwise gloo. A collective that waits
    longer than `timeout` fails, and with nccl ends the process: TORCH_NCCL_ASYNC_ERROR_HANDLING=1,
    which torchrun sets where nothing is set, becomes 3; 0 and 2 are left as they are. If the block
    raises, the group is not waited for, so that the error ends this process at once and torchrun
    ends the others. On Linux, a torchrun that is killed takes its processes along.

    Args:
        timeout: of every collective.
        ep_size: ranks that share out the experts; a divisor of the number of ranks, None for all.

    Raises:
        RuntimeError: not started by torchrun, more processes on this machine than GPUs, or not
            all ranks come in time.
        ValueError: the number of ranks is no multiple of `ep_size`.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"environment variables {', '.join(missing)} are not set: start this with torchrun, "
            f"for example torchrun --standalone --nproc-per-node 2 {sys.argv[0] or 'script.py'}"
        )
    _end_with_torchrun()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"--nproc-per-node must be at most the {torch.cuda.device_count()} GPUs of this "
                f"machine, got at least {local_rank + 1}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _let_nccl_end_this_process_at_once()
        dist.init_process_group("nccl", timeout=timeout, device_id=device, **_meeting(timeout))
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout, **_meeting(timeout))
    yield Runtime.of_world(device, ep_size, timeout)
    dist.barrier()
    dist.destroy_process_group()


def _meeting(timeout: timedelta) -> dict[str, Any]:
    """Where the ranks find each other, as `init_process_group` takes it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    own = store_of_this_attempt(store, rank, world_size, timeout)
    return {"store": own, "rank": rank, "world_size": world_size}


def _let_nccl_end_this_process_at_once() -> None:
    """When its watchdog finds that a collective has waited too long."""
    # It waits four times this long for a dump, 15 s by default.
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "500")
    # With 1 it aborts the communicator first, which waits for all kernels on the device, among
    # them those that wait for a rank themselves. PyTorch's default, 3, does without that.
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "1":
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"


def _end_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun, its parent, is gone.

    Killed itself, torchrun cannot; and another one in its place would start the same ranks again.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
