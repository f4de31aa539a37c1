"""From the host to the device. To a CUDA card through pinned memory on a stream of its own: beside what computes."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class Upload:
    """Brings tensors to one device; whoever brings them, the reader ahead say, waits until they are there.

    Args:
        device: where they go; on any but a CUDA card nothing is done beside.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        """That bringing took, wall time."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """A tensor on the device."""
        moved = self.start(tensor)
        self.finish()
        return moved

    def start(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, not to be read there before ``finish``."""
        if tensor.device == self._device:
            return tensor
        started = time.perf_counter()
        moved = tensor.to(self._device) if self._stream is None else self._beside(tensor, self._stream)
        self.seconds += time.perf_counter() - started
        return moved

    @property
    def beside(self) -> bool:
        """Whether the device has a stream beside what computes."""
        return self._stream is not None

    def then(self, work: Callable[[], None]) -> None:
        """Have the device do some work on what was started, before what is started next."""
        with torch.cuda.stream(self._stream):
            work()

    def finish(self) -> None:
        """Wait until all that was started is there."""
        if self._stream is not None:
            started = time.perf_counter()
            self._stream.synchronize()
            self.seconds += time.perf_counter() - started

    def _beside(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(stream):
            moved = tensor.pin_memory().to(self._device, non_blocking=True)
        # What computes reads it: when it is dropped, its memory is not this stream's again before that is done.
        moved.record_stream(torch.cuda.current_stream(self._device))
        return moved
