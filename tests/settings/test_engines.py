"""Engines are files: each checked as it is read, each with its source; what is wrong in one is said in a sentence."""

from pathlib import Path

import pytest
import yaml

from qwen_precision.errors import UsageError
from qwen_precision.settings import ALL, EVIDENCE, Engine, Rule, engine_names, load_engines
from support.checkpoints import ROOT

FOLDER = ROOT / "configs" / "engines"
RUN_BY_TESTS = {"transformers", "vllm"}  # the second by those of `make engines`


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_file_is_an_engine_and_all_of_them_are_named_in_their_order() -> None:
    found = load_engines([ALL])
    assert {each.name for each in found} == {path.stem for path in FOLDER.glob("*.yaml")}
    assert [each.name for each in found] == engine_names() and found[0].name == "transformers"
    assert len({each.order for each in found}) == len(found)


@pytest.mark.parametrize("engine", load_engines([ALL]), ids=lambda each: each.name)
def test_every_rule_and_every_option_says_where_it_was_read_and_when(engine: Engine) -> None:
    assert engine.rules
    for each in [*engine.rules, *(option for rule in engine.rules for option in rule.avoid)]:
        assert each.source.startswith("https://") and each.version
        pinned = each.version[:8] in each.source or "/v" in each.source or "/blob/" not in each.source
        assert pinned, f"{each.source} is a branch, which moves"
    evidence = {option.evidence for rule in engine.rules for option in rule.avoid}
    assert evidence <= set(EVIDENCE)
    assert "tested here" not in evidence or engine.name in RUN_BY_TESTS


def test_an_engine_is_asked_for_once_however_often_it_is_named() -> None:
    found = load_engines(["vllm", ALL, "vllm"])
    assert [each.name for each in found] == ["vllm", *(name for name in engine_names() if name != "vllm")]


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("vlm", "did you mean 'vllm'?"),
        ("llamacpp", "did you mean 'llama.cpp'?"),
        *((each, "known: transformers, vllm") for each in ("nope", "tensorrt")),
    ],
)
def test_an_unknown_engine_is_one_sentence_with_the_nearest_name(asked: str, near: str) -> None:
    with pytest.raises(UsageError, match="unknown engine") as caught:
        load_engines([asked])
    assert near in str(caught.value) and "\n" not in str(caught.value)


def test_an_engine_of_ones_own_is_a_file_and_costs_no_code(tmp_path: Path) -> None:
    rule = {"values": ["squares"], "because": "x", "source": "https://example.org", "version": "1"}
    (engine,) = load_engines([written(tmp_path, yaml.safe_dump({"runs": "mine", "rules": [rule]}))])
    assert (engine.name, engine.rules[0].values, engine.rules[0].avoid) == ("mine", ["squares"], [])


def test_a_file_that_is_called_as_another_engine_is_drops_neither(tmp_path: Path) -> None:
    text = yaml.safe_dump({"runs": "mine", "rules": []})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vllm.yaml").write_text(text, encoding="utf-8")
    files = [str(tmp_path / folder / "vllm.yaml") for folder in ("a", "b")]
    found = load_engines([files[0], "vllm", files[1], files[0]])
    names = [each.name for each in found]
    assert len(set(names)) == 3 and names[1] == "vllm"
    assert [Path(names[n]).resolve() for n in (0, 2)] == [Path(each).resolve() for each in files]
    assert [each.name for each in load_engines(files[:1])] == ["vllm"], "alone it keeps its name"


OUTPUTS = "runs: x\nrules: [{values: [outputs], because: x, source: 'https://a', version: '1'"
WRONG = {
    "- a list": "should hold `runs` and `rules`",
    "rules: [": "is not valid YAML",
    "runs: x": "rules: field required",
    "runs: x\nrules: []\nspeed: 3": "speed: extra inputs",
    "runs: x\nrules: [{values: [insides], because: x, source: 'https://a', version: '1'}]": "unknown value 'insides'",
    "runs: x\nrules: [{values: [outputs], because: x, version: '1'}]": "rules.0.source: field required",
    "runs: x\nrules: [{values: [outputs], because: x, source: a branch, version: '1'}]": "rules.0.source",
    "runs: x\nrules: [{values: [], because: x, source: 'https://a', version: '1'}]": "rules.0.values",
    f"{OUTPUTS}, modules: ['a|b$']}}]": "no path",
    f"{OUTPUTS}, modules: ['!a']}}]": "put '*' first",
    f"{OUTPUTS}, modules: a}}]": "valid list",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_file_is_named_in_one_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_engines([written(tmp_path, text)])
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


READ = {"values": ["outputs"], "because": "x", "source": "https://a", "version": "1"}
MODULES = {
    "model.layers.1.input_layernorm": True,
    "model.layers.0.input_layernorm": False,
    "model.layers.0.post_attention_layernorm": True,
    "model.norm": True,
    "norm": True,
    "model.layers.0.self_attn.q_norm": False,
}


@pytest.mark.parametrize("module", MODULES)
def test_a_rule_holds_for_its_paths_but_for_those_behind_an_exclamation_mark(module: str) -> None:
    (engine,) = load_engines(["onnxruntime-1.24"])
    assert engine.rules[0].holds_for(module) == MODULES[module]
    assert Rule.model_validate(READ).holds_for(module)


def test_no_path_of_modules_can_take_long() -> None:
    rule = Rule.model_validate({**READ, "modules": ["*a" * 100]})
    assert not rule.holds_for("a" * 5000 + "Q")
