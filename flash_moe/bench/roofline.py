"""Roofline time of the op: the least time that the device rates allow, in seconds.

T tokens, H hidden size, E experts, N pairs, b bytes of an element; R bytes/s of gathered rows,
F FLOP/s of matrix products, C bytes/s of copies. For each way of computing the op:

    gather      forward 2 N H b / R: each pair reads a row of either table. Backward 4 N H b / R:
                each pair reads a row of up for the gradient of the scores, of down for dx, and of
                dy and x for the gradients of the tables; the scores are saved by the forward pass.
    dense       forward 4 T E H / F: two products over all tokens and experts of 2 T E H FLOPs.
                Backward 8 T E H / F: four products in place of the four gathers.
    hbm         forward: the touched rows of both tables are read once, at C. Backward: two
                gradients (E, H) are written too, zeros included. No way of computing avoids this.
    hot_cold    for each expert the cheaper of gather and dense: with L pairs, forward
                min(2 L H b / R, 4 T H / F), backward twice that. With a skewed routing, few experts
                have most of the pairs, and dense products are cheaper for these.

The model counts no time for launching kernels; `launch_bound` adds it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe.bench.device_rates import DeviceRates

SECONDS_PER_LAUNCH = 20e-6


@dataclass(frozen=True)
class RooflineTime:
    """Seconds of one direction, for each way of computing it; formulas at the top of this file."""

    gather: float
    dense: float
    hbm: float
    hot_cold: float

    @property
    def uniform(self) -> float:
        """Seconds if all experts are computed in one way."""
        return max(min(self.gather, self.dense), self.hbm)

    @property
    def skewed(self) -> float:
        """Seconds if each expert is computed in the cheaper way."""
        return max(self.hot_cold, self.hbm)


def pairs_per_expert(indices: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert, (E,) int64; empty slots (-1) are not counted."""
    return torch.bincount(indices[indices >= 0], minlength=num_experts)


def roofline_time(
    loads: Tensor, tokens: int, hidden_size: int, element_bytes: int, rates: DeviceRates
) -> dict[str, RooflineTime]:
    """Compute the roofline time of "forward" and "backward".

    loads: (E,) pairs of each expert.
    """
    row_bytes = hidden_size * element_bytes
    gathers = loads.double() * (2 * row_bytes / rates.gather)
    product = 4 * tokens * hidden_size / rates.matrix
    touched_rows = 2 * int((loads > 0).sum()) * row_bytes
    gradients = 2 * len(loads) * row_bytes
    forward = RooflineTime(
        gather=float(gathers.sum()),
        dense=len(loads) * product,
        hbm=touched_rows / rates.copy,
        hot_cold=float(gathers.clamp(max=product).sum()),
    )
    backward = RooflineTime(
        gather=2 * forward.gather,
        dense=2 * forward.dense,
        hbm=(touched_rows + gradients) / rates.copy,
        hot_cold=2 * forward.hot_cold,
    )
    return {"forward": forward, "backward": backward}


def launch_bound(roofline_seconds: float, launches: int) -> float:
    """Seconds that a pass over few tokens should take at most, kernel launches included."""
    return 1.5 * roofline_seconds + SECONDS_PER_LAUNCH * launches
