"""Healthy models give no finding: every dtype, sdpa and eager, padding, batch, MoE, tied, silence everywhere."""

from pathlib import Path

import pytest

from qwen_precision.judge.checks import judge
from support.checkpoints import make_checkpoint
from support.runs import faults, run_probe

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["healthy", "healthy_tied", "healthy_moe"])
def test_a_healthy_model_gives_no_finding(kind: str, attention: str, request: pytest.FixtureRequest) -> None:
    report = judge(run_probe(request.getfixturevalue(kind), attention=attention))  # the built-in prompts: batch, chat
    assert faults(report) == []
    assert report.verdict == {"fp16": "ok", "bf16": "ok", "fp32": "ok"}
    assert report.exit_code("risk") == 0


def test_the_eager_mask_of_minimum_values_is_no_finding_and_no_headroom(healthy: Path) -> None:
    run = run_probe(healthy, attention="eager")
    masked = [index for index, site in enumerate(run.sites) if site.op == "add" and site.call == 2]
    assert masked  # the masked scores are watched …
    for each in run.passes:
        for index in masked:
            value = each.abs_max[index]
            assert value is not None and value < 100  # … and judged on their unmasked entries


def test_a_stream_near_but_below_the_limit_of_the_setting_is_no_finding(tmp_path: Path) -> None:
    def plant(model) -> None:
        model.model.embed_tokens.weight[:, 3] = 32000.0  # headroom 2.05

    report = judge(run_probe(make_checkpoint(tmp_path, edit=plant), ["Hello there"]))
    assert faults(report) == []


def test_sliding_window_layers_are_healthy_too(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    for attention in ("sdpa", "eager"):
        assert faults(judge(run_probe(folder, attention=attention))) == []


def test_attention_bias_is_part_of_the_product_it_belongs_to(tmp_path: Path) -> None:
    assert faults(judge(run_probe(make_checkpoint(tmp_path, attention_bias=True)))) == []
