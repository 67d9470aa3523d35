"""What is measured of one variant of the layer."""

import statistics
from dataclasses import dataclass, field

# What is measured beside the dispatchers: one rank, which dispatches nothing, and the baseline.
ALONE, CONVENTIONAL = "one rank", "conventional"


@dataclass
class Result:
    """Of one variant on some ranks.

    failure: why there is nothing else.
    seconds: of each repeat, on the rank that took longest: "forward" and "backward", begun on all
        ranks at once on devices with work before it; "loop", of a pass of both among many, without
        any wait in between but their own. The conventional baseline has only a forward pass.
    steps: seconds of both passes in "dispatch", "experts", "combine", each without the waiting
        for other ranks, which is "communication"; "other" is the rest. Means over ranks and
        repeats.
    peak_bytes: most that a GPU's memory held in a training step with AdamW; 0 on CPUs.
    error: the largest relative distance from what one device computes; 0 on one rank.
    """

    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    error: float = 0.0

    def median(self, what: str) -> float:
        """Of "forward", "backward", "loop", or "total": forward and backward."""
        if what == "total":
            return self.median("forward") + self.median("backward")
        return statistics.median(self.seconds[what])
