"""The least time that the ceilings allow, in seconds.

T tokens, H hidden size, E experts, N pairs, b bytes of an element; R bytes/s of gathered rows,
F FLOP/s of matrix products, C bytes/s of copies. By way of doing the work:

    gather      forward 2 N H b / R: each pair reads a row of either table. Backward 4 N H b / R:
                dy with up rows, down rows for dx, tokens' rows for either table's gradient; the
                scores are kept.
    dense       forward 4 T E H / F: two products over all tokens and experts of 2 T E H FLOPs.
                Backward 8 T E H / F: the four products that stand for the four gathers.
    hbm         both tables' touched rows read once at C, and for the backward pass two gradients
                (E, H) written, zeros included: no way of doing it can leave these out.
    hot_cold    the cheaper of gather and dense, expert by expert: load 2 H b / R or 4 T H / F,
                twice that backward. A skewed routing has most of its pairs in few experts,
                for which products are cheaper.

Launching kernels takes no time in this model; `launch_bound` allows for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.bench.ceilings import Ceilings

SECONDS_PER_LAUNCH = 20e-6


@dataclass(frozen=True)
class Floor:
    """Of one direction, seconds; see the head of this file."""

    gather: float
    dense: float
    hbm: float
    hot_cold: float

    @property
    def uniform(self) -> float:
        return max(min(self.gather, self.dense), self.hbm)

    @property
    def skewed(self) -> float:
        return max(self.hot_cold, self.hbm)


def pairs_of_experts(indices: Tensor, num_experts: int) -> Tensor:
    """(E,) pairs of each expert; empty slots (-1) are no pairs."""
    return torch.bincount(indices[indices >= 0], minlength=num_experts)


def floors(
    loads: Tensor, tokens: int, hidden_size: int, element_bytes: int, ceilings: Ceilings
) -> dict[str, Floor]:
    """Forward and backward, from the pairs (E,) of each expert."""
    row_bytes = hidden_size * element_bytes
    gathers = loads.double() * (2 * row_bytes / ceilings.gather)
    product = 4 * tokens * hidden_size / ceilings.matrix
    touched_rows = 2 * int((loads > 0).sum()) * row_bytes
    gradients = 2 * len(loads) * row_bytes
    forward = Floor(
        gather=float(gathers.sum()),
        dense=len(loads) * product,
        hbm=touched_rows / ceilings.copy,
        hot_cold=float(gathers.clamp(max=product).sum()),
    )
    backward = Floor(
        gather=2 * forward.gather,
        dense=2 * forward.dense,
        hbm=(touched_rows + gradients) / ceilings.copy,
        hot_cold=2 * forward.hot_cold,
    )
    return {"forward": forward, "backward": backward}


def launch_bound(floor_seconds: float, launches: int) -> float:
    """What few tokens may take, where launches outweigh the work."""
    return 1.5 * floor_seconds + SECONDS_PER_LAUNCH * launches
