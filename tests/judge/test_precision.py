"""How far a dtype is from fp32: against plain transformers, layer by layer, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge.precision import precision
from qwen_precision.record.run import Pass, Run
from support.runs import run_probe

pytestmark = pytest.mark.arithmetic

TEXT = "The capital of France is Paris, and"
BATCH = ["The capital of France is Paris", "1", "上海有个非常出名的地方，"]


def plain(folder: Path, dtype: str, texts: list[str]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden states after each layer, last logits and mask of transformers itself, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype].torch_name)).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    # As generation counts: padding has no position.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    states: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out).double())

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].double()
    return states, logits, inputs["attention_mask"].bool()


def the_pass(run: Run, dtype: str) -> Pass:
    return next(each for each in run.passes if each.dtype == dtype)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_error_and_divergence_are_those_of_plain_transformers(
    healthy: Path, dtype: str, memory: str, tmp_path: Path
) -> None:
    import yaml

    (tmp_path / "p.yaml").write_text(yaml.safe_dump([{"name": "batch", "batch": BATCH}], allow_unicode=True))
    run = run_probe(healthy, file=str(tmp_path / "p.yaml"), memory=memory)
    wanted, wanted_logits, mask = plain(healthy, "fp32", BATCH)
    ours, our_logits, _ = plain(healthy, dtype, BATCH)
    errors = [float((a[mask] - b[mask]).norm() / b[mask].norm()) for a, b in zip(ours, wanted, strict=True)]
    assert the_pass(run, dtype).layer_error == pytest.approx(errors, rel=1e-4)
    a, b = torch.log_softmax(wanted_logits, -1), torch.log_softmax(our_logits, -1)
    assert the_pass(run, dtype).kl == pytest.approx((a.exp() * (a - b)).sum(-1).tolist(), rel=1e-2, abs=1e-9)


def test_fp16_is_closer_to_fp32_than_bf16_on_a_healthy_model(healthy: Path) -> None:
    found = precision(run_probe(healthy, [TEXT]))
    assert list(found) == ["fp16", "bf16"] and found["fp16"].rows == 1
    for near, far in zip(found["fp16"].layers, found["bf16"].layers, strict=True):
        assert near is not None and far is not None and near < far / 4


def test_a_stream_that_was_replaced_has_no_error_of_its_own_any_more(demo_run: Run) -> None:
    for each in demo_run.passes:
        if each.dtype != "fp16":
            continue
        first = min((seed.layer for seed in each.reseeded), default=None)
        if first is not None and len({row for seed in each.reseeded for row in seed.rows}) == len(each.top1):
            assert all(value is None for value in each.layer_error[first:]) and each.kl == [None] * len(each.top1)
            assert all(value is not None for value in each.layer_error[: first - 1])


def test_without_a_reference_there_is_nothing_to_compare_with(healthy: Path) -> None:
    run = run_probe(healthy, [TEXT], dtypes=["fp16"], reference=False)
    assert precision(run) == {} and the_pass(run, "fp16").layer_error == []
