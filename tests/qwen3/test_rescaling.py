"""A rescaling changes no bit in fp32, whatever its powers and the model; written, then loaded by transformers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_precision.model.folder import open_checkpoint
from qwen_precision.qwen3.op import GATE_AND_UP, name_of, row_of
from qwen_precision.qwen3.rescaling import FAMILIES, Scale, has_qk_norm, powers_of
from qwen_precision.rescue.bits import WeightBits
from support.checkpoints import make_checkpoint
from support.rescues import LLAMA, export, layer_powers, logits, powers
from support.runs import run_probe

pytestmark = pytest.mark.transformers

SMALL = st.integers(0, 12)
MOVES = st.integers(-6, 6)
UNNORMED = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "llama": LLAMA,
    "mistral": {"sliding_window": 4},
}
"""Families whose q and k have no norms of their own, each with what only it has."""


@st.composite
def shapes(draw: st.DrawFn, family: str = "qwen3") -> dict:
    """A tiny model of a family, any ratio of heads, tied or not, and powers for it."""
    kv, normed = draw(st.sampled_from([1, 2, 3])), family == "qwen3"
    heads = kv * draw(st.sampled_from([1, 2, 4]))
    moe, tied, stream = normed and draw(st.booleans()), draw(st.booleans()), draw(SMALL)
    layers = draw(st.integers(1, 3))
    untied = tied and draw(st.booleans())
    final = stream if tied and not untied else draw(MOVES)
    experts = 8 if moe else 1
    return {
        "config": {
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": draw(st.sampled_from([8, 16])),
            "hidden_size": draw(st.sampled_from([24, 64] if normed else [8 * heads, 16 * heads])),
            "num_hidden_layers": layers,
            "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.01])),
            **({"attention_bias": draw(st.booleans()) and not moe} if normed else copy.deepcopy(UNNORMED[family])),
        },
        "family": family,
        "moe": moe,
        "tied": tied,
        "rescaling": {
            "stream": stream,
            "qk_norm": normed,
            "untied": untied,
            "final_norm": final,
            "layers": [
                layer_powers(
                    number,
                    input_norm=draw(MOVES),
                    query=0 if normed else draw(MOVES),
                    value=draw(MOVES),
                    post_norm=draw(MOVES),
                    product=[draw(MOVES) for _ in range(experts)],
                )
                for number in range(layers)
            ],
        },
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=shapes())
def test_any_powers_on_any_shape_leave_every_bit_of_the_fp32_logits(
    shape: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    every_bit_is_left(shape, tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("family", UNNORMED)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_so_do_any_powers_where_q_and_k_have_no_norms(
    family: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    every_bit_is_left(data.draw(shapes(family)), tmp_path_factory.mktemp("any"))


def every_bit_is_left(shape: dict, folder: Path) -> None:
    """Written, and read again by plain transformers, a rescaled model gives what the original does."""
    form = {key: shape[key] for key in ("family", "moe", "tied")}
    source = make_checkpoint(folder / "source", **form, **shape["config"])
    eps = shape["config"]["rms_norm_eps"]
    made = export(source, folder / "made", powers(eps=eps, **shape["rescaling"]))
    wanted = logits(source, torch.float32)
    assert torch.isfinite(wanted).all() and wanted.abs().max() > 0
    assert torch.equal(logits(made, torch.float32), wanted)
    assert torch.equal(logits(made, torch.float32, attention="eager"), logits(source, torch.float32, attention="eager"))


def test_a_tied_model_stays_tied_and_an_untied_one_gets_a_tensor_of_its_own(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tied", tied=True)
    kept = export(source, tmp_path / "kept", powers(stream=5, final_norm=5))
    freed = export(source, tmp_path / "freed", powers(stream=5, final_norm=0, untied=True))
    assert json.loads((kept / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((freed / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" not in open_checkpoint(kept, "").tensors
    assert "lm_head.weight" in open_checkpoint(freed, "").tensors
    for folder in (kept, freed):
        assert torch.equal(logits(folder, torch.float32), logits(source, torch.float32))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", *UNNORMED])
def test_every_output_shrinks_by_what_the_tables_say(family: str, attention: str, tmp_path: Path) -> None:
    """Each operation of the rescaled model, measured, is the original's times the power of two the tables name."""
    moe, normed = family == "qwen3_moe", family not in UNNORMED
    source = make_checkpoint(tmp_path / "source", family=family, moe=moe, **copy.deepcopy(UNNORMED.get(family, {})))
    product = [3] * (8 if moe else 1)
    moved = {"input_norm": 1, "query": 0 if normed else 4, "value": 2, "post_norm": -1, "product": product}
    layers = [layer_powers(number, **moved) for number in range(3)]
    rescaling = powers(stream=5, qk_norm=normed, final_norm=2, layers=layers)
    made = export(source, tmp_path / "made", rescaling)
    before, after = (run_probe(each, ["Hello there"], dtypes=["fp32"], attention=attention) for each in (source, made))
    scale, checked = Scale(rescaling), 0
    theirs = dict(zip(((s.module, s.op, s.call) for s in after.sites), after.passes[0].abs_max, strict=True))
    for site, value in zip(before.sites, before.passes[0].abs_max, strict=True):
        own_norm = site.module.endswith("norm") and (site.op, site.call) != ("mul", 1)
        if own_norm or name_of(site.module, site.op, site.call) == GATE_AND_UP:
            continue  # inside a norm, in fp32, the factor comes and goes; gate and up are one product
        wanted = value * 2.0 ** scale.output(site.module, site.op, site.call, moe)
        assert theirs[site.module, site.op, site.call] == pytest.approx(wanted, rel=1e-5), site
        checked += row_of(site.module, site.op, site.call, moe).mover(normed) is not None
    assert checked > (30 if normed else 48)  # of q and k the rotary embedding moves too


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_has_a_rule(family: str, tmp_path: Path) -> None:
    moe = family == "qwen3_moe"
    more = copy.deepcopy(UNNORMED.get(family, {"attention_bias": not moe}))
    names = list(open_checkpoint(make_checkpoint(tmp_path / "one", family=family, moe=moe, **more), "").tensors)
    assert has_qk_norm(names) == (family not in UNNORMED)
    assert [name for name in names if powers_of(name, has_qk_norm(names)) is None] == []


def test_the_factor_of_a_tensor_is_the_sum_of_its_powers() -> None:
    scale = Scale(powers(stream=4, final_norm=3, layers=[layer_powers(7, value=1, post_norm=2, product=[5, 6])]))
    factor = {
        "model.embed_tokens.weight": -4,
        "lm_head.weight": -3,
        "model.norm.weight": 3,
        "model.layers.7.self_attn.q_proj.weight": -4,
        "model.layers.7.self_attn.q_norm.weight": 0,
        "model.layers.7.self_attn.v_proj.weight": -1,
        "model.layers.7.self_attn.o_proj.weight": -3,
        "model.layers.7.mlp.experts.0.up_proj.weight": -3,
        "model.layers.7.mlp.experts.1.down_proj.weight": 2,
        "model.layers.7.mlp.experts.1.gate_proj.weight": 2,
        "model.layers.7.mlp.gate.weight": 2,
        "model.layers.70.mlp.gate.weight": 0,
        "embed_tokens.weight": -4,
        "norm.weight": 3,
    }
    assert {name: scale.factor(name) for name in factor} == factor


def test_without_norms_of_their_own_q_and_k_keep_their_size_whatever_the_stream_does() -> None:
    scale = Scale(powers(stream=4, qk_norm=False, layers=[layer_powers(7, input_norm=1, query=2)]))
    factor = {
        "model.layers.7.self_attn.q_proj.weight": -1,
        "model.layers.7.self_attn.k_proj.weight": 3,
        "model.layers.7.self_attn.q_proj.bias": -2,
        "model.layers.7.self_attn.k_proj.bias": 2,
        "model.layers.8.self_attn.q_proj.weight": 0,
        "model.layers.8.self_attn.k_proj.bias": 0,
        "model.layers.8.self_attn.v_proj.bias": 0,
        "model.layers.8.self_attn.o_proj.bias": -4,
        "model.layers.8.mlp.gate_proj.bias": 0,
        "model.layers.8.mlp.up_proj.bias": 0,
        "model.layers.8.mlp.down_proj.bias": -4,
    }
    assert {name: scale.factor(name) for name in factor} == factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_lost_are_those_under_the_last_one_of_fp16(dtype: torch.dtype) -> None:
    values = [1.0, 1.5, 1.0078125, 2.0**-14, 3 * 2.0**-14, 2.0**-24, -5 * 2.0**-20, 0.0]
    bits = WeightBits(torch.tensor(values, dtype=dtype))
    for power in (0, 1, 5, 12, 20):
        lost = 0
        for value in values:
            digits = int(abs(value) * 2**60)  # an exact integer; what lies under 2^-24 after the factor is lost
            last = (digits & -digits).bit_length() - 1
            lost += max(0, min(36 + power, digits.bit_length()) - last) if digits else 0
        assert bits.bits_lost(-power) == lost
