"""Values of a stranger's config and tokenizer pass one gate: a type, a bound, a sentence with the key."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli import main
from support.checkpoints import edit_json
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]

CONFIG: dict[str, dict[str, Any]] = {
    "rms_norm_eps": {"rms_norm_eps": "1e-300"},
    "eos_token_id": {"eos_token_id": float("nan")},
    "num_labels": {"num_labels": 10_000_000},
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "vocab_size": {"vocab_size": -1},
    "hidden_size": {"hidden_size": 1e30},
    "max_position_embeddings": {"max_position_embeddings": "x"},
    "tie_word_embeddings": {"tie_word_embeddings": "x"},
    "architectures.0": {"architectures": [5]},
    "text_config.num_hidden_layers": {"text_config": {"num_hidden_layers": 10**9}},
    "pad_token_id": {"pad_token_id": 10**30},
    "attention_types": {"attention_types": [[["global", "local"], 10**4]] * 2},
    "head_dim": {"head_dim": 2**31 - 2},
    "depth": {"vision_config": {"stages": [{"depth": 10**9}]}},
    "text_config.audio_config.num_layers": {"text_config": {"audio_config": {"num_layers": 10**6}}},
    "note": {"note": [{"deep": "\ud800"}]},
}


def test_more_experts_than_any_model_has_are_refused_before_they_are_built(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "config.json", num_hidden_layers=2000, num_experts=20_000)
    assert main(["probe", "model"]) == 3
    assert "config.json: asks for 40,000,000 experts in all layers" in sentence(capsys)


def test_numbers_of_real_configs_that_are_no_sizes_may_be_large(broken: Path, capsys: Capture) -> None:
    large = {
        "rope_theta": 10_000_000,
        "max_position_embeddings": 10_485_760,
        "train_tokens": 36 * 10**12,
        "seed": 2**40,
    }
    edit_json(broken / "config.json", **large, image_processor={"max_pixels": 12_845_056}, max_window_layers=6)
    assert main(["probe", "model", "--dtype", "fp16", "--prompt", "hello", "--fail-on", "never"]) == 0


@pytest.mark.parametrize("verb", ["probe", "generate"])
@pytest.mark.parametrize("key", CONFIG)
def test_a_value_that_cannot_be_is_named_before_anything_is_built(
    key: str, verb: str, broken: Path, capsys: Capture
) -> None:
    edit_json(broken / "config.json", **CONFIG[key])
    assert main([verb, "model"]) == 3
    assert f"config.json: {key}: " in sentence(capsys)


def test_switches_of_what_a_forward_gives_out_change_nothing(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "config.json", return_dict=False, output_hidden_states="x", output_attentions=True)
    for args in (["probe", "model", "--dtype", "fp16", "--prompt", "hello"], ["generate", "model"]):
        assert main([*args, "--fail-on", "never"]) == 0
    assert "bug" not in capsys.readouterr().err


FOREIGN: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": None, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 6},
    "too few layer types": {"layer_types": ["full_attention"]},
    "no heads": {"num_attention_heads": 0},
    "activation": {"hidden_act": "nothing"},
}


@pytest.mark.parametrize("verb", ["probe", "generate"])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_a_familys_own_code_stumbles_over_is_a_sentence_and_no_bug(
    what: str, verb: str, broken: Path, capsys: Capture
) -> None:
    edit_json(broken / "config.json")
    data = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**data, **FOREIGN[what]}))
    assert main([verb, "model", "-o", "run.json"]) == 3
    told = capsys.readouterr()
    assert "bug" not in told.err and "Error" in told.out + told.err


@pytest.mark.parametrize("value", ["x", {"a": 1}, [1], True])
def test_a_tokenizers_longest_text_must_be_a_number(value: Any, broken: Path, capsys: Capture) -> None:
    edit_json(broken / "tokenizer_config.json", model_max_length=value)
    assert main(["probe", "model"]) == 3
    assert "tokenizer_config.json: model_max_length: should be a number" in sentence(capsys)


def test_half_a_character_in_the_generation_config_is_found_before_the_text_is_made(
    broken: Path, capsys: Capture
) -> None:
    (broken / "generation_config.json").write_text('{"foo": "\\ud800"}')
    assert main(["generate", "model"]) == 3
    assert "generation_config.json: foo: holds half a character" in sentence(capsys)


def test_our_own_faults_over_a_checkpoint_stay_bugs(
    broken: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise KeyError("ours")

    failing.__globals__["__name__"], before = "qwen_precision.somewhere", __name__
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("qwen_precision.probe.shadow.Shadow.run", failing)
    try:
        assert main(["probe", "model", "--dtype", "fp16"]) == 3
    finally:
        failing.__globals__["__name__"] = before
    assert "this is a bug in qprec" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "processor_config.json"])
def test_a_file_of_settings_that_is_larger_than_any_is_refused_by_its_name(
    name: str, broken: Path, capsys: Capture
) -> None:
    (broken / name).write_text('{"x":[' + "{}," * 1_500_000 + "{}]}")
    for verb in ("probe", "generate"):
        assert main([verb, "model"]) == 3
        assert f"{name}: is larger than 4 MiB" in sentence(capsys)


@pytest.mark.parametrize(("name", "most"), [("tokenizer.json", "6,000,000"), ("vocab.json", "6,000,000")])
def test_values_of_a_tokenizers_file_are_counted_before_they_are_made(
    name: str, most: str, broken: Path, capsys: Capture
) -> None:
    (broken / name).write_text('{"x":[' + "{}," * 3_100_000 + "{}]}")
    assert main(["probe", "model"]) == 3
    assert f"{name}: holds more than {most} values" in sentence(capsys)


def test_values_of_an_index_and_of_a_header_are_counted_before_they_are_made(broken: Path, capsys: Capture) -> None:
    weights = broken / "model.safetensors"
    many = b'{"__metadata__":{"x":[' + b"{}," * 1_100_000 + b"{}]}}"
    weights.write_bytes(struct.pack("<Q", len(many)) + many)
    assert main(["probe", "model"]) == 3
    assert "model.safetensors: holds 2,200,004 values, more than 2,000,000" in sentence(capsys)
    weights.unlink()
    (broken / "model.safetensors.index.json").write_bytes(many)
    assert main(["probe", "model"]) == 3
    assert "model.safetensors.index.json: holds 2,200,004 values, more than 2,000,000" in sentence(capsys)
