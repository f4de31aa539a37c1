"""Faults whose place is known by construction: each is named exactly in fp16, and absent in bf16 and fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Limits, Report
from qwen_precision.probe.watched import Section, WatchedRun
from support.checkpoints import DEMO, edit_json, make_checkpoint
from support.plants import (
    down_proj_output,
    expert_product,
    lm_head_output,
    o_proj_and_product,
    one_channel,
    one_unit,
    residual_add,
    swiglu_product,
)
from support.runs import errors, run_probe

pytestmark = [pytest.mark.arithmetic, pytest.mark.transformers]

TEXTS = ["The capital of France is Paris", "上海有个非常出名的地方，"]


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Any], None]
    layer: int | None
    module: str
    op: str
    name: str
    channel: int
    moe: bool = False
    expert: int | None = None


FAULTS = {
    "down_proj output": Fault(down_proj_output, 1, "model.layers.1.mlp.down_proj", "linear", "down_proj output", 9),
    "residual add": Fault(residual_add, 1, "model.layers.1", "add", "residual add after mlp", 9),
    "SwiGLU product": Fault(swiglu_product, 1, "model.layers.1.mlp", "mul", "SwiGLU product", 0),
    "lm_head output": Fault(lm_head_output, None, "lm_head", "linear", "logits", 77),
    "expert": Fault(
        expert_product, 1, "model.layers.1.mlp.experts", "mul", "SwiGLU product of the experts", 0, moe=True, expert=5
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            fault = FAULTS[name]
            made[name] = make_checkpoint(tmp_path_factory.mktemp("fault"), moe=fault.moe, edit=fault.plant)
        return made[name]

    return make


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_overflow_is_named_exactly_and_only_in_fp16(
    name: str, attention: str, memory: str, folders: Callable[[str], Path]
) -> None:
    fault = FAULTS[name]
    report = judge(run_probe(folders(name), TEXTS, attention=attention, memory=memory))
    (first,) = errors(report)
    # transformers 4 keeps each expert in a module of its own, so the path and the name say which it is.
    module = first.place.module.replace("experts.5", "experts")
    what = first.place.name.replace("of an expert", "of the experts")
    assert (first.place.layer, module, first.place.op, what) == (fault.layer, fault.module, fault.op, fault.name)
    assert first.kind == "overflow" and first.origin and first.magnitude.inf > 0 and first.magnitude.nan == 0
    assert (first.place.channel, first.place.expert) == (fault.channel, fault.expert)
    assert first.place.token is not None and isinstance(first.place.token.id, int)
    assert first.magnitude.reference is not None and first.magnitude.reference > 65504
    assert first.magnitude.headroom is not None and first.magnitude.headroom < 1
    assert report.verdict["fp16"] == "fail"
    for dtype in ("bf16", "fp32"):
        assert not errors(report, dtype) and report.verdict[dtype] == "ok"


def fp16_readings(run: Any) -> dict[tuple[str, str, int], float | None]:
    """Magnitudes of the first prompt in fp16 by (module, operation, call)."""
    (fp16,) = [each for each in run.passes if each.dtype == "fp16" and each.prompt == 0]
    return {(site.module, site.op, site.call): value for site, value in zip(run.sites, fp16.abs_max, strict=True)}


def test_a_residual_add_overflows_although_both_of_its_parts_are_finite(folders: Callable[[str], Path]) -> None:
    fp16 = fp16_readings(run_probe(folders("residual add"), TEXTS))
    assert fp16["model.layers.1", "add", 0] < 65504
    assert fp16["model.layers.1.mlp.down_proj", "linear", 0] < 65504
    assert fp16["model.layers.1", "add", 1] == float("inf")


def test_a_swiglu_product_overflows_although_both_of_its_factors_are_finite(folders: Callable[[str], Path]) -> None:
    fp16 = fp16_readings(run_probe(folders("SwiGLU product"), TEXTS))
    assert fp16["model.layers.1.mlp.act_fn", "silu", 0] < 1000
    assert fp16["model.layers.1.mlp.up_proj", "linear", 0] < 1000
    assert fp16["model.layers.1.mlp", "mul", 0] == float("inf")


def test_every_place_that_overflows_by_itself_is_found_not_only_the_first(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        for index in (0, 2):
            one_unit(model, index, 3, 400.0, 400.0)

    report = judge(run_probe(make_checkpoint(tmp_path, edit=plant), TEXTS))
    found = [(finding.place.layer, finding.place.name) for finding in errors(report)]
    assert found == [(0, "SwiGLU product"), (2, "SwiGLU product")]


def test_a_place_in_a_slice_of_the_logits_is_told_as_a_place_in_the_whole(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_precision.probe.run.SLICE_BYTES", 4 * 64 * 50)  # 50 vocabulary rows at a time
    monkeypatch.setattr("qwen_precision.probe.head.LOGITS_BYTES", 50 * 2 * 2)  # two tokens of fp16 logits at a time
    report = judge(run_probe(folders("lm_head output"), TEXTS, memory="streamed"))
    (first,) = errors(report)
    assert (first.place.name, first.place.channel) == ("logits", 77)
    assert first.place.token is not None and first.place.token.position == 0


def test_a_second_overflow_behind_the_first_in_the_same_layer_is_found(tmp_path: Path) -> None:
    report = judge(run_probe(make_checkpoint(tmp_path, edit=o_proj_and_product), TEXTS))
    found = [(finding.place.layer, finding.place.name, finding.predicted) for finding in errors(report)]
    assert found == [(1, "o_proj output", False), (1, "SwiGLU product", True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_row_of_a_batch_does_not_hide_what_overflows_in_another(attention: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    early, late = (tokenizer(text)["input_ids"][0] for text in "79")

    def plant(model: Any) -> None:
        embed = model.model.embed_tokens.weight
        embed[:, 3] = embed[:, 5] = 0.0
        embed[early, 3] = embed[late, 5] = 100.0
        block = model.model.layers[1]
        one_unit(model, 1, 5, 400.0, 400.0)  # "9": the SwiGLU product
        block.self_attn.v_proj.weight.zero_()
        block.self_attn.v_proj.weight[:, 3] = 10.0  # "7": o_proj, earlier in the same layer
        block.self_attn.o_proj.weight.zero_()
        block.self_attn.o_proj.weight[9, 0] = 2000.0

    folder = make_checkpoint(tmp_path, edit=plant)
    (tmp_path / "prompts.yaml").write_text('- {name: batch, batch: ["7", "9"]}\n')
    report = judge(run_probe(folder, file=str(tmp_path / "prompts.yaml"), attention=attention))
    found = [(f.place.name, f.place.token.id) for f in errors(report) if f.place.token is not None]
    assert found == [("o_proj output", early), ("SwiGLU product", late)]


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_an_expert_is_named_also_when_only_a_later_prompt_uses_it(experts: str, tmp_path: Path) -> None:
    token = AutoTokenizer.from_pretrained(DEMO)("7")["input_ids"][0]

    def plant(model: Any) -> None:
        expert_product(model)
        model.model.layers[1].mlp.gate.weight[6, 3] = 9.0  # the second choice, added to the sum after the first
        model.model.embed_tokens.weight[:, 3] = 0.0
        model.model.embed_tokens.weight[token, 3] = 100.0

    folder = make_checkpoint(tmp_path, moe=True, edit=plant)
    edit_json(folder / "config.json", experts_implementation=experts)
    (first,) = errors(judge(run_probe(folder, ["Hello there", "7"])))  # the sum only adds to what was bad
    assert first.place.op == "mul" and "experts" in first.place.module and first.spread.prompts == ("prompt 2",)


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("text", ["ab7c", "7", "a7", "7ab"])
def test_the_expert_and_the_token_are_named_however_transformers_runs_the_experts(
    experts: str, text: str, tmp_path: Path
) -> None:
    """Only one token is sent to the expert that overflows; the others have experts of their own."""
    token = AutoTokenizer.from_pretrained(DEMO)("7")["input_ids"][0]

    def plant(model: Any) -> None:
        expert_product(model)
        model.model.embed_tokens.weight[:, 3] = 0.0
        model.model.embed_tokens.weight[token, 3] = 100.0

    folder = make_checkpoint(tmp_path, moe=True, edit=plant)
    edit_json(folder / "config.json", experts_implementation=experts)
    (first,) = errors(judge(run_probe(folder, [text])))
    assert (first.place.expert, first.place.channel, first.place.token.position) == (5, 0, text.index("7"))
    assert first.place.name.startswith("SwiGLU product of ")


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("texts", [["ab"], ["a", "b"]], ids=["one prompt", "two prompts"])
def test_every_expert_that_overflows_is_a_place_however_transformers_runs_them(
    texts: list[str], experts: str, memory: str, tmp_path: Path
) -> None:
    """Both experts that every token is sent to."""

    def plant(model: Any) -> None:
        expert_product(model)
        mlp = model.model.layers[1].mlp
        mlp.gate.weight[6, 3] = 9.0
        if hasattr(mlp.experts, "gate_up_proj"):
            mlp.experts.gate_up_proj[6].copy_(mlp.experts.gate_up_proj[5])
        else:
            mlp.experts[6].load_state_dict(mlp.experts[5].state_dict())

    folder = make_checkpoint(tmp_path, moe=True, edit=plant)
    edit_json(folder / "config.json", experts_implementation=experts)
    found = errors(judge(run_probe(folder, texts, memory=memory)))
    assert [(each.place.expert, len(each.spread.prompts)) for each in found] == [(5, len(texts)), (6, len(texts))]
    assert all(each.place.name.startswith("SwiGLU product of ") and not each.predicted for each in found)


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_a_row_is_not_hidden_behind_another_of_the_same_expert(experts: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, moe=True, edit=expert_product)
    edit_json(folder / "config.json", experts_implementation=experts)
    (tmp_path / "prompts.yaml").write_text("- {name: batch, batch: [ab, cd]}\n")
    run = run_probe(folder, file=str(tmp_path / "prompts.yaml"), dtypes=["fp16"])
    (fp16,) = [each for each in run.passes if each.dtype == "fp16"]
    began = [(event.row, event.expert) for event in fp16.events if event.inf and event.clean_inputs]
    assert began == [(0, 5), (1, 5)] and len(errors(judge(run))) == 1


def test_a_bad_weight_of_an_expert_that_nobody_uses_hides_nothing(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        expert_product(model)
        experts = model.model.layers[1].mlp.experts
        weight = experts.gate_up_proj[2] if hasattr(experts, "gate_up_proj") else experts[2].gate_proj.weight
        weight[0, 0] = 70000.0
        gate = model.model.layers[1].mlp.gate.weight
        gate[2, 3] = -10.0

    report = judge(run_probe(make_checkpoint(tmp_path, moe=True, dtype="float32", edit=plant), ["a", "b"]))
    kinds = [(finding.kind, finding.place.op) for finding in errors(report)]
    assert kinds == [("weight-overflow", "weight"), ("overflow", "mul")]


def test_what_only_passes_an_overflow_on_is_counted_not_listed(folders: Callable[[str], Path]) -> None:
    report = judge(run_probe(folders("SwiGLU product"), TEXTS))
    (only,) = errors(report)
    assert only.spread.propagated >= 2  # down_proj and the residual add of the same layer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_overflow_at_one_token_is_placed_at_that_token(attention: str, tmp_path: Path) -> None:
    token = AutoTokenizer.from_pretrained(DEMO)("7")["input_ids"][0]

    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[:, 3] = 0.0
        model.model.embed_tokens.weight[token, 3] = 100.0
        mlp = model.model.layers[1].mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.zero_()
            part.weight[0, 3] = 50.0
        mlp.down_proj.weight.mul_(0)

    folder = make_checkpoint(tmp_path, edit=plant)
    (tmp_path / "prompts.yaml").write_text('- {name: batch, batch: ["The capital of France is", "a7b"]}\n')
    report = judge(run_probe(folder, file=str(tmp_path / "prompts.yaml"), attention=attention))
    (first,) = errors(report)
    assert first.place.name == "SwiGLU product" and first.place.token is not None
    assert (first.place.token.id, first.place.token.text, first.place.token.row) == (token, "7", 1)
    assert not first.place.token.padding


def _save_then(plant: Callable[[Any], None], tmp_path: Path, dtype: str = "float32") -> Report:
    return judge(run_probe(make_checkpoint(tmp_path / "model", dtype=dtype, edit=plant), TEXTS))


def test_a_weight_that_fp16_cannot_hold_is_found_without_blaming_an_operation(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        model.model.layers[0].self_attn.v_proj.weight[2, 3] = 70000.0
        model.model.embed_tokens.weight[:, 3] = 1e-3

    report = _save_then(plant, tmp_path)
    (first,) = errors(report)
    assert (first.kind, first.place.module, first.place.layer) == (
        "weight-overflow",
        "model.layers.0.self_attn.v_proj",
        0,
    )
    assert first.place.name == "v_proj weight" and first.magnitude.inf == 1 and first.spread.propagated > 0
    assert report.verdict["bf16"] == report.verdict["fp32"] == "ok"


def test_a_nan_weight_is_damage_in_every_dtype_and_names_the_tensor_and_file(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        model.model.layers[2].mlp.up_proj.weight[1, 1] = float("nan")

    report = _save_then(plant, tmp_path, "bfloat16")
    for dtype in ("fp16", "bf16", "fp32"):
        (first,) = errors(report, dtype)
        assert (first.kind, first.place.module, first.magnitude.nan) == (
            "weight-nonfinite",
            "model.layers.2.mlp.up_proj",
            1,
        )
        assert "model.safetensors" in first.cause.sentence and report.verdict[dtype] == "fail"


def test_near_overflow_is_a_risk_and_its_limit_is_a_setting(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        one_unit(model, 1, 3, 250.0, 250.0)  # 62,500: headroom just above 1

    folder = make_checkpoint(tmp_path / "model", edit=plant)
    report = judge(run_probe(folder, TEXTS))
    (first,) = [finding for finding in report.findings if finding.dtype == "fp16"]
    assert (first.kind, first.place.layer, first.place.name) == ("near-overflow", 1, "SwiGLU product")
    assert report.verdict == {"fp16": "risk", "bf16": "ok", "fp32": "ok"}
    assert report.exit_code("fail") == 0 and report.exit_code("risk") == 1
    assert first.place.token is not None and first.place.channel == 0

    assert judge(report.run, Limits(near_overflow=1.0)).verdict["fp16"] == "ok"


def test_headroom_is_read_off_the_reference_at_every_operation() -> None:
    run = run_probe("demo")
    report = judge(run)
    tightest = report.headroom["fp16"][0]
    site = run.sites[tightest.site]
    assert site.layer == 3 and tightest.headroom == pytest.approx(65504 / tightest.abs_max)
    assert all(row.abs_max > 0 or row.headroom == float("inf") for row in report.headroom["fp16"])
    # Norms compute in fp32 inside: their squares are beyond 65504 and that is no finding.
    squares = [index for index, s in enumerate(run.sites) if s.op == "pow" and s.layer == 2]
    assert squares and all(run.wider["fp16"][index] == "fp32" for index in squares)


def test_a_second_look_that_differs_from_the_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=down_proj_output)
    assert "second look" not in [each.what for each in run_probe(folder, TEXTS).choices]
    again = WatchedRun._again

    def otherwise(self: WatchedRun, section: Section, onlooker: Any) -> Any:
        if section.key[0] == "fp16" and hasattr(section.module, "mlp"):
            section.module.mlp.up_proj.weight.data *= 0.75
        return again(self, section, onlooker)

    monkeypatch.setattr(WatchedRun, "_again", otherwise)
    (told,) = [each.reason for each in run_probe(folder, TEXTS).choices if each.what == "second look"]
    assert told.startswith("fp16 gave other numbers")
