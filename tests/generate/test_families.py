"""Families that run whole, generated from: the tokens of transformers' own generate, or one sentence."""

from pathlib import Path

import pytest
import transformers

from qwen_precision.errors import QprecError
from qwen_precision.model.lanes import cache_argument
from support.families import FAMILIES, OWN_CACHE, make_family
from support.generations import ids_of, plain, run, settings

pytestmark = pytest.mark.transformers

TEXTS = ["hello there, this is a test", "ab"]


def skip_without(name: str) -> None:
    if name not in FAMILIES or cache_argument(getattr(transformers, FAMILIES[name])) is None:
        pytest.skip("this transformers has no such family, or gives it no cache")
    if name == "jamba" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers gives it a cache of its own, which is said")


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["alone", "batch"])
@pytest.mark.parametrize(
    "name", ["gemma3_text", "gpt_oss", "jamba", "mamba", "mixtral", "opt", "qwen3_next", "whisper"]
)
def test_the_tokens_are_those_of_transformers(name: str, texts: list[str], tmp_path: Path) -> None:
    skip_without(name)
    folder = make_family(tmp_path / "model", name, plant=False).folder
    made = run(folder, texts, "off", dtype="fp32", max_new_tokens=8, attention="eager")
    assert ids_of(made) == plain(folder, texts, "fp32", do_sample=False, max_new_tokens=8, attention="eager")


@pytest.mark.parametrize("name", ["jamba", "mamba", "mamba2", "qwen3_next"])
def test_the_tokens_of_a_prompt_in_chunks_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    """A layer that keeps a state has to go on from it; one that cannot is given the whole prompt."""
    skip_without(name)
    folder = make_family(tmp_path / "model", name, plant=False).folder
    whole, parts = (
        run(folder, TEXTS, settings(float32_logits={"chunk": size}), dtype="fp32", max_new_tokens=8) for size in (0, 4)
    )
    assert ids_of(parts) == ids_of(whole)


@pytest.mark.parametrize("name", [*sorted(OWN_CACHE & FAMILIES.keys()), "openai-gpt", "rwkv", "xlm"])
def test_a_family_with_a_cache_of_its_own_or_none_is_told_in_a_sentence(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", name, plant=False).folder
    try:
        said = run(folder, TEXTS[:1], "off", dtype="fp32", max_new_tokens=8).stopped  # some do the first step
    except QprecError as error:
        said = str(error)
    assert said is not None and FAMILIES[name] in said and "key-value cache" in said and "qprec probe" in said
