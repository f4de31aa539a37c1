"""A family that runs layer by layer, run whole: the same answers and the same finding, down to the expert."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.judge.checks import judge
from qwen_precision.model import way
from support.families import make_family
from support.runs import errors, memory_of, run_probe

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("plant", [False, True], ids=["healthy", "planted"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "llama"])
def test_run_whole_a_family_gives_what_it_gives_layer_by_layer(
    name: str, plant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_family(tmp_path / "model", name, plant=plant).folder

    def probed() -> tuple[Any, dict[str, torch.Tensor]]:
        answers: dict[str, torch.Tensor] = {}

        def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
            assert logits is not None
            answers[dtype] = logits

        return judge(run_probe(folder, ["hello there"], dtypes=["fp16", "bf16"], on_final=keep)), answers

    shadow, one = probed()
    monkeypatch.setattr(way, "LAYERWISE", frozenset())
    whole, other = probed()
    ways = [memory_of(report.run)[0] for report in (shadow, whole)]
    assert ways == ["resident", "whole"] and shadow.verdict == whole.verdict
    for dtype in ("fp32", "bf16"):  # in fp16 a row that has gone bad is replaced layer by layer, and stays so whole
        assert torch.equal(one[dtype], other[dtype]), dtype
    first = [(each.kind, each.place.module, each.place.expert, each.place.token) for each in errors(shadow)[:1]]
    assert first == [(each.kind, each.place.module, each.place.expert, each.place.token) for each in errors(whole)[:1]]
    assert bool(first) == plant


@pytest.mark.parametrize(
    ("name", "architecture", "what"),
    [("qwen3", "Qwen3ForSequenceClassification", "its class was"), ("gpt2", None, "its family was")],
)
def test_why_a_model_runs_whole_names_what_was_not_compared(
    name: str, architecture: str | None, what: str, tmp_path: Path
) -> None:
    folder = make_family(tmp_path / "model", name, architecture=architecture).folder
    chosen, why = memory_of(run_probe(folder, ["hello there"], dtypes=["fp16"]))
    assert chosen == "whole" and what in why
