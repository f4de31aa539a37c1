"""Qwen2, Llama and Mistral are rescued as Qwen3 is, though nothing norms their q and k; other families say why not."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from qwen_precision.judge.checks import judge
from qwen_precision.qwen3.rescaling import ONE_PLUS
from qwen_precision.render.words import rescue as words
from qwen_precision.settings.guards import load_guards
from support.checkpoints import make_checkpoint
from support.families import make_family, tiny_config
from support.generations import run as generated
from support.plants import one_channel, residual_add, swiglu_product
from support.rescues import IDS, LLAMA, TEXTS, export, logits, planned, rescue
from support.runs import run_probe

pytestmark = pytest.mark.transformers

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tied": True},
    "llama": LLAMA,
    "mistral": {"sliding_window": 4, "num_key_value_heads": 1},
}


def loud_stream(model: Any) -> None:
    """The stream's sum in layer 1 is beyond fp16; a tied lm_head does not look at the channel."""
    residual_add(model)
    if model.config.tie_word_embeddings:
        model.model.norm.weight[9] = 0.0
        model.model.norm.weight *= 256.0


def loud_value(model: Any) -> None:
    """v_proj's output is beyond fp16; o_proj takes it back."""
    one_channel(model, 3, 100.0)
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[0, 3] = 20_000.0
    attention.o_proj.weight *= 1e-4


def pair(model: Any) -> tuple[Any, Any]:
    """q and k of layer 1, which meet everywhere but in channels 5 and 13 of a head, a pair that rotary turns."""
    one_channel(model, 3, 100.0)
    attention = model.model.layers[1].self_attn
    for part in (attention.q_proj, attention.k_proj):
        for each in (part.weight, *([part.bias] if part.bias is not None else [])):
            each[5::8] = 0.0
    return attention.q_proj, attention.k_proj


def loud_query(model: Any) -> None:
    """q is beyond fp16 where k is 0."""
    q, _ = pair(model)
    q.weight[5, 3] = 20_000.0


def loud_key(model: Any) -> None:
    """The same the other way round, by weight and bias together where there is one, as Qwen2.5 has them."""
    _, k = pair(model)
    k.weight[5, 3] = 20_000.0
    if k.bias is not None:
        k.bias[5] = 60_000.0


PLANTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "stream": (loud_stream, "residual add after mlp"),
    "SwiGLU product": (swiglu_product, "SwiGLU product"),
    "value": (loud_value, "v_proj output"),
    "query": (loud_query, "q_proj output"),
    "key": (loud_key, "k_proj output"),
}


def make(folder: Path, family: str, edit: Callable[[Any], None], **more: Any) -> Path:
    return make_checkpoint(folder, family=family, edit=edit, **{**copy.deepcopy(FAMILIES[family]), **more})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plant", PLANTS)
def test_an_overflow_that_a_factor_reaches_fails_before_and_is_safe_after(
    plant: str, family: str, attention: str, tmp_path: Path
) -> None:
    edit, name = PLANTS[plant]
    source = make(tmp_path / "source", family, edit)
    before = judge(run_probe(source, TEXTS, attention=attention))
    first = before.findings[0]
    assert before.verdict["fp16"] == "fail" and (first.place.layer, first.place.name) == (1, name)
    run = rescue(source, tmp_path / "safe", [*TEXTS, "a"], attention=attention)
    exported = run.rescue.exported
    assert run.rescue.possible and not run.rescue.rescaling.qk_norm
    assert exported.identical and exported.verified and exported.kept, exported.why
    after = judge(run_probe(tmp_path / "safe", TEXTS, attention=attention))
    assert after.verdict["fp16"] == "ok" and after.headroom["fp16"][0].headroom >= 4.0 * 0.99
    ours, reference = (
        logits(folder, dtype, attention=attention)
        for folder, dtype in ((tmp_path / "safe", torch.float16), (source, torch.float32))
    )
    assert (ours - reference).norm() <= 0.01 * reference.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rescue_in_another_format_than_fp16_keeps_every_bit(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family, loud_stream)
    rescue(source, tmp_path / "safe", dtype="bf16", keep=True)
    assert torch.equal(logits(tmp_path / "safe", torch.float32), logits(source, torch.float32))


def test_an_embedding_model_of_another_family_is_rescued_by_its_final_hidden_states(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", "qwen2", residual_add, dtype="float32")
    source = tmp_path / "bare"
    shutil.copytree(whole, source)
    AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(source)
    run = rescue(source, tmp_path / "safe", dtype="source")
    exported = run.rescue.exported
    assert exported.identical and exported.verified and run.rescue.rescaling.stream > 0, exported.why
    with torch.inference_mode():
        ours, wanted = (AutoModel.from_pretrained(each)(IDS).last_hidden_state for each in (tmp_path / "safe", source))
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_recovers_in_fp16_itself(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family, loud_stream)
    run = generated(source, guards=load_guards("default", "rescale"), max_new_tokens=4)
    assert run.dtypes == ["fp16"] and run.rescue.rescaling.stream > 0
    assert [each.rescaled for each in run.generation.rows[0].stretches] == [True]


def heavy_bias(name: str) -> Callable[[Any], None]:
    """A bias that fp16 cannot hold; what is added to it is its opposite, so that the output is small."""

    def plant(model: Any) -> None:
        pair(model)
        block = model.model.layers[1]
        if name == "self_attn.o_proj":
            steady(block.self_attn.v_proj, 8.0)
        if name == "mlp.down_proj":
            steady(block.mlp.gate_proj, 8.0)
            steady(block.mlp.up_proj, 1.0)
        part = block.get_submodule(name)
        part.bias[5], part.weight[5] = 100_000.0, 0.0
        part.weight[5, 0 if name in ("self_attn.o_proj", "mlp.down_proj") else 3] = -100_000.0 / 8

    return plant


def steady(part: Any, size: float) -> None:
    """The first channel of an output is always the same."""
    part.weight[0], part.bias[0] = 0.0, size


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("qwen2", f"self_attn.{each}_proj") for each in "qkv"),
        *(("llama", f"self_attn.{each}_proj") for each in "qkvo"),
        *(("llama", f"mlp.{each}_proj") for each in ("up", "down")),
    ],
)
def test_a_bias_that_fp16_cannot_hold_goes_with_its_output(family: str, name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", family, heavy_bias(name), tied=False)
    first = judge(run_probe(source, TEXTS)).findings[0]
    assert (first.kind, first.place.name) == ("weight-overflow", f"{name.rpartition('.')[2]} bias")
    plan = planned(source).rescue
    assert plan.possible and not plan.rescaling.changes_nothing
    made = export(source, tmp_path / "made", plan.rescaling)
    assert torch.equal(logits(made, torch.float32), logits(source, torch.float32))
    assert judge(run_probe(made, TEXTS)).verdict["fp16"] != "fail"


def test_a_bias_of_the_gate_is_stuck(tmp_path: Path) -> None:
    plan = planned(make(tmp_path / "source", "llama", heavy_bias("mlp.gate_proj"))).rescue
    assert any(each.name == "gate_proj bias" and "no exact factor moves it" in each.why for each in plan.stuck)


def two_loud(model: Any) -> None:
    """q and k are both beyond fp16, each where the other is 0."""
    q, k = pair(model)
    q.weight[5, 3] = k.weight[13, 3] = 20_000.0


@pytest.mark.parametrize("family", FAMILIES)
def test_where_q_and_k_are_both_too_large_neither_can_give_to_the_other(family: str, tmp_path: Path) -> None:
    run = rescue(make(tmp_path / "source", family, two_loud), tmp_path / "safe")
    assert not run.rescue.possible and run.rescue.exported is None
    assert {"q_proj output", "k_proj output"} <= {each.name for each in run.rescue.stuck}
    assert all("what q gives away k has to take" in each.why for each in run.rescue.stuck if each.fails)
    assert run.rescue.fp32_modules == ["model.layers.1.self_attn"]


def loud_scores(model: Any) -> None:
    """q and k are inside fp16, and their product is not."""
    one_channel(model, 3, 100.0)
    attention = model.model.layers[1].self_attn
    for part in (attention.q_proj, attention.k_proj):
        part.weight.zero_()
        part.weight[7::16, 3] = 1000.0 / 8  # the last of the channels that rotary turns least


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_that_overflow_are_stuck_and_named(family: str, tmp_path: Path) -> None:
    """Whatever factor q takes, k gives back: the product is the softmax's input and stays as it is."""
    run = rescue(make(tmp_path / "source", family, loud_scores), tmp_path / "safe", attention="eager")
    stuck = next(each for each in run.rescue.stuck if each.fails)
    assert (stuck.layer, stuck.name) == (1, "attention scores") and "softmax" in stuck.why
    assert run.rescue.exported is None and "model.layers.1.self_attn" in words.headline(run.rescue)


def test_the_factors_are_told_without_q_and_k_where_they_take_none(tmp_path: Path) -> None:
    lines = list(words.factors(planned(make(tmp_path / "source", "llama", loud_stream)).rescue))
    assert "embed_tokens, o_proj, down_proj; rms_norm_eps" in lines[0]
    lines = list(words.factors(planned(make(tmp_path / "query", "llama", loud_query)).rescue))
    assert any(line.startswith("q_proj x 2^-") and line.endswith("layer 1: k_proj makes up for it") for line in lines)


# -- families that are not rescaled ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in ONE_PLUS if name in CONFIG_MAPPING])
def test_the_norms_of_these_families_are_one_plus_their_weight(family: str) -> None:
    """With a weight of zero such a norm passes on what it gets; any other would give nothing."""
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(getattr(config, "text_config", config))
    norms = [part for name, part in model.named_modules() if name.endswith((".norm", "_norm", "layernorm"))]
    for norm in (each for each in norms if "Gated" not in type(each).__name__):
        with torch.no_grad():
            norm.weight.zero_()
            assert norm(torch.ones(1, 1, norm.weight.shape[0])).abs().max() > 0.5
    assert len(norms) > 3


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3_text", "multiply by 1 + weight, which cannot take a power of two exactly"),
        ("phi3", "only Qwen2, Qwen3, Qwen3-MoE, Llama and Mistral can be rescaled exactly, this is 'phi3'"),
    ],
)
def test_another_family_says_why_not_and_what_would_have_to_stay_in_fp32(family: str, why: str, tmp_path: Path) -> None:
    made = make_family(tmp_path / "model", family, plant=True)
    run = planned(made.folder)
    told = words.headline(run.rescue)
    assert why in told and run.rescue.rescaling.changes_nothing and not run.rescue.possible
    assert any(str(made.planted).startswith(module) for module in run.rescue.fp32_modules), run.rescue.fp32_modules
    assert "; this would have to stay in fp32: " in told and told.count(". ") == 0
    assert rescue(made.folder, tmp_path / "safe").rescue.exported is None and not (tmp_path / "safe").exists()


def test_layers_that_would_have_to_stay_in_fp32_are_told_as_a_range(tmp_path: Path) -> None:
    """From where the stream is beyond fp16 on, every layer passes it on."""
    run = planned(make_family(tmp_path / "model", "phi3", plant=True).folder)
    assert run.rescue.fp32_modules[:3] == ["model.layers.1", "model.layers.2", "model.layers.3"]
    assert "this would have to stay in fp32: layers 1 to 3 (model.layers)" in words.headline(run.rescue)
