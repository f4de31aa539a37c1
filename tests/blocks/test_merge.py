"""A folder as one report: what one process would have found, whichever record is taken first, and what is missing."""

import random
from pathlib import Path

import pytest

from qwen_precision.blocks import Folder, reports
from qwen_precision.blocks.merge import _across, _summed
from qwen_precision.blocks.summary import read_summary, summary_of
from qwen_precision.blocks.tally import Tally
from qwen_precision.errors import QprecError
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from qwen_precision.record import joined, load
from support.folders import made_up, records

SIZES = [100.0, 70_000.0, 40_000.0, 300.0, 90_000.0, 200.0, 66_000.0, 50_000.0, 400.0]


def merged(tmp_path: Path, sizes: list[float] = SIZES, **changes: object) -> Report:
    made_up(tmp_path / "runs", sizes, **changes)  # type: ignore[arg-type]
    (report,) = reports(Folder(tmp_path / "runs"))
    return report


def as_one(tmp_path: Path) -> Report:
    """What a single process would have reported."""
    return judge(joined(records(tmp_path / "runs")))


def test_verdict_findings_and_rooms_are_those_of_one_process(tmp_path: Path) -> None:
    ours, whole = merged(tmp_path), as_one(tmp_path)
    assert ours.verdict == whole.verdict == {"fp16": "fail"}
    told = [[(f.kind, f.place.name, f.place.prompt, f.magnitude) for f in each.findings] for each in (ours, whole)]
    assert told[0] == told[1]
    rooms = [
        {each.run.sites[row.site].layer: (row.abs_max, row.headroom) for row in each.tightest("fp16")}
        for each in (ours, whole)
    ]
    assert rooms[0] == rooms[1]
    assert ours.precision == whole.precision


def test_prompts_that_are_worst_in_nothing_are_counted_and_not_opened(tmp_path: Path) -> None:
    report = merged(tmp_path)
    assert report.corpus is not None and report.corpus.prompts == len(SIZES) > len(report.run.prompts)


def test_how_many_fail_where_and_how_near_the_others_are_is_told_of_all_prompts(tmp_path: Path) -> None:
    corpus = merged(tmp_path).corpus
    assert corpus is not None
    (fp16,) = corpus.across
    assert fp16.failing == 3 and fp16.places == (("layer 31, residual add after mlp", 3),)
    assert [name for name, _ in fp16.worst[:3]] == ["prompt 5", "prompt 2", "prompt 7"]
    rooms = sorted(65504 / max(size, 420.0, 410.0) if size > 420 else 65504 / 410.0 for size in SIZES)
    assert fp16.quantiles[0] == (0.0, pytest.approx(65504 / 90_000, rel=1e-5))
    assert fp16.quantiles[3] == (0.5, pytest.approx(rooms[len(SIZES) // 2], rel=1e-5))


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_matter_which_records_are_taken_together_first(seed: int, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES)
    paths = Folder(tmp_path / "runs").records()
    dice = random.Random(seed)

    def tally() -> Tally:
        parts = []
        for path in dice.sample(paths, len(paths)):
            summary = read_summary(path)
            assert summary is not None
            parts.append(Tally.of(summary, path))
        while len(parts) > 1:
            into = parts.pop(dice.randrange(len(parts)))
            parts[dice.randrange(len(parts))].take(into)
        return parts[0]

    one, other = tally(), tally()
    assert (one.best, one.worst, one.blocks, one.ranks) == (other.best, other.worst, other.blocks, other.ranks)
    assert list(_across(one, {})) == list(_across(other, {}))
    assert _summed(one) == _summed(other)


def test_precision_counts_a_prompt_once_that_lies_in_blocks_of_two_sizes(tmp_path: Path) -> None:
    once = merged(tmp_path, SIZES[:4]).precision["fp16"]
    twice = merged(tmp_path, SIZES[:4], block=4).precision["fp16"]
    assert (twice.rows, twice.agree) == (once.rows, once.agree) == (4, 4)


def test_precision_leaves_out_the_prompt_that_a_part_of_a_sweep_runs_once_more(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES[:2])
    (path,) = Folder(tmp_path / "runs").records()
    run = load(path)
    part = {**run.settings["block"], "block": {**run.settings["block"]["block"], "kind": "sweep", "hashes": ""}}
    swept = judge(run.model_copy(update={"settings": {**run.settings, "block": part}}))
    assert summary_of(judge(run), b"", (0, 1)).sums and not summary_of(swept, b"", (0, 1)).sums


def test_a_record_that_is_there_twice_counts_its_prompts_once(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES)
    path = Folder(tmp_path / "runs").records()[0]
    for name in (path, path.with_suffix(".summary")):
        (name.parent / f"copy{name.suffix}").write_bytes(name.read_bytes())
    (report,) = reports(Folder(tmp_path / "runs"))
    assert report.corpus is not None and report.corpus.prompts == len(SIZES)


def test_blocks_that_are_missing_are_named_and_what_is_not_seen_is_no_pass(tmp_path: Path) -> None:
    report = merged(tmp_path, [100.0] * 9, skip={1, 2, 4})
    assert report.verdict == {"fp16": "incomplete"} and report.exit_code("fail") == 3
    assert report.stopped == "not seen: 5 of 9 prompts (prompts 3 to 6, prompt 9)"
    assert report.corpus is not None and report.corpus.missing == ("prompts 3 to 6", "prompt 9")
    assert (report.corpus.prompts, report.corpus.asked, report.corpus.missing_blocks) == (4, 9, 3)


def test_a_failure_is_one_whatever_is_missing(tmp_path: Path) -> None:
    report = merged(tmp_path, skip={1})
    assert report.verdict == {"fp16": "fail"} and report.exit_code("fail") == 1


def test_a_checkpoint_of_which_nothing_was_seen_is_a_report_too(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [100.0, 200.0], sources=("a", "b"))
    for path in Folder(tmp_path / "runs").records():
        summary = read_summary(path)
        if summary is not None and summary.source == "b":
            path.unlink()
    seen, unseen = reports(Folder(tmp_path / "runs"))
    assert (seen.name, seen.verdict) == ("a", {"fp16": "ok"})
    assert (unseen.name, unseen.verdict, unseen.run.model.layers) == ("b", {"fp16": "incomplete"}, 0)


def test_a_corpus_that_has_grown_counts_its_last_block_once(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES[:3])
    report = merged(tmp_path, SIZES)
    assert report.corpus is not None and report.stopped is None
    assert (report.corpus.prompts, report.corpus.blocks) == (9, 5)


def test_a_larger_corpus_of_other_prompts_takes_the_place_of_none(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES[:2], text="other")
    report = merged(tmp_path, SIZES[:5], block=8)
    assert report.corpus is not None and (report.corpus.prompts, report.corpus.blocks) == (7, 2)


def test_another_corpus_in_the_same_folder_is_more_prompts(tmp_path: Path) -> None:
    report = merged(tmp_path, SIZES, block=4)
    assert report.corpus is not None and report.corpus.blocks == 3
    report = merged(tmp_path, SIZES[:8], block=8)
    assert report.corpus is not None and report.corpus.prompts == 9 and report.corpus.blocks == 2


def test_a_folder_without_records_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(QprecError, match="holds no records"):
        reports(Folder(tmp_path))
