"""16-bit products as a GPU sums them: in fp32 and rounded once, or with sums kept in fp16; all else is left alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_precision.watcher import Watcher, attached, computing
from qwen_precision.watcher import arithmetic as module

pytestmark = pytest.mark.arithmetic

HALF, BF = torch.float16, torch.bfloat16
ROWS = torch.tensor([3, 3, 7], dtype=torch.int32)
"""Where the rows of each of three experts end; the second has none."""


def given(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def under(arithmetic: str, call: Any, *operands: Tensor) -> Tensor:
    with torch.inference_mode(), computing(arithmetic):
        out: Tensor = call(*operands)
    return out


CALLS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((2, 5, 48), (32, 48))),
    "linear with a bias": (F.linear, ((2, 5, 48), (32, 48), (32,))),
    "linear of one token": (F.linear, ((48,), (32, 48))),
    "mm": (torch.mm, ((5, 48), (48, 32))),
    "addmm": (torch.addmm, ((32,), (5, 48), (48, 32))),
    "bmm": (torch.bmm, ((4, 5, 48), (4, 48, 6))),
    "baddbmm": (torch.baddbmm, ((4, 5, 6), (4, 5, 48), (4, 48, 6))),
    "matmul of heads": (torch.matmul, ((2, 4, 5, 48), (2, 4, 48, 6))),
    "matmul with a vector": (torch.matmul, ((5, 48), (48,))),
}


@pytest.mark.parametrize("dtype", [HALF, BF], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_a_product_is_that_of_fp32_operands_rounded_once(name: str, dtype: torch.dtype) -> None:
    call, shapes = CALLS[name]
    operands = [given(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    out = under("tensor-core", call, *operands)
    exact = call(*(each.double() for each in operands))
    # One rounding to the dtype, of a sum that fp32 has a few steps off: at most a step where it falls between two.
    step = exact.abs().to(dtype).float() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert out.dtype == dtype and out.shape == exact.shape
    assert bool(((out.double() - exact).abs() <= 0.5 * step + exact.abs().max() * 1e-5).all())


def test_each_product_equals_the_same_call_in_fp32_bit_for_bit() -> None:
    states, weight, bias = given(2, 5, 48, dtype=HALF), given(32, 48, dtype=HALF, seed=1), given(32, dtype=HALF, seed=2)
    wide = states.float() @ weight.float().t()
    assert torch.equal(under("tensor-core", F.linear, states, weight), wide.half())
    assert torch.equal(under("tensor-core", F.linear, states, weight, bias), (wide + bias.float()).half())
    many = states.mT.contiguous()
    assert torch.equal(under("tensor-core", torch.bmm, states, many), (states.float() @ many.float()).half())


def test_a_bias_is_added_before_the_only_rounding() -> None:
    # 2,048 + 1 + 1 is 2,050; rounded to fp16 after the product, 2,049 would become 2,048 and then stay there.
    states, weight, bias = torch.ones(1, 2), torch.tensor([[2048.0, 1.0]]), torch.tensor([1.0])
    out = under("tensor-core", F.linear, states.half(), weight.half(), bias.half())
    assert out.item() == 2050.0


@pytest.mark.parametrize("arithmetic", ["tensor-core", "fp16-accumulate"])
def test_a_weight_taken_in_parts_gives_what_the_whole_gives(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, bias = given(3, 40, dtype=HALF), given(200, 40, dtype=HALF, seed=1), given(200, dtype=HALF, seed=2)
    whole = under(arithmetic, F.linear, states, weight, bias)
    monkeypatch.setattr(module, "_CACHED", 1)  # 64 rows at a time, and 8 that are left
    parts = under(arithmetic, F.linear, states, weight, bias)
    assert torch.allclose(parts.float(), whole.float(), rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("arithmetic", ["tensor-core", "fp16-accumulate"])
def test_the_rows_of_each_expert_are_multiplied_with_its_own_weight(arithmetic: str) -> None:
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        pytest.skip("this torch has no grouped product")
    states, weights = given(7, 48, dtype=BF), given(3, 48, 32, dtype=BF, seed=1)
    out = under(arithmetic, lambda a, b: grouped(a, b, offs=ROWS), states, weights)
    wide = torch.cat([states[:3].float() @ weights[0].float(), states[3:].float() @ weights[2].float()])
    assert torch.equal(out, wide.bfloat16())


def test_a_sum_kept_in_fp16_overflows_half_way_and_rounds_on_the_way() -> None:
    states = torch.ones(1, 128).half()
    weight = torch.cat([torch.full((1, 64), 1280.0), torch.full((1, 64), -1280.0)], dim=1).half()
    assert under("tensor-core", F.linear, states, weight).item() == 0
    assert under("fp16-accumulate", F.linear, states, weight).item() == float("inf")
    # At 2,048 fp16 counts by two: a half that each of eight more blocks brings is lost eight times.
    slow = torch.cat([torch.full((1, 16), 128.0), torch.full((1, 128), 1 / 32)], dim=1).half()
    assert under("tensor-core", F.linear, torch.ones(1, 144).half(), slow).item() == 2052
    assert under("fp16-accumulate", F.linear, torch.ones(1, 144).half(), slow).item() == 2048


def test_sums_of_bf16_and_of_fp32_are_never_kept_in_fp16() -> None:
    large = torch.full((1, 64), 40000.0)
    for dtype in (BF, torch.float32):
        out = under("fp16-accumulate", F.linear, large.to(dtype), torch.ones(1, 64, dtype=dtype))
        assert bool(torch.isfinite(out).all()) and out.item() > 2e6


def test_fp32_is_left_to_its_own_kernel_bit_for_bit() -> None:
    states, weight = given(5, 300, dtype=torch.float32), given(200, 300, dtype=torch.float32, seed=1)
    assert torch.equal(under("tensor-core", F.linear, states, weight), F.linear(states, weight))


@pytest.mark.parametrize("arithmetic", ["tensor-core", "fp16-accumulate"])
def test_a_watcher_sees_one_operation_with_its_rounded_output(arithmetic: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).half()
    with torch.inference_mode():
        model[0].weight.fill_(100.0)
        watcher = Watcher()
        with attached(model, watcher), computing(arithmetic), watcher:
            out = model(torch.full((1, 3, 8), 100.0, dtype=HALF))
        readings = watcher.take()
    assert [(each.module, each.op, each.dtype) for each in readings] == [("0", "linear", HALF)]
    assert readings[0].abs_max == float("inf") and bool(torch.isinf(out).all())


def test_the_same_forward_twice_gives_the_same_bits() -> None:
    states, weight = given(2, 9, 700, dtype=HALF), given(3000, 700, dtype=HALF, seed=1)
    for arithmetic in ("tensor-core", "fp16-accumulate"):
        once = under(arithmetic, F.linear, states, weight)
        assert torch.equal(once, under(arithmetic, F.linear, states, weight))
