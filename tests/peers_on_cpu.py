"""Memory that processes without GPUs share, in place of what GPUs read of each other."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flash_moe.ops.aside import Aside
from flash_moe_dist import reserved
from flash_moe_dist.agreement import gather_objects
from flash_moe_dist.peer_memory import PeerMemory

_numbers = itertools.count()


class SharedFiles(PeerMemory):
    """A file for each rank. Everything is done at once, so that there is nothing to wait for."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int]
    ) -> None:
        self.sizes, self.ep_size = tuple(sizes), dist.get_world_size(group)
        self.begins = [sum(sizes[:number]) for number in range(len(sizes))]
        self.num_bytes, self._group, self._device = sum(sizes), group, device
        self._views: dict[object, Tensor] = {}
        self._turn = 0
        folder = Path(gather_objects(tempfile.gettempdir(), group)[0])
        number = gather_objects(f"{next(_numbers)}-{id(self)}", group)[0]
        paths = [folder / f"flash-moe-peers-{number}-{rank}" for rank in range(self.ep_size)]
        paths[dist.get_rank(group)].write_bytes(b"\xff" * self.num_bytes)
        dist.barrier(group)
        self._of_ranks = [
            torch.from_file(str(path), shared=True, size=self.num_bytes, dtype=torch.uint8)
            for path in paths
        ]
        dist.barrier(group)
        paths[dist.get_rank(group)].unlink()

    def view(
        self, rank: int, region: int, shape: Sequence[int], dtype: torch.dtype, skipped: int = 0
    ) -> Tensor:
        first = self.begins[region] + skipped * dtype.itemsize
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._of_ranks[rank][first : first + size].view(dtype).view(tuple(shape))

    def barrier(self, channel: int) -> None:
        dist.barrier(self._group)

    def aside(self) -> Aside:
        return Aside(self._device)

    def reached(self) -> Any:
        return Reached()

    def used_here(self, tensor: Tensor) -> Tensor:
        return tensor


class Reached:
    def wait(self) -> None: ...


def use_shared_files(patch: pytest.MonkeyPatch) -> None:
    """From now on layers of this process, and of its peers, which do the same, use these."""
    patch.setattr(reserved, "peer_memory", SharedFiles)
