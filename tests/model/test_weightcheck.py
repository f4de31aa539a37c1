"""The static check, against the slow and obvious way: cast, cast back, compare in fp64."""

import math

import pytest
import torch

from qwen_precision.model.weightcheck import WeightCheck, _counted

SOURCES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TARGETS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def slow(tensor: torch.Tensor, target: torch.dtype) -> tuple[int, int, int]:
    finite = tensor[torch.isfinite(tensor)]
    cast = finite.to(target)
    exact = finite.double() == cast.double()
    return int(torch.isinf(cast).sum()), int(((cast == 0) & (finite != 0)).sum()), int((~exact).sum())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_counts_equal_casting_and_comparing_in_fp64(source: str, target: str) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = torch.randn(4096, generator=random, dtype=torch.float64) * torch.logspace(-12, 6, 4096, dtype=torch.float64)
    tensor = torch.cat([sizes, torch.tensor([0.0, -0.0, 65504.0, -65504.0, 65520.0, 1e30])]).to(SOURCES[source])
    check = WeightCheck([target])
    check.feed("w", "f", tensor)
    (total,) = check.totals()
    assert (total.overflow, total.underflow, total.inexact) == slow(tensor, TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_card_counts_what_the_host_counts(source: str, target: str) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = torch.randn(4096, generator=random, dtype=torch.float64) * torch.logspace(-12, 6, 4096, dtype=torch.float64)
    odd = torch.tensor([0.0, -0.0, -65504.0, 65520.0, 1e30, math.inf, -math.inf, math.nan])
    tensor = torch.cat([sizes, odd]).to(SOURCES[source])
    finite = tensor[torch.isfinite(tensor)]
    largest, nan, inf, count, *lost = _counted(tensor, [target]).tolist()
    assert (nan, inf + nan + count) == (1, tensor.numel()) and (largest, count) == (finite.abs().max(), finite.numel())
    assert tuple(lost) == slow(tensor, TARGETS[target])


def test_every_bf16_value_there_is_gets_the_right_answer_in_fp16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    check = WeightCheck(["fp16"])
    check.feed("w", "f", every)
    (total,) = check.totals()
    assert (total.overflow, total.underflow, total.inexact) == slow(every, torch.float16)
    (weight,) = check.weights()
    assert weight.nan == int(torch.isnan(every).sum()) and weight.inf == 2


def test_a_tensor_fed_in_pieces_or_twice_is_counted_once() -> None:
    tensor = torch.linspace(-1e5, 1e5, 1000).view(10, 100)
    whole, pieces = WeightCheck(["fp16"]), WeightCheck(["fp16"])
    whole.feed("w", "f", tensor)
    for start in (0, 4, 8, 4):
        pieces.feed("w", "f", tensor[start : start + 4], start)
    assert whole.totals() == pieces.totals() and whole.weights() == pieces.weights()


def test_pieces_of_other_sizes_are_not_counted_twice() -> None:
    """A tied embedding is gathered in some steps and multiplied with, as lm_head, in others."""
    tensor = torch.linspace(-1e5, 1e5, 1000).view(10, 100)
    check = WeightCheck(["fp16"])
    for step in (4, 3):
        for start in range(0, 10, step):
            check.feed("w", "f", tensor[start : start + step], start)
    whole = WeightCheck(["fp16"])
    whole.feed("w", "f", tensor)
    assert check.totals() == whole.totals()


def test_every_tensor_that_a_dtype_changes_is_listed_and_no_other() -> None:
    tensor = torch.ones(100000)
    tensor[:5] = 1e-12
    check = WeightCheck(["fp16"])
    check.feed("w", "f", tensor)
    check.feed("exact", "f", torch.ones(10))
    (weight,) = check.weights()
    assert (weight.name, weight.underflow, weight.inexact) == ("w", {"fp16": 5}, {"fp16": 5})
    assert check.totals()[0].underflow == 5


@pytest.mark.parametrize("place", [0, 7, 8, 2**18 - 1, 2**18, 2**19 + 2, 2**19 + 4])
@pytest.mark.parametrize("source", SOURCES)
def test_one_small_number_among_exact_ones_is_counted_wherever_it_stands(source: str, place: int) -> None:
    tensor = torch.ones(2**19 + 5, dtype=SOURCES[source])
    tensor[place] = 2.0**-24 * 1.5 if source != "fp16" else 2.0**-24  # fp16 cannot hold the first, bf16 holds both
    check = WeightCheck(["fp16", "bf16"])
    check.feed("w", "f", tensor)
    fp16, bf16 = check.totals()
    assert (fp16.overflow, fp16.underflow, fp16.inexact) == (0, 0, int(source != "fp16"))
    assert fp16.elements == len(tensor) and bf16.inexact == 0


def test_nan_and_infinities_are_counted_and_the_rest_of_the_tensor_is_still_looked_at() -> None:
    tensor = torch.ones(1000, dtype=torch.bfloat16)
    tensor[3], tensor[500], tensor[999], tensor[7], tensor[8] = math.nan, math.inf, -math.inf, 1e-12, -70000.0
    check = WeightCheck(["fp16"])
    check.feed("w", "f", tensor)
    (weight,) = check.weights()
    assert (weight.nan, weight.inf, weight.abs_max) == (1, 2, float(tensor[8].abs()))
    assert (weight.overflow, weight.underflow, weight.inexact) == ({"fp16": 1}, {"fp16": 1}, {"fp16": 2})
