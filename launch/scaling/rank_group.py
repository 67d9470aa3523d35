"""Group of the first ranks of the world, on which one point of a scaling curve is measured."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flash_moe_dist.agreement import gather_objects


class RankGroup:
    """The first `size` ranks of the world.

    Has their process group, a mesh over them, and the rank of this process among them.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.size, self.group, self.device = size, group, device
        self.mesh = DeviceMesh.from_group(group, device.type)
        self.rank = dist.get_rank(group)

    def gather(self, value: Any) -> list[Any]:
        """Collect `value` of every rank, in the order of ranks."""
        return gather_objects(value, self.group)

    def align(self) -> None:
        """Make what the devices run next begin on all ranks at the same time."""
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
