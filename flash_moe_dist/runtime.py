"""Start and end of a distributed process: group, backend, device, timeout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DEFAULT_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Runtime:
    """This process among its peers.

    `mesh` has one axis, "ep": every rank owns a share of the experts, and is data parallel
    for everything else.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[Runtime]:
    """Join the process group that torchrun's environment describes; leave it at the end.

    nccl with one GPU a process where there are GPUs, otherwise gloo. A collective that waits
    longer than `timeout` fails. If the block raises, the group is not waited for, so that the
    error ends this process at once and torchrun ends the others.

    Raises:
        RuntimeError: not started by torchrun, or more processes on this machine than GPUs.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"environment variables {', '.join(missing)} are not set: start this with torchrun, "
            "for example torchrun --standalone --nproc-per-node 2 launch/train.py"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"--nproc-per-node must be at most the {torch.cuda.device_count()} GPUs of this "
                f"machine, got at least {local_rank + 1}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    world_size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("ep",))
    yield Runtime(dist.get_rank(), world_size, device, mesh)
    dist.barrier()
    dist.destroy_process_group()
