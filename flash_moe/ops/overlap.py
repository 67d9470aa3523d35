"""Rows of which some are there before others, and sums of which some are wanted before others."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def nothing() -> None:
    """What is to be done where there is nothing to wait for, and nobody to tell."""


@dataclass(frozen=True)
class InputChunk:
    """Rows that may be read once `wait` was called; from `source`, if that is given, instead."""

    rows: slice
    wait: Callable[[], object] = nothing
    source: Tensor | None = None


@dataclass(frozen=True)
class OutputChunk:
    """Where sums of these rows go, (rows, H), and what to call when they were written.

    addends: (P, rows, H) contiguous. What goes out is the sum over P of these, in order and in
        their dtype, with the sums of these rows in `place`; what stood there is ignored, and may
        be written over.
    """

    rows: slice
    out: Tensor
    on_written: Callable[[], object] = nothing
    accumulate_with: Tensor | None = None
    own_index: int = 0
