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


def add_and_norm(update: Tensor, residual: Tensor) -> None:
    residual.add_(update)
    update.copy_(residual / residual.float().mean(dim=-1, keepdim=True))


def put(key: Tensor, key_cache: Tensor) -> None:
    key_cache[: len(key)].copy_(key)


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    """Kernels as an engine registers them."""
    library = torch.library.Library("qprec_engine", "DEF")
    library.define("mm(Tensor(a!) out, Tensor x, Tensor weight) -> ()")
    library.define("rotate(Tensor(a!) query, Tensor(b!)? key, *, float by) -> ()")
    library.define("reshape_and_cache(Tensor key, Tensor(a!) key_cache) -> ()")
    library.define("add_and_norm(Tensor(a!) update, Tensor(b!) residual) -> ()")
    kernels = {"mm": mm, "rotate": rotate, "add_and_norm": add_and_norm, "reshape_and_cache": put}
    for name, kernel in kernels.items():
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


def test_what_lies_in_fresh_memory_is_not_what_a_kernel_was_given() -> None:
    out = torch.full((1, 2, 3), float("nan")).half()
    given = [torch.full((1, 2, 4), 300.0).half(), torch.full((3, 4), 200.0).half()]
    assert looked_at(lambda *each: ops().mm(*each), out, *given) == [True]


def test_a_fused_add_and_norm_that_is_given_an_infinity_begins_nothing_in_either_of_its_outputs() -> None:
    update, stream = torch.tensor([[[1.0, INF], [2.0, 3.0]]]), torch.zeros((1, 2, 2))
    assert looked_at(lambda *each: ops().add_and_norm(*each), update, stream) == [False, False]


def test_a_fused_add_that_overflows_by_itself_begins_there() -> None:
    update, stream = (torch.full((1, 2, 2), 60_000.0).half() for _ in range(2))
    assert looked_at(lambda *each: ops().add_and_norm(*each), update, stream) == [True, True]


def test_a_module_that_layers_share_runs_under_the_layer_that_calls_it() -> None:
    shared = nn.ReLU()
    layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), shared) for _ in range(3))
    model = nn.Sequential(*layers)
    with qwen_precision.watch(model) as readings:
        model(torch.ones(1, 2))
    relus = [(each.module, each.call) for each in readings if each.op == "relu"]
    assert relus == [("0.1", 0), ("1.1", 0), ("2.1", 0)]
