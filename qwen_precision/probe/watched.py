"""Run a part of the model watched, and once more, closely, where something was not finite or near a limit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qwen_precision.probe.collect import Collector
from qwen_precision.watcher import Inspector, Reading, Watcher, storages


class WatchedRun:
    """Puts the readings of watched parts into the collector.

    Args:
        watcher: attached to the model.
        collector: takes what was measured.
        near: look closely at operations whose headroom is below this.
    """

    def __init__(self, watcher: Watcher, collector: Collector, near: float) -> None:
        self.watcher, self.collector, self.near = watcher, collector, near

    def run(
        self,
        key: tuple[str, int],
        valid: Tensor,
        module: nn.Module,
        forward: Callable[[], Tensor],
        enter: Callable[[], None] = lambda: None,
        slice_at: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run ``forward`` and give what it gives.

        Args:
            key: dtype and prompt.
            valid: ``[batch, tokens]`` bool, False at padding.
            module: whose weights are used.
            forward: the part; run a second time only if something is suspicious, with the same result.
            enter: sets the watcher's path and masks before each run.
            slice_at: for a part that is a slice of one operation, its first position and first channel.
        """
        sliced = slice_at is not None
        self.watcher.forget()
        enter()
        with self.watcher:
            out = forward()
        readings = self.watcher.take()
        self.collector.add(*key, readings, fold=sliced)
        if suspicious(readings, self.near):
            inspector = Inspector(valid, self.near, storages(module))
            enter()
            self.watcher.inspect = inspector
            try:
                with self.watcher:
                    forward()
            finally:
                self.watcher.inspect = None
                self.watcher.take()
            found = [each.shifted(*slice_at) for each in inspector.found] if slice_at else inspector.found
            self.collector.add_located(*key, found, fold=sliced)
        return out


def suspicious(readings: list[Reading], near: float) -> bool:
    """Whether any reading is not finite or has less headroom than ``near``."""
    return any(not (reading.abs_max * near < torch.finfo(reading.dtype).max) for reading in readings)
