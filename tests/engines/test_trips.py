"""The trip file: a record that `qprec report` shows and of which `qprec probe` runs what failed; no engine needed."""

import html
from pathlib import Path

import pytest
import torch

from qwen_precision.judge import judge
from qwen_precision.model import open_checkpoint
from qwen_precision.record import load
from qwen_precision.render import FORMATS
from qwen_precision.report import view
from qwen_precision.settings import read_prompts
from qwen_precision.vllm.asked import Asked, Met
from qwen_precision.vllm.trips import MOST_REQUESTS, MOST_STEPS, Trips, trip_file
from support.checkpoints import DEMO
from support.runs import run_probe

WHOLE = {"nan": 512.0, "inf": 0.0, "-inf": 0.0, "elements": 512.0}
PARTLY = {"nan": 2.0, "inf": 1.0, "-inf": 3.0, "elements": 512.0}


@pytest.fixture
def trips(tmp_path: Path) -> Trips:
    return Trips(open_checkpoint(DEMO, "demo"), "demo", "fp16", tmp_path / "trips.json")


def test_a_report_of_it_says_which_request_failed_at_which_step_and_that_nothing_was_changed(
    trips: Trips, tmp_path: Path
) -> None:
    trips.add(Asked([16, 17], [5, 6, 7]), Met(3, PARTLY))
    report = judge(load(tmp_path / "trips.json"))
    [found] = [each for each in report.findings if each.kind == "nonfinite-logits"]
    assert (found.dtype, found.place.row, found.place.step, found.severity) == ("fp16", 0, 3, "error")
    assert "2 NaN and 1 +inf among 512 logits" in found.cause.sentence
    assert "cache was not looked at" in found.cause.sentence
    assert "VLLM_COMPUTE_NANS_IN_LOGITS=1" in found.cause.sentence


def test_a_probe_is_given_every_failing_request_for_itself_up_to_the_step_that_failed(
    trips: Trips, tmp_path: Path
) -> None:
    trips.add(Asked([16, 17], []), Met(0, WHOLE))
    trips.add(Asked([20, 21, 22], [5, 6]), Met(2, WHOLE))
    specs = read_prompts(None, str(tmp_path / "trips.json"))
    assert [[row.ids for row in spec.rows or []] for spec in specs] == [[[16, 17]], [[20, 21, 22, 5, 6]]]
    assert [spec.failed.step for spec in specs if spec.failed] == [0, 2]


def test_what_is_wholly_and_what_is_partly_bad_is_told_apart(trips: Trips) -> None:
    for held in (WHOLE, PARTLY, {"nan": 0.0, "inf": 500.0, "-inf": 12.0, "elements": 512.0}):
        trips.add(Asked([16], []), Met(0, held))
    made = trips.run().generation
    assert made is not None and [each.kind for each in made.trips] == ["wholly bad", "partly bad", "wholly bad"]


def test_the_file_stays_small_however_many_requests_and_steps_fail(trips: Trips) -> None:
    made: list[int] = []
    first = Asked([16], made)
    for step in range(MOST_STEPS + 3):
        trips.add(first, Met(step, WHOLE))
        made.append(0)
    for _ in range(MOST_REQUESTS + 3):
        trips.add(Asked([17], []), Met(0, WHOLE))
    run = trips.run()
    assert run.generation is not None and len(run.prompts[0].rows) == MOST_REQUESTS
    assert len([each for each in run.generation.trips if each.row == 0]) == MOST_STEPS


def test_the_environment_says_where_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPREC_TRIPS", raising=False)
    assert trip_file() == Path("qprec-trips.json")
    monkeypatch.setenv("QPREC_TRIPS", "/somewhere/else.json")
    assert trip_file() == Path("/somewhere/else.json")


@pytest.mark.parametrize("name", ["table", "markdown", "html", "json", "screen", "junit"])
def test_the_command_that_a_report_of_it_names_is_one_to_paste(
    name: str, trips: Trips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips.add(Asked([20, 21, 22], [5, 6]), Met(2, WHOLE))
    monkeypatch.chdir(tmp_path)
    path = Path("trips.json").rename("my trips.json")
    out = html.unescape(" ".join(str(FORMATS[name].render(view([path], "fail", None, False, []))).split()))
    assert "--prompts RUN" not in out and f"--prompts '{path}'" in out
    assert read_prompts(None, str(path))[0].rows


def row(**held: float) -> torch.Tensor:
    """512 logits, the likeliest at 3; of each value that is named, that many at the end."""
    logits, place = torch.zeros(512), 512
    logits[3] = 5.0
    for name, count in held.items():
        logits[place - int(count) : place], place = float(name), place - int(count)
    return logits


def test_a_partly_bad_row_of_a_request_that_asked_for_the_guard_is_mended_and_told_as_mended(
    trips: Trips, tmp_path: Path
) -> None:
    bad = row(nan=2, inf=1)
    mended = trips.meet(Asked([16], [], guard=True, temperature=0.5), bad)
    assert mended is not None and torch.isfinite(mended).all() and mended[3] == 5.0
    assert int(mended.argmax()) == 509 and float(mended[511]) == -float(mended[509])  # +inf stays the likeliest
    assert bad[511].isnan(), "the row itself is vLLM's"
    report = judge(load(tmp_path / "trips.json"))
    assert report.verdict == {"fp16": "risk"}
    assert "(guard clamp)" in report.findings[0].cause.done


def test_a_request_that_only_watches_is_never_mended(trips: Trips) -> None:
    assert trips.meet(Asked([16], []), row(nan=2)) is None


@pytest.mark.parametrize("held", [{"nan": 512}, {"nan": 511, "inf": 1}, {"-inf": 512}, {"nan": 257}])
def test_a_row_that_is_wholly_or_mostly_bad_is_never_hidden(held: dict[str, float], trips: Trips) -> None:
    assert trips.meet(Asked([16], [], guard=True), row(**held)) is None
    assert judge(trips.run()).verdict == {"fp16": "fail"}


def test_a_row_of_which_half_is_bad_may_be_mended_but_not_at_more_than_three_steps(trips: Trips) -> None:
    request = Asked([16], [], guard=True)
    mended = []
    for _ in range(4):
        mended.append(trips.meet(request, row(nan=256)) is not None)
        request.made.append(3)
    assert mended == [True, True, True, False]
    assert judge(trips.run()).verdict == {"fp16": "fail"}


def test_a_prompt_that_is_read_in_chunks_trips_once_for_its_first_token(trips: Trips) -> None:
    request = Asked([16, 17], [])
    for _ in range(3):
        trips.add(request, Met(0, WHOLE))
    assert len(request.trips) == 1


def test_a_request_of_which_vllm_does_not_tell_the_ids_is_not_kept_and_that_is_said(
    trips: Trips, caplog: pytest.LogCaptureFixture
) -> None:
    trips.add(Asked([16, 17], [5, -1]), Met(2, WHOLE))
    assert trips.run().generation.rows == [] and "failed at step 2, and is not kept" in caplog.text  # type: ignore[union-attr]


def test_a_probe_of_the_trips_finds_the_origin_where_the_demo_has_it(trips: Trips, tmp_path: Path) -> None:
    ids = open_checkpoint(DEMO, "demo").tokenizer("The capital of France is")["input_ids"]
    trips.meet(Asked(ids, []), row(nan=512))
    run = run_probe(DEMO, file=str(tmp_path / "trips.json"), dtypes=["fp16"])
    first = next(each for each in judge(run).findings if each.origin)
    assert first.place.module == "model.layers.3.mlp.down_proj" and run.prompts[0].rows[0].ids == ids
