"""`watch`: every operation is seen, outputs are untouched, nothing stays behind."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import AutoModelForCausalLM

import qwen_precision
from support import kernels

IDS = torch.tensor([[5, 17, 300, 42, 9]])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def load(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["healthy", "healthy_moe"])
def test_watched_and_unwatched_outputs_are_bit_identical(
    kind: str, dtype: torch.dtype, attention: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(kind), dtype, attention)
    with torch.no_grad():
        before = model(IDS).logits
        with qwen_precision.watch(model) as readings:
            during = model(IDS).logits
        after = model(IDS).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert len(readings) > 100


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_module_outputs_products_and_sums_are_all_seen(mode: Callable, healthy: Path) -> None:
    model = load(healthy)
    with mode(), qwen_precision.watch(model) as readings:
        model(IDS)
    seen = {(reading.module, reading.op, reading.call) for reading in readings}
    layer, fused = "model.layers.1", mode is torch.inference_mode or not kernels.OLDEST
    for site in [
        ("model.embed_tokens", "embedding", 0),
        (f"{layer}.self_attn.q_proj", "linear", 0),
        (f"{layer}.self_attn.q_norm", "pow", 0),
        (f"{layer}.self_attn", "mul", 0),  # rotary
        (f"{layer}.self_attn", "scaled_dot_product_attention" if fused else "softmax", 0),
        (layer, "add", 0),
        (f"{layer}.mlp.act_fn", "silu", 0),
        (f"{layer}.mlp", "mul", 0),  # SwiGLU
        (f"{layer}.mlp.down_proj", "linear", 0),
        (layer, "add", 1),
        ("model.norm", "mul", 1),
        ("lm_head", "linear", 0),
    ]:
        assert site in seen, site


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_readings_equal_an_fp64_loop_over_hooked_outputs(dtype: torch.dtype, healthy: Path) -> None:
    model = load(healthy, dtype)
    expected: dict[str, float] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, out, name=name: expected.__setitem__(name, out.double().abs().max().item())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(IDS)
    for handle in handles:
        handle.remove()
    measured = {reading.module: reading.abs_max for reading in readings if reading.op == "linear"}
    assert measured == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derived_readings_of_casts_and_squares_are_exact(dtype: torch.dtype) -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 1.0009765625
            wide = y.to(torch.float32)
            squares = wide.pow(2)
            scaled = squares * 1.1
            return y, wide, squares, scaled.to(dtype), scaled

    for scale in (1e-6, 1.0, 255.0, 3e4):
        model, x = Norm(), (torch.randn(4, 33, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
        with torch.inference_mode(), qwen_precision.watch(model) as readings:
            y, wide, squares, narrow, _ = model(x)
        by_op = {(r.op, r.call): r.abs_max for r in readings}
        outputs = [("mul", 0, y), ("pow", 0, squares)]
        if dtype != torch.float32:
            outputs += [("cast", 0, wide), ("cast", 1, narrow)]
        for op, call, out in outputs:
            assert by_op[op, call] == out.double().abs().max().item()


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[:, 1:].mul_(1000.0),
        lambda y: y.copy_(torch.tensor([[1.0, 2000.0]])),
        lambda y: y.masked_fill_(torch.tensor([[False, True]]), 2000.0),
        lambda y: y.index_copy_(1, torch.tensor([1]), torch.tensor([[2000.0]])),
    ],
    ids=["through a view", "copy", "fill", "index"],
)
def test_a_value_written_in_place_is_not_confused_with_the_one_read_before(write: Callable) -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.0
            write(y)
            return y.to(torch.float64)

    model = InPlace()
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(torch.tensor([[1.0, 2.0]]))
    assert [r.abs_max for r in readings if r.op == "cast"] == [2000.0]


@pytest.mark.parametrize("exponent", [2, 3, 0.5, -1])
def test_only_the_square_is_derived_other_powers_are_read(exponent: float) -> None:
    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1.0).pow(exponent)

    model, x = Power(), torch.tensor([0.25, 3.0])
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        out = model(x)
    assert [r.abs_max for r in readings if r.op == "pow"] == [out.abs().max().item()]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_infinity_are_carried_through_also_when_both_are_there(value: float) -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.inference_mode():
        x = torch.ones(2, 4)
        x[1, 2] = value
        with qwen_precision.watch(linear) as readings:
            linear(x)
    assert not readings[0].finite
    assert readings.first_nonfinite() is readings[0]
    assert readings.worst(1) == [readings[0]]


def hooks_of(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_hooks_and_modes_are_gone_after_an_exception_and_what_was_read_stays(
    error: type[BaseException], healthy: Path
) -> None:
    model = load(healthy)

    def fail(*args: object) -> None:
        raise error

    breaks = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    before = hooks_of(model)
    with pytest.raises(error), torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(IDS)
    assert hooks_of(model) == before and _get_current_dispatch_mode() is None
    assert any(reading.module.startswith("model.layers.0.mlp") for reading in readings)
    breaks.remove()
    with torch.inference_mode(), qwen_precision.watch(model) as again:
        model(IDS)
    assert again[len(again) - 1].module == "lm_head"


def test_paths_stay_true_after_an_error_that_the_model_catches_itself() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Fails()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.inner(x)
            except ValueError:
                return x * 2.0

    model = Catches()
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(torch.ones(2))
    assert [(reading.module, reading.op) for reading in readings] == [("", "mul")]


def test_hooks_and_modes_are_gone_after_success(healthy: Path) -> None:
    model = load(healthy)
    with torch.inference_mode(), qwen_precision.watch(model):
        model(IDS)
    assert hooks_of(model) == 0 and _get_current_dispatch_mode() is None


def test_no_activation_outlives_the_block(healthy: Path) -> None:
    import gc
    import weakref

    model = load(healthy, attention="eager")
    alive: list[weakref.ref] = []
    model.model.layers[0].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    with torch.inference_mode(), qwen_precision.watch(model):
        model(IDS)
        gc.collect()
        assert alive[0]() is None  # not even while the block is open


def test_a_tied_weight_is_one_module_path_each(healthy_tied: Path) -> None:
    model = load(healthy_tied)
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(IDS)
    assert [r.module for r in readings if r.op == "embedding"] == ["model.embed_tokens"]
    assert [r.module for r in readings if r.module == "lm_head"] == ["lm_head"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_the_mask_of_eager_attention_is_no_reading_under_any_autograd_mode(
    mode: Callable, dtype: torch.dtype, healthy: Path
) -> None:
    model = load(healthy, dtype, "eager")
    with mode(), qwen_precision.watch(model) as readings:
        model(input_ids=IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    assert readings.worst(1)[0].abs_max < 100
    assert readings.first_nonfinite() is None


@pytest.mark.parametrize("filler", [float("-inf"), torch.finfo(torch.float16).min])
@pytest.mark.parametrize("how", ["where", "masked_fill", "masked_fill_"])
def test_masks_and_masked_scores_are_judged_on_their_unmasked_entries(how: str, filler: float) -> None:
    class Scores(nn.Module):
        def forward(self, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            if how == "where":
                mask = torch.where(keep, torch.zeros((), dtype=scores.dtype), filler)
                scores = scores + mask[:, :, : scores.shape[-1]]
            elif how == "masked_fill":
                scores = scores.masked_fill(~keep, filler) * 1.0
            else:
                scores = scores * 1.0
                scores.masked_fill_(~keep, filler)
            return torch.softmax(scores * 0.5, dim=-1)

    scores = torch.full((1, 4, 4), -20.0, dtype=torch.float16)
    keep = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    model = Scores()
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        out = model(scores, keep)
    assert torch.isfinite(out).all()
    assert all(reading.abs_max <= 20.0 for reading in readings), list(readings)


def test_an_overflow_under_a_mask_is_still_seen() -> None:
    class Scores(nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            keep = torch.ones(4, 4, dtype=torch.bool).tril()
            mask = torch.where(keep, torch.zeros((), dtype=scores.dtype), torch.finfo(scores.dtype).min)
            return (scores * 4.0) + mask

    model, scores = Scores(), torch.full((4, 4), 3e4, dtype=torch.float16)
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(scores)
    assert [r.abs_max for r in readings] == [math.inf, math.inf]


def test_operations_keep_their_names_with_and_without_autograd() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(nn.functional.linear(x, x) @ x, dim=-1).to(torch.float16)

    names = []
    for mode in (torch.inference_mode, torch.no_grad):
        model = Product()
        with mode(), qwen_precision.watch(model) as readings:
            model(torch.ones(3, 3))
        names.append([reading.op for reading in readings])
    assert names[0] == ["linear", "matmul", "softmax", "cast"]
    assert names[1] in (names[0], ["linear", "linear", "softmax", "cast"])  # a 2-D matmul is mm below autograd
