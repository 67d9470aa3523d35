"""A second CUDA stream, for work that something else can run beside."""

from functools import cache
from types import TracebackType

import torch
from torch import Tensor


class Aside:
    """Inside `with`, work goes to a second stream, after what the current one has to do so far.

    What the current stream does after that runs beside it, until `join`. Can be captured in a
    CUDA graph. Does nothing for a device without streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._entered: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            stream = _second_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            self._entered = torch.cuda.stream(stream)
            self._entered.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._entered is not None:
            self._entered.__exit__(kind, error, traceback)

    def join(self, *made: Tensor) -> None:
        """Let the current stream wait; it is going to use the tensors `made` inside."""
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(_second_stream(self.device))
            for tensor in made:
                tensor.record_stream(current)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    # Of higher priority, or its blocks would wait until those of the current stream run out.
    return torch.cuda.Stream(device, priority=-1)
