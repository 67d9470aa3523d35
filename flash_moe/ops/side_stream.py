"""A second CUDA stream for work that may run concurrently with the current one."""

from functools import cache
from types import TracebackType

import torch
from torch import Tensor


class SideStream:
    """Context manager that enqueues work on a side stream, after the current stream's so far.

    What the current stream gets after the `with` block may run concurrently, until `wait`. Can be
    captured in a CUDA graph. Does nothing on a device without streams.

    Args:
        device: where the work runs.
        stream: the side stream; defaults to one per device, shared by all callers.
    """

    def __init__(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        self.device = device
        self._stream = stream
        if stream is None and device.type == "cuda":
            self._stream = _second_stream(device)

    def __enter__(self) -> None:
        # torch.cuda.stream takes several times as long as launching a kernel.
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
        """Make the current stream wait for the side stream.

        Args:
            tensors: allocated on the side stream and used on the current one; recorded there, so
                that the caching allocator does not reuse their memory too early.
        """
        if self._stream is not None:
            current = current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)


def new_stream(device: torch.device) -> torch.Stream:
    """A new high-priority stream for `SideStream`."""
    # With equal priority its blocks would wait until those of the current stream run out.
    return torch.Stream(device, priority=-1)


_second_stream = cache(new_stream)


def current_stream(device: torch.device) -> torch.Stream:
    """The current stream of a CUDA device."""
    return torch.accelerator.current_stream(device.index)
