"""Memory that processes without GPUs share, in place of what GPUs read of each other."""

import itertools
import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe_dist.agreement import gather_objects
from flash_moe_dist.dispatch import symmetric_memory

_numbers = itertools.count()


class SharedFiles(symmetric_memory.Region):
    """A file for each rank. Everything is done at once, so that there is nothing to wait for."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def rendezvous(self, group: dist.ProcessGroup) -> None:
        self._group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        folder = Path(gather_objects(tempfile.gettempdir(), group)[0])
        number = gather_objects(f"{next(_numbers)}-{id(self)}", group)[0]
        paths = [folder / f"flash-moe-peers-{number}-{peer}" for peer in range(size)]
        paths[rank].write_bytes(b"\xff" * self.num_bytes)
        dist.barrier(group)
        self._of_ranks = []
        for path in paths:
            with path.open("r+b") as file:
                self._of_ranks.append(mmap.mmap(file.fileno(), self.num_bytes))
        dist.barrier(group)
        paths[rank].unlink()

    def view(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int
    ) -> Tensor:
        count = torch.Size(shape).numel()
        assert offset_bytes + count * dtype.itemsize <= self.num_bytes
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        memory = self._of_ranks[rank]
        # A tensor of its own, as on a GPU: no view of another.
        whole = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset_bytes)
        return whole.view(tuple(shape))

    def barrier(self) -> None:
        dist.barrier(self._group)


class Reached:
    def wait(self) -> None: ...


def use_shared_files(patch: pytest.MonkeyPatch) -> None:
    """Use these files in place of memory of GPUs, in layers of all ranks; each rank calls it."""
    patch.setattr(symmetric_memory, "_buffers_of_groups", {})
    patch.setattr(symmetric_memory, "Region", SharedFiles)
    patch.setattr(symmetric_memory, "_share_one_host", lambda *_: True)
    patch.setattr(symmetric_memory.SymmetricBuffers, "record_event", lambda _: Reached())
