"""What is timed of each step is the step as it goes on, not the first, which finds its kernel and its memory."""

from types import SimpleNamespace

import pytest
import torch

from qwen_precision.model import Encoded, Stopwatch, stopwatch
from qwen_precision.probe.upcasts import Costs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class Slow:
    """Something to upcast, of which the first takes a hundred seconds and every other one."""

    def __init__(self, clock: list[float]) -> None:
        self._clock, self._left = clock, 100.0

    def float(self) -> torch.Tensor:
        self._clock[0] += self._left
        self._left = 1.0
        return torch.zeros(1, 5)


def test_the_first_of_each_kind_is_done_once_more_before_and_does_not_count(clock: list[float]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for kind in ("fp16", "bf16"):
        slow = Slow(clock)
        for _ in range(3):
            assert watch.timed(kind, slow.float).shape == (1, 5)
    assert watch.seconds == 6.0


def test_the_milliseconds_of_an_upcast_are_those_of_one_that_is_not_the_first(clock: list[float]) -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    costs, slow = Costs([Encoded(ids, ids)]), Slow(clock)
    for prompt in range(4):
        costs.upcast(("fp16", prompt), slow)  # type: ignore[arg-type]
    told = costs.close(5)
    assert (told.upcast_seconds, told.steps) == (4.0, 4)
