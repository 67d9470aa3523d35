"""Measurements of one variant of the layer."""

import statistics
from dataclasses import dataclass, field

# Variants other than the dispatchers: the layer on one rank, which dispatches nothing, and the
# conventional dispatch.
SINGLE_RANK, CONVENTIONAL = "one rank", "conventional"


@dataclass
class Result:
    """Measurements of one variant on one number of ranks.

    failure: reason if the variant could not be measured, otherwise empty.
    seconds: a list of repeats, each of the slowest rank. "forward" and "backward": device time of a
        pass, begun on all ranks at once on devices that are busy until it has been launched.
        "loop": wall clock of a forward and backward pass in a loop of many, launching included,
        with no waits added between passes. The conventional dispatch has only "forward".
    phases: seconds of a forward and backward pass in "dispatch", "experts" and "combine", each
        without its waits for other ranks, which are "communication"; "other" is the rest. Means
        over ranks and repeats.
    peak_bytes: peak GPU memory of a training step with AdamW, of the rank with most; 0 on the CPU.
    error: largest relative error against one device; 0 on one rank.
    """

    failure: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    error: float = 0.0

    def median(self, what: str) -> float:
        """Median seconds of "forward", "backward", "loop", or "total" (forward plus backward)."""
        if what == "total":
            return self.median("forward") + self.median("backward")
        return statistics.median(self.seconds[what])
