"""What people reported of real checkpoints, rebuilt tiny: kind, place, cause and the number of findings are known.

What the scale bytes of a quantised checkpoint leave in the record is tested in ``tests/model/test_scales.py``; here it
is what a person is told.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding, Report
from qwen_precision.settings.prompts import PromptSpec
from support.checkpoints import make_checkpoint
from support.plants import averaging, empty, ids_of, mark, unit
from support.quantise import SCHEMES, Parts, quantised, rewrite
from support.runs import explained, run_probe

pytestmark = pytest.mark.transformers

TEXTS = ["The capital of France is Paris", "Hello there"]
ALL = ("fp16", "bf16", "fp32")


def told(report: Report) -> list[tuple[Any, ...]]:
    """Every finding: what, and where. All were measured in the dtype itself, none is foreseen from fp32."""
    assert not any(each.predicted for each in report.findings)
    return [(each.dtype, each.kind, each.place.layer, each.place.name) for each in report.findings]


def at(finding: Finding) -> tuple[int, str, int | None]:
    """Position and text of the token, and the channel."""
    assert finding.place.token is not None and finding.place.token.text is not None
    return finding.place.token.position, finding.place.token.text, finding.place.channel


def bare(folder: Path, **options: Any) -> Path:
    """An embedding model, as AutoModel saves it: no lm_head."""
    whole = make_checkpoint(folder.with_name("whole"), **options)
    shutil.copytree(whole, folder)
    AutoModel.from_pretrained(whole, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_nvfp4_scale_bytes_that_are_nan(healthy: Path, tmp_path: Path) -> None:
    """Qwen3-Omni in NVFP4: 0x7F and 0xFF among the FP8 scales of o_proj, and text of one token for ever."""
    name = "model.layers.2.self_attn.o_proj.weight_scale"

    def change(tensors: Parts) -> None:
        scales = tensors[name].view(torch.uint8)
        scales[5, 3], scales[60, 0] = 0x7F, 0xFF

    report = judge(run_probe(rewrite(quantised(healthy, tmp_path / "q", SCHEMES["ct nvfp4"])[0], change), TEXTS))
    damage = [(dtype, "weight-nonfinite", 2, "o_proj weight") for dtype in ALL]
    assert told(report) == [*damage, *((dtype, "bad-scale", 2, "o_proj weight scale") for dtype in ALL)]
    scale = report.findings[3].cause
    assert scale.kind == "damaged-scale" and f"2 of 256 scales of {name}" in scale.sentence and "NaN" in scale.sentence
    assert "block row 5, column 3 (outputs 5, inputs 48 to 63)" in scale.evidence[0]
    assert "holds 32 NaN and 0 infinite" in report.findings[0].cause.sentence  # two blocks of 16


def test_an_fp8_scale_that_was_never_filled(healthy: Path, tmp_path: Path) -> None:
    """A loader fills scales with the lowest number of fp32 first; its square is what activations then meet."""
    name = "model.layers.0.mlp.down_proj.weight_scale"

    def change(tensors: Parts) -> None:
        tensors[name][0] = torch.finfo(torch.float32).min

    report = judge(run_probe(rewrite(quantised(healthy, tmp_path / "q", SCHEMES["ct fp8 tensor"])[0], change), TEXTS))
    weight, scale = "down_proj weight", "down_proj weight scale"
    assert told(report) == [
        *((dtype, "weight-nonfinite", 0, weight) for dtype in ALL),
        *((dtype, "weight-overflow", 0, weight) for dtype in ("fp16", "bf16")),
        *((dtype, "bad-scale", 0, scale) for dtype in ALL),
    ]
    cause = report.findings[-1].cause
    assert cause.kind == "damaged-scale" and f"1 of 1 scales of {name}" in cause.sentence
    assert "never written" in cause.sentence


def test_an_embedding_model_whose_swiglu_product_is_beyond_fp16_as_an_operand_only(tmp_path: Path) -> None:
    """Qwen3-Embedding-8B: gate and up of layer 2 are small, and their product is what down_proj reads in fp16."""

    def plant(model: Any) -> None:
        empty(model)
        unit(model, 2, 5, 0, 50.0)  # the channel leaves the norm as 8: 400 times 400

    report = judge(run_probe(bare(tmp_path / "bare", edit=plant), TEXTS))
    assert told(report) == [("fp16", "overflow", 2, "SwiGLU product")]
    (finding,) = report.findings
    assert at(finding)[::2] == (0, 5) and finding.cause.kind == "out-of-range"
    assert finding.magnitude.reference == pytest.approx(160_000, rel=1e-3)
    assert (report.verdict["bf16"], report.verdict["fp32"]) == ("ok", "ok")


@pytest.mark.parametrize("chat", [False, True])
def test_a_down_projection_that_overflows_only_with_the_chat_template(chat: bool, tmp_path: Path) -> None:
    """QwQ-32B: down_proj of layer 5 gets 14,280, at a token that only the template writes."""

    def plant(model: Any) -> None:
        empty(model)
        mark(model, "<|im_start|>", 6)  # two channels of 100 leave the norm as 8 / sqrt(2) each
        unit(model, 5, 4, 6, 14_280**0.5 / (8 / 2**0.5), 8.0)

    folder = make_checkpoint(tmp_path / "model", family="qwen2", num_hidden_layers=7, edit=plant)
    text = "What is 2 + 2?"
    spec = PromptSpec(name="asked", chat=text) if chat else PromptSpec(name="asked", text=text)
    report = judge(explained(folder, [spec], explain=False))
    assert told(report) == ([("fp16", "overflow", 5, "down_proj output")] if chat else [])
    if chat:
        (finding,) = report.findings
        assert at(finding) == (0, "<|im_start|>", 9) and finding.cause.kind == "out-of-range"
        assert finding.magnitude.reference == pytest.approx(8 * 14_280, rel=1e-2)


def test_a_residual_stream_that_grows_until_the_last_layer_adds_too_much(tmp_path: Path) -> None:
    """gpt-oss: 35 after the first layers, then 45,344, then infinite; what comes near before that is a warning."""

    def plant(model: Any) -> None:
        layers = model.model.layers
        for layer in layers:
            for part in (layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias, layer.mlp.experts.down_proj):
                part.zero_()
            layer.mlp.experts.down_proj_bias.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 7] = 35.0
        layers[2].self_attn.o_proj.bias[7], layers[3].self_attn.o_proj.bias[7] = 45_344.0 - 35.0, 45_344.0

    few = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}
    report = judge(run_probe(make_checkpoint(tmp_path, family="gpt_oss", dtype="float32", edit=plant, **few), TEXTS))
    first, *near = report.findings
    assert not first.predicted and (first.dtype, first.kind, first.place.layer) == ("fp16", "overflow", 3)
    assert first.place.name == "residual add after attention" and at(first)[::2] == (0, 7)
    assert first.magnitude.reference == 2 * 45_344.0 and first.cause.kind == "out-of-range"
    assert {(each.dtype, each.kind, each.severity) for each in near} == {("fp16", "near-overflow", "warning")}
    assert sorted((each.place.layer, each.place.name) for each in near) == [
        (2, "o_proj output"),
        (2, "residual add after attention"),
        (2, "residual add after mlp"),
        (3, "o_proj output"),
    ]


def starts_with_import(model: Any) -> None:
    """Attention of layer 1 averages a channel that one token has: all of it at the first place, less anywhere else."""
    empty(model)
    mark(model, "import", 2)
    averaging(model, 1, 2, 9, 80_000.0 / (8 / 2**0.5))


@pytest.mark.parametrize(
    ("text", "fails"), [("import os", True), ("import", True), ("we import os", False), ("def f(x):", False)]
)
def test_an_embedding_model_that_fails_only_for_texts_that_start_with_a_word(
    text: str, fails: bool, tmp_path: Path
) -> None:
    report = judge(run_probe(bare(tmp_path / "bare", edit=starts_with_import), [text]))
    assert told(report) == ([("fp16", "overflow", 1, "o_proj output")] if fails else [])
    if fails:
        (finding,) = report.findings
        assert finding.place.token is not None and finding.place.token.id == ids_of("import")[0]
        assert at(finding)[::2] == (0, 9) and finding.magnitude.reference == pytest.approx(80_000, rel=1e-2)


def test_a_sweep_finds_the_word_that_such_a_model_fails_for(tmp_path: Path) -> None:
    folder = bare(tmp_path / "bare", edit=starts_with_import)
    spec = PromptSpec(name="healthy", text="we import os")
    run = explained(folder, [spec], explain=False, sweep="first-token", dtypes=["fp16"])
    assert run.sweep is not None and run.sweep.over == 1 and run.sweep.worst[0].ids == ids_of("import")[:1]
