"""The real vLLM, one fresh engine a question (a cache stays poisoned): ``make engines``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.judge import judge
from qwen_precision.record import Run, load
from qwen_precision.settings import read_prompts
from support.checkpoints import DEMO, ROOT
from support.runs import run_probe

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make engines"),
]

BAD, CLEAN = "The capital of France is", "1"
Texts = list[list[str]]


def serve(folder: Path, model: Path, dtype: str, *rounds: list[str], record: str = "", ask: bool = False) -> Texts:
    """Texts of a fresh engine, round by round."""
    to = folder / f"{len(list(folder.iterdir()))}.texts.json"
    asked: dict[str, Any] = {"model": str(model), "dtype": dtype, "rounds": rounds, "ask": ask, "to": str(to)}
    asked["record"] = str(folder / record) if record else ""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "QPREC_TRIPS": str(folder / "trips.json")}
    command = [sys.executable, str(Path(__file__).parent / "serve.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    texts: Texts = json.loads(to.read_text(encoding="utf-8"))
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def watched(folder: Path) -> Texts:
    """A bad request, then a clean one, watched in every way there is."""
    return serve(folder, DEMO, "float16", [BAD], [CLEAN], record="watched.json", ask=True)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Texts:
    """The same, not watched."""
    return serve(folder, DEMO, "float16", [BAD], [CLEAN])


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Texts:
    """The clean request alone."""
    return serve(folder, DEMO, "float16", [CLEAN])


def first_place(run: Run) -> tuple[str, str]:
    """Where it begins: module and name."""
    found = next(each for each in judge(run).findings if each.origin)
    return found.place.module, found.place.name


def test_the_demo_fails_in_vllm_at_the_place_that_a_probe_names(watched: Texts, folder: Path) -> None:
    probed = run_probe(DEMO, [BAD], dtypes=["fp16"])
    assert first_place(load(folder / "watched.json")) == first_place(probed)
    assert watched[0] == ["!!!!!!"]


def test_watching_changes_no_token(watched: Texts, plain: Texts) -> None:
    assert watched == plain


def test_a_clean_request_behind_a_bad_one_fails_and_in_a_fresh_engine_it_does_not(plain: Texts, fresh: Texts) -> None:
    assert plain[1] != fresh[0]


def test_where_a_clean_request_goes_bad_is_attention_that_was_given_nothing_bad(watched: Texts, folder: Path) -> None:
    run = load(folder / "watched.json")
    second = [each for each in judge(run).findings if each.origin and each.place.prompt == run.prompts[1].name]
    assert second and all(each.place.name == "attention output" for each in second)


def test_the_trip_file_leads_to_the_origin(watched: Texts, folder: Path) -> None:
    trips = load(folder / "trips.json")
    assert judge(trips).verdict == {"fp16": "fail"}
    specs = read_prompts(None, str(folder / "trips.json"))
    assert specs[0].rows is not None and trips.prompts[0].rows[0].ids == specs[0].rows[0].ids
    assert trips.prompts[0].rows[0].text == BAD


def test_bfloat16_is_clean(folder: Path) -> None:
    serve(folder, DEMO, "bfloat16", [BAD], [CLEAN], record="bf16.json", ask=True)
    assert judge(load(folder / "bf16.json")).verdict == {"bf16": "ok"}


def test_the_rescued_folder_is_clean_says_what_fp32_says_and_poisons_nothing(folder: Path) -> None:
    to = folder / "rescued"
    command = [sys.executable, "-m", "qwen_precision", "probe", str(DEMO), "--rescue-to", str(to), "--fail-on", "never"]
    subprocess.run([*command, "--quiet"], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    texts = serve(folder, to, "float16", [BAD], [CLEAN], record="rescued.json")
    assert texts == serve(folder, DEMO, "float32", [BAD], [CLEAN])
    assert judge(load(folder / "rescued.json")).verdict == {"fp16": "ok"}
