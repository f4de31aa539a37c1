"""Families that run whole, generated from: the tokens of transformers' own generate, or one sentence."""

from pathlib import Path

import pytest

from qwen_precision.errors import QprecError
from support.families import FAMILIES, OWN_CACHE, make_family
from support.generations import ids_of, plain, run

TEXTS = ["hello there, this is a test", "ab"]


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["alone", "batch"])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "jamba", "mixtral", "opt", "qwen3_next"])
def test_the_tokens_are_those_of_transformers(name: str, texts: list[str], tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", name, plant=False).folder
    made = run(folder, texts, "off", dtype="fp32", max_new_tokens=8, attention="eager")
    assert ids_of(made) == plain(folder, texts, "fp32", do_sample=False, max_new_tokens=8, attention="eager")


@pytest.mark.parametrize("name", [*sorted(OWN_CACHE & FAMILIES.keys()), "mamba", "rwkv"])
def test_a_family_with_a_cache_of_its_own_or_none_is_told_in_a_sentence(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", name, plant=False).folder
    try:
        said = run(folder, TEXTS[:1], "off", dtype="fp32", max_new_tokens=8).stopped  # some do the first step
    except QprecError as error:
        said = str(error)
    assert said is not None and FAMILIES[name] in said and "key-value cache" in said and "qprec probe" in said
