"""The trip file: a record that `qprec report` shows and of which `qprec probe` runs what failed; no engine needed."""

from pathlib import Path

import pytest

from qwen_precision.judge import judge
from qwen_precision.model import open_checkpoint
from qwen_precision.record import load
from qwen_precision.settings import read_prompts
from qwen_precision.vllm.trips import MOST_REQUESTS, MOST_STEPS, Asked, Trips, trip_file
from support.checkpoints import DEMO

WHOLE = {"nan": 512.0, "inf": 0.0, "-inf": 0.0, "elements": 512.0}
PARTLY = {"nan": 2.0, "inf": 1.0, "-inf": 3.0, "elements": 512.0}


@pytest.fixture
def trips(tmp_path: Path) -> Trips:
    return Trips(open_checkpoint(DEMO, "demo"), "demo", "fp16", tmp_path / "trips.json")


def test_a_report_of_it_says_which_request_failed_at_which_step_and_that_nothing_was_changed(
    trips: Trips, tmp_path: Path
) -> None:
    trips.add(Asked([16, 17], [5, 6, 7]), PARTLY)
    report = judge(load(tmp_path / "trips.json"))
    [found] = [each for each in report.findings if each.kind == "nonfinite-logits"]
    assert (found.dtype, found.place.row, found.place.step, found.severity) == ("fp16", 0, 3, "error")
    assert "2 NaN and 1 +inf among 512 logits" in found.cause.sentence
    assert "cache was not looked at" in found.cause.sentence


def test_a_probe_is_given_every_failing_request_for_itself_up_to_the_step_that_failed(
    trips: Trips, tmp_path: Path
) -> None:
    trips.add(Asked([16, 17], []), WHOLE)
    trips.add(Asked([20, 21, 22], [5, 6]), WHOLE)
    specs = read_prompts(None, str(tmp_path / "trips.json"))
    assert [[row.ids for row in spec.rows or []] for spec in specs] == [[[16, 17]], [[20, 21, 22, 5, 6]]]
    assert [spec.failed.step for spec in specs if spec.failed] == [0, 2]


def test_what_is_wholly_and_what_is_partly_bad_is_told_apart(trips: Trips) -> None:
    for held in (WHOLE, PARTLY, {"nan": 0.0, "inf": 500.0, "-inf": 12.0, "elements": 512.0}):
        trips.add(Asked([16], []), held)
    made = trips.run().generation
    assert made is not None and [each.kind for each in made.trips] == ["wholly bad", "partly bad", "wholly bad"]


def test_the_file_stays_small_however_many_requests_and_steps_fail(trips: Trips) -> None:
    made: list[int] = []
    first = Asked([16], made)
    for _ in range(MOST_STEPS + 3):
        trips.add(first, WHOLE)
        made.append(0)
    for _ in range(MOST_REQUESTS + 3):
        trips.add(Asked([17], []), WHOLE)
    run = trips.run()
    assert run.generation is not None and len(run.prompts[0].rows) == MOST_REQUESTS
    assert len([each for each in run.generation.trips if each.row == 0]) == MOST_STEPS


def test_the_environment_says_where_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPREC_TRIPS", raising=False)
    assert trip_file() == Path("qprec-trips.json")
    monkeypatch.setenv("QPREC_TRIPS", "/somewhere/else.json")
    assert trip_file() == Path("/somewhere/else.json")
