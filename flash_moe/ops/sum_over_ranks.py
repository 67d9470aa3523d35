"""The type of sums over data-parallel ranks, which `flash_moe_dist` supplies."""

from collections.abc import Callable

from torch import Tensor

# Adds up a tensor over the ranks, in place.
SumOverRanks = Callable[[Tensor], None]
