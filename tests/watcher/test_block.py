"""Readings can be asked in the block and after it, as numbers, as a table and as a frame; misuse is one sentence."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import qwen_precision
from qwen_precision.errors import QprecError
from support.checkpoints import DEMO

IDS = torch.tensor([[5, 17, 300, 42, 9]])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Doubles(nn.Module):
    """One operation, two forwards apart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0


def test_a_nan_is_told_in_the_block_as_soon_as_the_forward_is_over() -> None:
    model = load(DEMO, torch.float16)
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        assert not torch.isfinite(model(IDS).logits).all()
        inside = readings.first_nonfinite()
    assert inside is not None and inside == readings.first_nonfinite()
    assert inside.module.endswith("mlp.down_proj") and inside.op == "linear"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_asking_in_the_midst_of_a_forward_changes_neither_readings_nor_outputs(mode: Any, healthy: Path) -> None:
    model = load(healthy, torch.bfloat16)
    with mode():
        with qwen_precision.watch(model) as undisturbed:
            plain = model(IDS).logits
        with qwen_precision.watch(model) as readings:
            seen: list[int] = []
            parts = [part for name, part in model.named_modules() if "norm" in name or "mlp" in name]
            hooks = [part.register_forward_hook(lambda *_: seen.append(len(readings))) for part in parts]
            asked = model(IDS).logits
    for hook in hooks:
        hook.remove()
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1]
    assert torch.equal(plain, asked) and list(readings) == list(undisturbed)


def test_a_cast_right_after_asking_is_read_and_not_derived_from_a_slot_that_is_gone() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor, asking: bool) -> torch.Tensor:
            y = (x * 3.0) * 2.0
            if asking:
                len(readings)
            return y.to(torch.float16)

    model = Asks()
    for asking in (False, True):
        with torch.inference_mode(), qwen_precision.watch(model) as readings:
            model(torch.ones(2), asking)
        assert [(reading.op, reading.abs_max) for reading in readings] == [("mul", 3.0), ("mul", 6.0), ("cast", 6.0)]


def test_nothing_measured_is_said_and_not_called_finite() -> None:
    with qwen_precision.watch(Doubles()) as readings:
        assert len(readings) == 0 and "nothing was measured" in repr(readings)
    for ask in (readings.first_nonfinite, readings.worst):
        with pytest.raises(QprecError, match="nothing was measured: call the model"):
            ask()


def test_forwards_in_one_block_are_counted_and_the_calls_of_each_begin_anew() -> None:
    model = Doubles()
    with qwen_precision.watch(model) as readings:
        model(torch.tensor([1.0]))
        assert [reading.abs_max for reading in readings] == [2.0]
        model(torch.tensor([3.0]))
        model(torch.tensor([2.0]))
    assert [(reading.forward, reading.call, reading.abs_max) for reading in readings] == [
        (0, 0, 2.0),
        (1, 0, 6.0),
        (2, 0, 4.0),
    ]
    assert repr(readings).startswith("1 operation, 3 forwards: every output finite") and " 6 " in repr(readings)


def test_a_model_can_be_watched_again_after_the_block_and_the_first_readings_stay() -> None:
    model = Doubles()
    with qwen_precision.watch(model) as first:
        model(torch.tensor([1.0]))
    with qwen_precision.watch(model) as second:
        model(torch.tensor([5.0]))
    model(torch.tensor([7.0]))
    assert [reading.abs_max for reading in first] == [2.0] and [reading.abs_max for reading in second] == [10.0]


def test_the_same_model_twice_at_once_is_refused_and_the_outer_block_goes_on() -> None:
    model = Doubles()
    with qwen_precision.watch(model) as readings:
        with pytest.raises(QprecError, match="is being watched already"), qwen_precision.watch(model):
            pass
        model(torch.tensor([1.0]))
    assert [reading.abs_max for reading in readings] == [2.0]


def test_two_models_at_once_do_not_show_up_in_each_other() -> None:
    class Triples(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x + x

    one, other = Doubles(), Triples()
    with qwen_precision.watch(one) as outer, qwen_precision.watch(other) as inner:
        other(torch.tensor([1.0]))
        len(inner)
    assert [reading.op for reading in inner] == ["add", "add"]
    assert [reading.op for reading in outer] == ["add", "add"]  # it ran in that block; how it was measured did not


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Qwen/Qwen3-8B", "not str; for a checkpoint that is not loaded use qwen_precision.probe_model"),
        (None, "not NoneType"),
        (nn.Linear, "not the class Linear; give an instance"),
    ],
)
def test_what_is_no_loaded_model_is_one_sentence(model: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said) as raised:
        qwen_precision.watch(model)
    assert "\n" not in str(raised.value)


# -- headroom, table, frame ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "headroom"), [(2.0, 65504 / 4), (0.0, math.inf), (40000.0, 0.0), (float("nan"), 0.0)]
)
def test_headroom_is_the_dtypes_largest_number_over_the_largest_magnitude(value: float, headroom: float) -> None:
    model = Doubles()
    with qwen_precision.watch(model) as readings:
        model(torch.tensor([value, 0.0], dtype=torch.float16))
    assert readings[0].headroom == headroom


def test_a_large_number_in_a_wide_format_is_not_worse_than_one_near_a_narrow_formats_limit() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1.0).to(torch.float32) * 1e6

    model = Wide()
    with qwen_precision.watch(model) as readings:
        model(torch.tensor([30000.0], dtype=torch.float16))
    assert readings.worst(1)[0].abs_max == 30000.0


def test_the_table_says_module_operation_magnitude_and_headroom_and_is_short() -> None:
    model = load(DEMO, torch.float16)
    with torch.inference_mode(), qwen_precision.watch(model) as readings:
        model(IDS)
    lines = repr(readings).splitlines()
    assert len(lines) == 13 and max(map(len, lines)) < 120
    assert "not finite; the first to run stand first" in lines[0]
    assert lines[1].split() == ["module", "operation", "dtype", "largest", "headroom"]
    assert lines[2].split() == ["model.layers.4.mlp.down_proj", "down_proj", "output", "fp16", "inf", "none"]
    assert lines[-1].startswith("… and ")


def test_a_frame_has_a_row_a_reading_and_its_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    def frame(rows: list[tuple[Any, ...]], columns: list[str]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in rows]

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frame))  # type: ignore[arg-type]
    model = Doubles()
    with qwen_precision.watch(model) as readings:
        model(torch.tensor([1.0], dtype=torch.float16))
    assert readings.to_pandas() == [
        {
            "forward": 0,
            "module": "",
            "op": "mul",
            "call": 0,
            "name": "mul in (model)",
            "dtype": "fp16",
            "abs_max": 2.0,
            "headroom": 32752.0,
        }
    ]


def test_without_pandas_a_frame_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # type: ignore[arg-type]
    model = Doubles()
    with qwen_precision.watch(model) as readings:
        model(torch.tensor([1.0]))
    with pytest.raises(ModuleNotFoundError, match="needs pandas, which is not installed; install it with: pip install"):
        readings.to_pandas()
