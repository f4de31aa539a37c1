"""Adds up what a part of each step takes, without waiting for a GPU in the middle of it."""

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """A ``with`` block around the part; on CUDA the events are read only when the sum is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._warm: set[Hashable] = set()
        self._device = device if device.type == "cuda" else None
        self._events: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        if self._device is not None:
            event: Any = torch.cuda.Event
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
            self._events[-1][0].record(torch.cuda.current_stream(self._device))
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._device is not None:
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._started

    def timed(self, kind: Hashable, work: Callable[[], T]) -> T:
        """What the work gives. The first of a kind is done once more before, untimed: it finds its kernel and memory,
        and takes as long as a hundred others."""
        if kind not in self._warm:
            self._warm.add(kind)
            work()
        with self:
            return work()

    @property
    def seconds(self) -> float:
        """The sum so far; on CUDA this waits for the last part."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + float(sum(start.elapsed_time(stop) for start, stop in self._events)) / 1e3
