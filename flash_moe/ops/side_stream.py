"""A second CUDA stream, for work that something else can run beside."""

from functools import cache
from types import TracebackType

import torch
from torch import Tensor


class SideStream:
    """Inside `with`, work goes to a second stream, after what the current one has to do so far.

    What the current stream does after that runs beside it, until `join`. Can be captured in a
    CUDA graph. Does nothing for a device without streams.

    Args:
        stream: of `device`; None: one that all share who name none.
    """

    def __init__(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        self.device = device
        self._stream = stream
        if stream is None and device.type == "cuda":
            self._stream = _second_stream(device)

    def __enter__(self) -> None:
        # torch.cuda.stream takes some times as long as launching a kernel.
        if self._stream is not None:
            self._device_before = torch.accelerator.current_device_index()
            self._before = current_stream(self.device)
            self._stream.wait_stream(self._before)
            torch.accelerator.set_stream(self._stream)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            torch.accelerator.set_stream(self._before)
            if self._device_before != self._before.device_index:
                torch.accelerator.set_device_index(self._device_before)

    def wait(self, *tensors: Tensor) -> None:
        """Let the current stream wait; it is going to use the tensors `made` inside."""
        if self._stream is not None:
            current = current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)


def new_stream(device: torch.device) -> torch.Stream:
    """For `SideStream`, and nobody else's."""
    # Of higher priority, or its blocks would wait until those of the current stream run out.
    return torch.Stream(device, priority=-1)


_second_stream = cache(new_stream)


def current_stream(device: torch.device) -> torch.Stream:
    """Of a CUDA device."""
    return torch.accelerator.current_stream(device.index)
