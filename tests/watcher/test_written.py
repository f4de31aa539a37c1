"""Kernels of serving engines return nothing and write into an argument: what they wrote is what they gave."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen_precision
from qwen_precision.watcher.inspector import Inspector
from qwen_precision.watcher.mode import Watcher

INF = float("inf")


def mm(out: Tensor, x: Tensor, weight: Tensor) -> None:
    out.copy_(x @ weight.T)


def rotate(query: Tensor, key: Tensor | None, by: float) -> None:
    for each in (query, key):
        if each is not None:
            each.mul_(by)


def put(key: Tensor, key_cache: Tensor) -> None:
    key_cache[: len(key)].copy_(key)


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """Kernels as an engine registers them."""
    library = torch.library.Library("qprec_engine", "DEF")
    library.define("mm(Tensor(a!) out, Tensor x, Tensor weight) -> ()")
    library.define("rotate(Tensor(a!) query, Tensor(b!)? key, *, float by) -> ()")
    library.define("reshape_and_cache(Tensor key, Tensor(a!) key_cache) -> ()")
    for name, kernel in {"mm": mm, "rotate": rotate, "reshape_and_cache": put}.items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


class Engine(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> Any:
        return self.run(*args)


def ops() -> Any:
    return torch.ops.qprec_engine


def test_what_a_kernel_wrote_is_read() -> None:
    x, weight, out = torch.full((2, 4), 300.0), torch.full((3, 4), 200.0), torch.full((2, 3), -INF)
    half = [each.half() for each in (out, x, weight)]
    model = Engine(lambda *given: ops().mm(*given))
    with qwen_precision.watch(model) as readings:
        model(*half)
    [reading] = list(readings)
    assert (reading.op, reading.abs_max, reading.dtype) == ("linear", INF, torch.float16)
    assert half[0].isinf().all()


def test_each_argument_that_is_written_is_a_reading_wherever_it_is_given() -> None:
    query, key = torch.full((2, 4), 3.0), torch.full((2, 4), 5.0)
    model = Engine(lambda query, key: ops().rotate(query, key=key, by=2.0))
    with qwen_precision.watch(model) as readings:
        model(query, key)
    assert [(each.op, each.call, each.abs_max) for each in readings] == [("rotate", 0, 6.0), ("rotate", 1, 10.0)]


def test_an_argument_that_may_be_missing_is_none() -> None:
    model = Engine(lambda query: ops().rotate(query, None, by=2.0))
    with qwen_precision.watch(model) as readings:
        model(torch.ones(2))
    assert [each.abs_max for each in readings] == [2.0]


def test_a_cache_is_not_read_where_values_are_only_put_into_it() -> None:
    model = Engine(lambda key, cache: ops().reshape_and_cache(key, cache))
    with qwen_precision.watch(model) as readings:
        model(torch.ones(2, 4), torch.full((99, 4), INF))
    assert not len(readings)


def looked_at(run: Any, *given: Tensor) -> list[bool]:
    """Of every event: whether it began there."""
    watcher = Watcher()
    inspector = Inspector(torch.ones((1, 2), dtype=torch.bool), 1.0, {})
    watcher.inspect = inspector
    with torch.inference_mode(), watcher:
        run(*given)
    return [each.event.clean_inputs for each in inspector.found if each.event.nan or each.event.inf]


def test_what_was_there_before_is_no_input_and_an_overflow_begins_there() -> None:
    given = [torch.zeros((1, 2, 3)).half(), torch.full((1, 2, 4), 300.0).half(), torch.full((3, 4), 200.0).half()]
    assert looked_at(lambda *each: ops().mm(*each), *given) == [True]
    given[1][0, 0, 0] = INF
    given[0].zero_()
    assert looked_at(lambda out, x, weight: ops().mm(out, x, weight), given[0], given[1], given[2] * 0 + 1) == [False]


def test_of_two_that_are_written_neither_is_an_input_of_the_other() -> None:
    query, key = (torch.full((1, 2, 4), 60_000.0).half() for _ in range(2))
    assert looked_at(lambda *each: ops().rotate(*each, by=2.0), query, key) == [True, True]


def test_what_a_kernel_only_passes_on_in_place_did_not_begin_there() -> None:
    query = torch.tensor([[[1.0, INF], [2.0, 3.0]]])
    assert looked_at(lambda each: ops().rotate(each, None, by=2.0), query) == [False]
