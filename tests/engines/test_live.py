"""The real vLLM, one fresh engine a question: ``make engines``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.fresh import BAD, CLEAN, NEEDS_VLLM, Texts, serve
from qwen_precision.judge import judge
from qwen_precision.record import Run, load
from qwen_precision.report import view
from qwen_precision.settings import read_prompts
from support.checkpoints import DEMO, ROOT, make_checkpoint
from support.runs import run_probe

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def watched(folder: Path) -> Texts:
    """A bad request, then a clean one, watched in every way there is."""
    return serve(folder, DEMO, "float16", [BAD], [CLEAN], record="watched.json", asks=["watch"])


@pytest.fixture(scope="module")
def plain(folder: Path) -> Texts:
    """The same, not watched."""
    return serve(folder, DEMO, "float16", [BAD], [CLEAN])


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Texts:
    """The clean request alone."""
    return serve(folder, DEMO, "float16", [CLEAN], record="fresh.json")


def first_place(run: Run) -> tuple[str, str]:
    """Where it begins: module and name."""
    found = next(each for each in judge(run).findings if each.origin)
    return found.place.module, found.place.name


ORIGIN = ("model.layers.3.mlp.down_proj", "down_proj output")


def test_the_demo_fails_in_vllm_at_the_place_that_a_probe_names(watched: Texts, folder: Path) -> None:
    probed = run_probe(DEMO, [BAD], dtypes=["fp16"])
    assert first_place(load(folder / "watched.json")) == first_place(probed) == ORIGIN
    assert watched[0] == ["!!!!!!"]


def test_watching_changes_no_token(watched: Texts, plain: Texts) -> None:
    assert watched == plain


def test_a_fault_of_ours_in_the_middle_changes_no_token_and_the_record_says_so(plain: Texts, folder: Path) -> None:
    assert serve(folder, DEMO, "float16", [BAD], [CLEAN], record="fault.json", fault=400) == plain
    run = load(folder / "fault.json")
    assert run.stopped is not None and run.stopped.endswith("MemoryError: planted")
    assert first_place(run) == ORIGIN, "what was seen before is kept"


def test_a_clean_request_behind_a_bad_one_fails_and_in_a_fresh_engine_it_does_not(plain: Texts, fresh: Texts) -> None:
    assert plain[1] != fresh[0]


def test_the_report_recognises_the_poisoned_cache(watched: Texts, fresh: Texts, folder: Path) -> None:
    second = load(folder / "watched.json").prompts[1].name
    shown = view([folder / "watched.json", folder / "fresh.json"], "never", None, False, [])
    causes = {each.cause.kind for each in shown.reports[0].findings if each.origin and each.place.prompt == second}
    assert causes == {"poisoned-cache"} and judge(load(folder / "fresh.json")).verdict == {"fp16": "ok"}
    first = next(each for each in shown.reports[0].findings if each.origin)
    assert (first.place.module, first.cause.kind) == (ORIGIN[0], "not-told"), "the bad request itself is no victim"


def test_the_trip_file_leads_to_the_origin(watched: Texts, folder: Path) -> None:
    trips = load(folder / "trips.json")
    assert judge(trips).verdict == {"fp16": "fail"}
    specs = read_prompts(None, str(folder / "trips.json"))
    assert specs[0].rows is not None and trips.prompts[0].rows[0].ids == specs[0].rows[0].ids
    assert trips.prompts[0].rows[0].text == BAD
    assert first_place(run_probe(DEMO, file=str(folder / "trips.json"), dtypes=["fp16"])) == ORIGIN


def test_bfloat16_is_clean(folder: Path) -> None:
    serve(folder, DEMO, "bfloat16", [BAD], [CLEAN], record="bf16.json", asks=["watch"])
    assert judge(load(folder / "bf16.json")).verdict == {"bf16": "ok"}


def test_the_rescued_folder_is_clean_says_what_fp32_says_and_poisons_nothing(folder: Path) -> None:
    to = folder / "rescued"
    command = [sys.executable, "-m", "qwen_precision", "probe", str(DEMO), "--rescue-to", str(to), "--fail-on", "never"]
    subprocess.run([*command, "--quiet"], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    texts = serve(folder, to, "float16", [BAD], [CLEAN], record="rescued.json")
    assert texts == serve(folder, DEMO, "float32", [BAD], [CLEAN])
    assert judge(load(folder / "rescued.json")).verdict == {"fp16": "ok"}


def nan_logit(model: Any) -> None:
    """One token's logit is NaN, whatever goes before: greedy decoding always takes it."""
    model.lm_head.weight[300] = float("nan")


def test_a_guarded_request_answers_as_if_nothing_were_bad_beside_two_that_are_not_guarded(tmp_path: Path) -> None:
    shape = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    healthy = make_checkpoint(tmp_path / "healthy", **shape)
    broken = make_checkpoint(tmp_path / "broken", edit=nan_logit, **shape)
    [wanted] = serve(tmp_path, healthy, "float16", [CLEAN, CLEAN], tokens=3, asks=["guard", None])
    [texts] = serve(tmp_path, broken, "float16", [CLEAN] * 3, tokens=3, asks=["guard", "watch", None])
    assert wanted[0] == wanted[1], "a healthy row is left as it is"
    assert texts[0] == wanted[0] and texts[1] == texts[2] != texts[0]
    guarded, left = load(tmp_path / "trips.json").generation.rows, judge(load(tmp_path / "trips.json"))  # type: ignore[union-attr]
    assert len(guarded) == 2 and [each.severity for each in left.findings[:2]] == ["error", "warning"]


def test_every_worker_of_several_saves_what_it_saw(tmp_path: Path) -> None:
    [texts] = serve(tmp_path, DEMO, "float16", [BAD], record="run.json", workers=2)
    runs = [load(tmp_path / name) for name in ("run.json", "run.rank1.json")]
    assert texts == ["!!!!!!"] and [first_place(run) for run in runs] == [ORIGIN, ORIGIN]
    assert ["rank 0 of 2" in run.choices[0].reason for run in runs] == [True, False]
