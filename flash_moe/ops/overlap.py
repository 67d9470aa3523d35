"""Overlap hooks: input rows that arrive in chunks, output rows that are consumed in chunks.

Dispatchers and backends agree on this order:

    1. Chunks are processed strictly in the order in which they are listed.
    2. `InputChunk.wait` is called before the first read of its rows.
    3. `OutputChunk.on_written` is called once the last store to its rows has been enqueued, and
       before any store to the next chunk is.

Both callbacks run on the host and act on the current stream. Either may be a barrier that all
GPUs of a group must reach, so a backend calls each exactly once, for chunks without rows too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _noop() -> None:
    pass


@dataclass(frozen=True)
class InputChunk:
    """Some rows of an input, with what to call before they are read.

    rows: which rows of the input, as a slice with a start and a stop.
    wait: makes the current stream wait until they have arrived.
    source: (rows, H), read in place of the input; None: the input itself.
    """

    rows: slice
    wait: Callable[[], object] = _noop
    source: Tensor | None = None


@dataclass(frozen=True)
class OutputChunk:
    """Some rows of an output, with where they go and what to call once they are written.

    rows: which rows of the output, as a slice with a start and a stop.
    out: (rows, H), written.
    on_written: called when the last store to `out` has been enqueued on the current stream.
    accumulate_with: (P, rows, H) contiguous. If given, `out` receives the sum over P of these, in
        order and in their dtype, with the rows of this output standing in for
        accumulate_with[own_index], whose contents are ignored and may be overwritten.
    """

    rows: slice
    out: Tensor
    on_written: Callable[[], object] = _noop
    accumulate_with: Tensor | None = None
    own_index: int = 0


# The chunks of an output, in the order in which they are written. Called once, when the first is
# about to be written: it may allocate memory, which would add to the peak of the steps before.
Outputs = Callable[[], Sequence[OutputChunk]]


def wait_for_rows(inputs: Sequence[InputChunk]) -> None:
    """Wait for all chunks, in order."""
    for chunk in inputs:
        chunk.wait()


class WholeOutput:
    """A single output chunk of all rows, allocated when it is about to be written.

    Args:
        shape: (T, H).
        dtype, device: type of the output, and where it is allocated.

    Attributes:
        value: the output, once `chunks` was called.
    """

    value: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def chunks(self) -> tuple[OutputChunk]:
        """Allocate the output; these are `Outputs` of a backend."""
        self.value = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return (OutputChunk(slice(0, self.shape[0]), self.value),)
