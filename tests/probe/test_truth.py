"""As many findings as places that would have to change: consequences, harmless overflow, clamped streams, limits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.diagnose.run import diagnose
from qwen_precision.dtypes import DTYPES
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding, Report
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import PromptSpec, read_prompts
from support.checkpoints import RATIO, make_checkpoint
from support.plants import (
    SIZE,
    empty,
    expert_output_too_large,
    gate_too_large,
    ids_of,
    low_score,
    mark,
    one_channel,
    one_unit,
    product_and_sum,
    query_norm_too_large,
    two_tokens,
    two_units,
    unit,
)
from support.runs import run_probe

pytestmark = pytest.mark.arithmetic

Plant = Callable[[Any], None]
WAYS = pytest.mark.parametrize(("attention", "memory"), [("sdpa", "resident"), ("eager", "streamed")])
SHAPES: dict[str, dict[str, Any]] = {"dense": {}, "another head ratio": RATIO, "moe": {"moe": True}}


def places(report: Report, dtype: str = "fp16") -> list[tuple[int | None, str, bool]]:
    found = [each for each in report.findings if each.dtype == dtype and each.severity == "error"]
    return [(each.place.layer, each.place.name, each.predicted) for each in found]


def probed(folder: Path, texts: list[str], attention: str = "sdpa", memory: str = "resident", **more: Any) -> Report:
    return judge(run_probe(folder, texts, attention=attention, memory=memory, **more))


# -- what only carries a number on ---------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(
    ("plant", "name", "shape"),
    [
        (gate_too_large, "gate_proj output", "dense"),
        (gate_too_large, "gate_proj output", "another head ratio"),
        (query_norm_too_large, "q_norm output", "dense"),
        (query_norm_too_large, "q_norm output", "another head ratio"),
        (query_norm_too_large, "q_norm output", "moe"),
        (expert_output_too_large, "down projection of the experts", "moe"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_carries_a_number_on_counts_with_the_place_where_it_became_too_large(
    plant: Plant, name: str, shape: str, attention: str, memory: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, edit=plant, **SHAPES[shape])
    report = probed(folder, ["The capital of France"], attention, memory)
    ((layer, what, foreseen),) = places(report)
    one_by_one = what.replace("down_proj output", "down projection of the experts") if shape == "moe" else what
    assert (layer, one_by_one, foreseen) == (1, name, False) and report.verdict["bf16"] == "ok"


@WAYS
def test_two_tokens_that_fail_at_two_operations_of_one_layer_are_two_findings(
    attention: str, memory: str, tmp_path: Path
) -> None:
    report = probed(make_checkpoint(tmp_path, edit=two_tokens), ["abYcZd"], attention, memory)
    assert places(report) == [(1, "SwiGLU product", False), (1, "down_proj output", False)]
    assert [each.place.token.text for each in report.findings if each.place.token] == ["Y", "Z"]


def test_rows_of_all_findings_are_run_again_for_one_forward_of_the_budget(tmp_path: Path) -> None:
    settings = load_settings(None, {"budget": 1, "dtypes": ["fp16"]})
    specs = [PromptSpec(name="one", text="aY"), PromptSpec(name="two", text="aZ"), PromptSpec(name="no", text="a")]
    made = diagnose(str(make_checkpoint(tmp_path, edit=two_tokens)), settings, specs).run.explanation
    assert made is not None
    assert [(each.what, each.prompt, each.clean) for each in made.controls] == [
        ("same again", "one", False),
        ("same again", "two", False),
    ]


def two_tokens_of_one_product(size_y: float, size_z: float) -> Plant:
    """ "Y" and "Z" both overflow in the SwiGLU product, at a unit of their own each."""

    def plant(model: Any) -> None:
        gate, up, _ = two_units(model, 100.0)
        gate[0, 5] = up[0, 5] = size_y
        gate[1, 6] = up[1, 6] = size_z

    return plant


@WAYS
@pytest.mark.parametrize(("sizes", "text"), [((80.0, 160.0), "Z"), ((160.0, 80.0), "Y")])
def test_of_two_tokens_that_fail_at_one_operation_the_larger_is_named_with_its_own_magnitude(
    sizes: tuple[float, float], text: str, attention: str, memory: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, edit=two_tokens_of_one_product(*sizes))
    report = probed(folder, ["abYcZd"], attention, memory)
    assert places(report) == [(1, "SwiGLU product", False)]
    finding = next(each for each in report.findings if each.dtype == "fp16" and each.severity == "error")
    assert finding.place.token is not None and finding.place.token.text == text
    assert finding.place.channel == (1 if text == "Z" else 0)
    alone = probed(folder, [f"ab{text}"], attention, memory)
    wanted = next(each for each in alone.findings if each.dtype == "fp16" and each.severity == "error")
    assert finding.magnitude.reference == pytest.approx(wanted.magnitude.reference, rel=1e-3)


@WAYS
def test_a_sum_that_overflows_at_one_token_is_found_beside_another_that_was_bad_before(
    attention: str, memory: str, tmp_path: Path
) -> None:
    report = probed(make_checkpoint(tmp_path, edit=product_and_sum), ["abYcZd"], attention, memory)
    assert places(report) == [(1, "down_proj output", False), (1, "residual add after mlp", False)]
    failing = [each.place.token for each in report.findings if each.severity == "error"]
    assert [token.text for token in failing if token is not None] == ["Y", "Z"]


# -- rows of a batch -----------------------------------------------------------------------------------------------


@WAYS
def test_rows_that_fail_at_one_operation_for_two_reasons_are_two_findings(
    attention: str, memory: str, tmp_path: Path
) -> None:
    """One row is padded with a token that overflows, clean alone; another has a token that overflows by itself."""
    (tmp_path / "prompts.yaml").write_text(
        '- {name: batch, batch: ["abcdefgh", "ab", "aZ"]}\n- {name: one, text: abc}\n'
    )
    folder = make_checkpoint(tmp_path / "model", edit=pad_and_token)
    settings = load_settings(None, {"attention": attention, "memory": memory, "budget": 30})
    report = diagnose(str(folder), settings, read_prompts([], str(tmp_path / "prompts.yaml")))
    found = [each for each in report.findings if each.severity == "error" and each.dtype == "fp16"]
    assert {(each.place.layer, each.place.name) for each in found} == {(1, "SwiGLU product")}
    assert {each.cause.kind: each.place.token.row for each in found if each.place.token is not None} == {
        "masked-rows": 1,
        "trigger-token": 2,
    }


def pad_and_token(model: Any) -> None:
    """The pad token and "Z" are each too large for the SwiGLU product of layer 1."""
    embed = model.model.embed_tokens.weight
    embed.zero_()
    embed[:, 0] = 100.0
    for text in ("<|endoftext|>", "Z"):
        embed[ids_of(text)[0], 5] = 100.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.zero_()
    block.post_attention_layernorm.weight[5] = 1.0
    block.mlp.gate_proj.weight.zero_()
    block.mlp.up_proj.weight.zero_()
    block.mlp.gate_proj.weight[0, 5] = block.mlp.up_proj.weight[0, 5] = 80.0


def padding_then_token(model: Any) -> None:
    """The pad token is too large for layer 1, "Z" only for layer 2, each in a unit of its own."""
    pad_and_token(model)
    embed, (one, two) = model.model.embed_tokens.weight, model.model.layers[1:3]
    embed[ids_of("Z")[0], 5], embed[ids_of("Z")[0], 6] = 0.0, 100.0
    two.post_attention_layernorm.weight.copy_(one.post_attention_layernorm.weight)
    two.post_attention_layernorm.weight[6] = 1.0
    for name in ("gate_proj", "up_proj"):
        weight = getattr(two.mlp, name).weight
        weight.zero_()
        weight[1, 6] = 80.0


@WAYS
def test_a_row_whose_padding_failed_before_is_asked_about_its_own_token_too(
    attention: str, memory: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.yaml").write_text('- {name: batch, batch: ["abcdefgh", "aZ"]}\n')
    folder = make_checkpoint(tmp_path / "model", edit=padding_then_token, num_hidden_layers=4)
    settings = load_settings(None, {"attention": attention, "memory": memory, "budget": 30})
    report = diagnose(str(folder), settings, read_prompts([], str(tmp_path / "prompts.yaml")))
    found = [each for each in report.findings if each.severity == "error" and each.dtype == "fp16"]
    assert [(each.place.layer, each.cause.kind) for each in found] == [(1, "masked-rows"), (2, "trigger-token")]
    assert "fails in a later layer only" in " ".join(found[0].cause.evidence)


@pytest.mark.parametrize(("layer", "verdict"), [(1, "fail"), (2, "risk")])
def test_padding_that_overflows_does_harm_only_where_a_layer_follows(layer: int, verdict: str, tmp_path: Path) -> None:
    """In the last layer nothing reads the pad positions any more: what real tokens give is finite."""

    def plant(model: Any) -> None:
        pad_and_token(model)
        blocks = model.model.layers
        if layer != 1:
            for name in ("gate_proj", "up_proj"):
                source, target = getattr(blocks[1].mlp, name).weight, getattr(blocks[layer].mlp, name).weight
                target.copy_(source)
                source.zero_()
            blocks[layer].post_attention_layernorm.weight.copy_(blocks[1].post_attention_layernorm.weight)

    (tmp_path / "prompts.yaml").write_text('- {name: batch, batch: ["abcdefgh", "ab"]}\n')
    folder = make_checkpoint(tmp_path / "model", edit=plant)
    report = judge(run_probe(folder, file=str(tmp_path / "prompts.yaml")))
    assert report.verdict["fp16"] == verdict
    (finding,) = [each for each in warned(report) if each.kind in ("overflow", "nan")]
    assert (finding.place.layer, finding.place.name) == (layer, "SwiGLU product")


# -- behind a failure ----------------------------------------------------------------------------------------------


def two_layers(second: float) -> Plant:
    """down_proj of layer 0 gives 128,000, and that of layer 2 gives ``second`` in another channel."""

    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        one_unit(model, 0, 3, 8.0, 8.0)
        model.model.layers[0].mlp.down_proj.weight[9, 0] = 2000.0
        one_unit(model, 2, 9, 8.0, 8.0)
        model.model.layers[2].mlp.down_proj.weight[11, 0] = second / 63.9785
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()

    return plant


@WAYS
@pytest.mark.parametrize("shape", [{}, RATIO, {"moe": True, "mlp_only_layers": [0, 2]}], ids=SHAPES)
@pytest.mark.parametrize(("second", "more"), [(6e4, []), (65_510.0, []), (66_500.0, [(2, "down_proj output", True)])])
def test_behind_a_failure_a_place_is_foreseen_only_where_rounding_would_take_it_out(
    second: float, more: list[Any], shape: dict[str, Any], attention: str, memory: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, edit=two_layers(second), dtype="float32", **shape)
    report = probed(folder, ["The capital"], attention, memory)
    assert places(report) == [(0, "down_proj output", False), *more]


def two_faults(padding: float) -> Plant:
    """ "Y" takes layer 0's down_proj out; "Z", and padding, the SwiGLU product of the last layer."""

    def plant(model: Any) -> None:
        empty(model)
        mark(model, "Y", 5)
        mark(model, "Z", 6)
        mark(model, "<|endoftext|>", 6, padding)
        unit(model, 0, 0, 5, 8.0, 3000.0)
        unit(model, 2, 1, 6, 80.0)

    return plant


BEGINS = (0, "down_proj output", False)


@WAYS
def test_behind_a_failure_a_real_token_is_named_before_larger_padding(
    attention: str, memory: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.yaml").write_text("- {name: batch, batch: [abYcZd, YaZ]}\n")
    folder = make_checkpoint(tmp_path / "model", edit=two_faults(200.0), dtype="float32")
    report = judge(run_probe(folder, file=str(tmp_path / "prompts.yaml"), attention=attention, memory=memory))
    assert places(report) == [BEGINS, (2, "SwiGLU product", True)]
    token = report.findings[1].place.token
    assert token is not None and token.text == "Z" and not token.padding


def test_padding_that_nothing_reads_is_not_foreseen(tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("- {name: batch, batch: [abYcd, Ya]}\n")
    folder = make_checkpoint(tmp_path / "model", edit=two_faults(200.0), dtype="float32")
    assert places(judge(run_probe(folder, file=str(tmp_path / "prompts.yaml")))) == [BEGINS]


def test_a_finding_counts_the_prompts_that_would_fail_there_behind_another_failure(tmp_path: Path) -> None:
    report = probed(make_checkpoint(tmp_path, edit=two_faults(0.0), dtype="float32"), ["YaZ", "aZ", "ab"])
    assert places(report) == [BEGINS, (2, "SwiGLU product", False)]
    assert [len(each.spread.prompts) for each in report.findings[:2]] == [1, 2]


def test_what_a_clamped_stream_does_is_no_evidence(tmp_path: Path) -> None:
    """Clamped from 128,000 to 65,504, the large channel divides the others by half as much: their product is four
    times what it is in fp32, and beyond the range, where fp32 has 2.5 times headroom."""

    def plant(model: Any) -> None:
        two_layers(0.0)(model)
        model.model.layers[0].mlp.down_proj.weight[20, 0] = 1000.0 / 64
        block = model.model.layers[2]
        block.post_attention_layernorm.weight.zero_()
        block.post_attention_layernorm.weight[20] = 1.0
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.weight.zero_()
            part.weight[0, 20] = 160.0 / (SIZE * 1000.0 / 128_000.0)

    report = probed(make_checkpoint(tmp_path, edit=plant), ["The capital"])
    assert places(report) == [(0, "down_proj output", False)]
    assert any(seed.clamped for each in report.run.passes for seed in each.reseeded)


# -- harmless ------------------------------------------------------------------------------------------------------


def warned(report: Report) -> list[Finding]:
    return [each for each in report.findings if each.dtype == "fp16"]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("shape", ["dense", "another head ratio", "moe"])
def test_a_score_that_overflows_where_softmax_gives_nothing_is_a_risk_and_no_failure(
    shape: str, memory: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, edit=low_score(70_000.0), **SHAPES[shape])
    report = probed(folder, ["abZcd"], "eager", memory)
    (finding,) = [each for each in warned(report) if each.kind == "overflow"]
    assert (finding.severity, finding.cause.kind, finding.place.name) == (
        "warning",
        "harmless-overflow",
        "attention scores",
    )
    assert "does harm where" in finding.cause.advice
    assert finding.place.token is not None and finding.place.key is not None and finding.place.key.text == "Z"
    assert report.verdict["fp16"] == "risk" and report.exit_code("fail") == 0 and report.exit_code("risk") == 1


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_score_does_harm_where_a_token_has_no_other_key(shape: str, memory: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=low_score(70_000.0), **SHAPES[shape])
    report = probed(folder, ["Zabcd"], "eager", memory)
    assert report.verdict["fp16"] == "fail"
    assert places(report)[0] == (1, "attention scores", False)


@WAYS
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("part", ["down_proj", "o_proj", "v_proj"])
def test_minus_infinity_that_no_softmax_reads_is_a_failure_whatever_becomes_of_it(
    part: str, layer: int, attention: str, memory: str, tmp_path: Path
) -> None:
    """The lowest finite number in its place overflows again in the residual add: the same bits, and no less wrong."""

    def plant(model: Any) -> None:
        empty(model)
        model.model.embed_tokens.weight[:, 9] = -100.0
        own = model.model.layers[layer].self_attn
        if part == "down_proj":
            unit(model, layer, 0, 0, 8.0, -3000.0)
        else:
            own.v_proj.weight.zero_()
            own.v_proj.weight[0, 0], own.o_proj.weight[9, 0] = (8.0, -3000.0) if part == "o_proj" else (-20_000.0, 1.5)

    report = probed(make_checkpoint(tmp_path, edit=plant), ["abcd"], attention, memory)
    assert places(report)[0] == (layer, f"{part} output", False) and report.verdict["fp16"] == "fail"


def test_a_score_beyond_the_range_upwards_is_a_failure(tmp_path: Path) -> None:
    report = probed(make_checkpoint(tmp_path, edit=low_score(-70_000.0)), ["abZcd"], "eager")
    assert places(report)[0] == (1, "attention scores", False)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "attention"), [(30_000.0, "eager"), (70_000.0, "sdpa")])
def test_a_low_score_inside_the_range_or_kept_in_fp32_is_nothing(
    size: float, attention: str, shape: str, memory: str, tmp_path: Path
) -> None:
    report = probed(make_checkpoint(tmp_path, edit=low_score(size), **SHAPES[shape]), ["abZcd"], attention, memory)
    assert warned(report) == []


def test_a_harmful_score_is_named_although_the_layer_fails_behind_it_as_well(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        low_score(70_000.0)(model)
        one_unit(model, 1, 3, 400.0, 400.0)
        one_channel(model, 3, 100.0)

    (first, *_) = places(probed(make_checkpoint(tmp_path, edit=plant, dtype="float32"), ["Z"], "eager"))
    assert first == (1, "attention scores", False)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_harmless_score_stays_so_where_its_layer_fails_behind_it(memory: str, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        low_score(70_000.0)(model)
        one_unit(model, 1, 4, 400.0, 400.0)
        one_channel(model, 4, 100.0)

    report = probed(make_checkpoint(tmp_path, edit=plant, dtype="float32"), ["abZcd"], "eager", memory)
    assert places(report) == [(1, "SwiGLU product", False)]
    assert "attention scores" in [each.place.name for each in warned(report) if each.severity == "warning"]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_whether_a_score_does_harm_is_told_of_each_row_of_a_batch(memory: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("- {name: batch, batch: [abZcd, Zabcd]}\n")
    folder = make_checkpoint(tmp_path / "model", edit=low_score(70_000.0))
    run = run_probe(folder, file=str(tmp_path / "prompts.yaml"), attention="eager", memory=memory, dtypes=["fp16"])
    (fp16,) = [each for each in run.passes if each.dtype == "fp16"]
    first = min(event.site for event in fp16.events if event.inf)
    assert [(event.row, event.harmless) for event in fp16.events if event.site == first] == [(0, True), (1, False)]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_router_logit_that_overflows_for_an_expert_nobody_takes_is_a_risk(memory: str, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        block = model.model.layers[1]
        block.post_attention_layernorm.weight[3] = 100.0
        block.mlp.gate.weight[6, 3] = -200.0

    report = probed(make_checkpoint(tmp_path, edit=plant, moe=True), ["The capital"], memory=memory)
    found = [each for each in warned(report) if each.kind == "overflow"]
    assert [(each.severity, each.place.name) for each in found] == [("warning", "router logits")]
    assert report.verdict["fp16"] == "risk"


@pytest.mark.parametrize(("cap", "verdict"), [(30.0, "risk"), (None, "fail")])
def test_a_logit_that_overflows_before_it_is_capped_is_a_risk(cap: float | None, verdict: str, tmp_path: Path) -> None:
    """No softmax reads it: what counts is that the whole model answers with the same bits."""

    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[:, 3] = 1000.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[77, 3] = 20_000.0

    shape = {"family": "gemma2", "final_logit_softcapping": cap, "query_pre_attn_scalar": 16}
    report = probed(make_checkpoint(tmp_path, edit=plant, **shape), ["abcd"], "eager")
    assert [each.place.name for each in warned(report) if each.kind == "overflow"] == ["logits"]
    assert report.verdict["fp16"] == verdict


# -- a damaged embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_damaged_embedding_row_names_its_token_and_the_prompts_that_fail_by_it(memory: str, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[ids_of("Z")[0], 7] = float("nan")

    report = probed(make_checkpoint(tmp_path, edit=plant), ["abcd", "abZc"], memory=memory)
    (finding,) = warned(report)
    assert (finding.kind, finding.place.name) == ("weight-nonfinite", "embed_tokens weight")
    assert finding.place.token is not None and (finding.place.token.text, finding.place.token.position) == ("Z", 2)
    assert finding.spread.prompts == ("prompt 2",) and finding.place.channel == 7


def test_a_damaged_row_of_tied_embeddings_spoils_the_logits_of_every_prompt(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[ids_of("Z")[0], 7] = float("nan")

    report = probed(make_checkpoint(tmp_path, edit=plant, tied=True), ["abcd", "efg"])
    (finding,) = [each for each in report.findings if each.dtype == "fp16"]
    assert finding.cause.kind == "damaged-weight" and len(finding.spread.prompts) == 2


@WAYS
def test_a_bad_weight_does_not_hide_what_another_channel_makes(attention: str, memory: str, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        empty(model)
        unit(model, 1, 0, 0, 8.0, 3000.0)
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 70_000.0

    report = probed(make_checkpoint(tmp_path, edit=plant, dtype="float32"), ["abcd"], attention, memory)
    assert sorted(each.place.name for each in report.findings if each.dtype == "fp16") == [
        "down_proj output",
        "down_proj weight",
    ]


def test_a_damaged_embedding_row_that_no_prompt_uses_names_none(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[ids_of("Z")[0], 7] = float("nan")

    (finding,) = warned(probed(make_checkpoint(tmp_path, edit=plant), ["abcd"]))
    assert finding.place.token is None and finding.spread.prompts == ()


# -- the very limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_overflow_begins_where_rounding_to_nearest_reaches_infinity(name: str) -> None:
    row = DTYPES[name]
    dtype, edge = getattr(torch, row.torch_name), torch.tensor(row.overflows_from, dtype=torch.float64)
    edge = edge if row.bytes == 4 else edge.float()  # torch casts a double to 16 bits by way of fp32
    below = torch.nextafter(edge, torch.zeros_like(edge))
    assert torch.isinf(edge.to(dtype)) and below.to(dtype) == row.max
