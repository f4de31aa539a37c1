"""A folder as one report: what one process would have found, whichever record is taken first, and what is missing."""

import math
import os
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwen_precision.blocks import Folder, reports
from qwen_precision.blocks.merge import _across, _summed
from qwen_precision.blocks.summary import Summary, read_summary, summary_of
from qwen_precision.blocks.tally import Tally
from qwen_precision.errors import QprecError
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from qwen_precision.record import joined, load
from qwen_precision.render import FORMATS, View
from support.builders import an_upcast
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


def test_what_float32_logits_buy_and_cost_is_told_of_all_prompts_and_not_of_those_that_are_opened_alone(
    tmp_path: Path,
) -> None:
    report, whole = merged(tmp_path), as_one(tmp_path)
    ours, theirs = report.bought["fp16"], whole.bought["fp16"]
    # "prompt 8" only counts, and may be another's name in the next plan.
    assert replace(ours, logprob_rms=0.0) == replace(theirs, logprob_rms=0.0, prompt=None)
    assert ours.logprob_rms == pytest.approx(theirs.logprob_rms)
    # The three that fail have none, and the one whose loss is furthest off is worst in nothing else.
    assert (ours.rows, ours.tokens, theirs.prompt) == (12, 1 + 3 + 4 + 6 + 8 + 9, "prompt 8")
    assert "prompt 8" not in [prompt.name for prompt in report.run.prompts]
    assert report.run.logits == whole.run.logits and report.run.logits is not None and report.run.logits.steps == 9


def test_an_infinite_loss_is_infinite_in_a_summary_too(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", SIZES[:1])
    (path,) = Folder(tmp_path / "runs").records()
    run = load(path)
    lost = run.passes[1].model_copy(update={"upcast": [an_upcast(bad=1, loss_in_dtype=math.inf)]})
    summary = summary_of(judge(run.model_copy(update={"passes": [run.passes[0], lost]})), b"", (0, 1))
    again = Summary.model_validate_json(summary.model_dump_json())
    assert again.bought["fp16"].loss_error == math.inf and again == summary


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


# -- names, plans that were given up, weights that were replaced ---------------------------------------------------


def begun(out: Path, name: str, when: int) -> None:
    """Give the plan that is not dated yet a date, long ago."""
    (path,) = [each for each in out.glob("plan-*.json") if each.stat().st_mtime > 1e6]
    os.utime(path, (when, when))
    path.rename(out / f"plan-{name}.json")


def test_the_same_weights_under_another_name_are_one_report_that_tells_both(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, sources=("./models/a",), weights="w")
    made_up(out, SIZES, sources=("models/a/",), weights="w", skip={0, 1, 2, 3, 4})
    made_up(out, SIZES, sources=("copy",), weights="w", skip={0, 1, 2, 3, 4})
    (report,) = reports(Folder(out))
    assert report.stopped is None and report.corpus is not None and report.name == "a"
    assert report.corpus.sources == ("./models/a", "copy") and report.corpus.prompts == len(SIZES)


def test_a_plan_that_never_met_its_checkpoint_is_of_the_one_that_is_spelled_alike(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    plan = made_up(out, SIZES, sources=("./a",), skip={0, 1, 2, 3, 4})
    (met,) = out.glob("weights-*.json")
    met.unlink()
    made_up(out, SIZES, sources=("a/",))
    (report,) = reports(Folder(out))
    assert report.stopped is None and plan.sources == ["./a"]


def test_a_corrected_prompt_leaves_nothing_missing_where_the_old_one_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, texts={4: "typo"})
    begun(out, "old", 1000)
    made_up(out, SIZES)
    (report,) = reports(Folder(out))
    assert report.stopped is None and report.corpus is not None
    assert (report.corpus.prompts, report.corpus.asked) == (10, 10)


def test_what_only_an_older_plan_asks_for_is_named_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, texts={4: "typo"}, skip={0, 1, 2, 3, 4})
    begun(out, "old", 1000)
    made_up(out, SIZES)
    (report,) = reports(Folder(out))
    assert report.stopped == "not seen: 1 of 10 prompts (prompt 5 of plan-old.json)"
    assert report.corpus is not None and report.corpus.do == (
        "plan-old.json (begun 1970-01-01 00:16 UTC; of 9 prompts in other blocks) asks for it and no newer plan does: "
        "give its command again, or remove that file.",
    )
    (out / "plan-old.json").unlink()
    (report,) = reports(Folder(out))
    assert report.stopped is None


@pytest.mark.parametrize(
    ("skip", "stopped"), [(set(), None), ({0}, "not seen: 2 of 9 prompts (prompts 1 to 2)")], ids=["none", "one block"]
)
def test_of_an_old_plan_with_blocks_of_another_size_only_what_is_not_there_is_missing_and_once(
    skip: set[int], stopped: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, block=3, skip={0, 1, 2})
    begun(out, "old", 1000)
    made_up(out, SIZES, block=2, skip=skip)
    (report,) = reports(Folder(out))
    assert report.stopped == stopped


def test_the_newest_plan_asks_only_for_prompts_that_no_record_holds(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, block=2)
    begun(out, "old", 1000)
    made_up(out, [*SIZES, 100.0], block=5, skip={0, 1})
    (report,) = reports(Folder(out))
    assert report.stopped == "not seen: 1 of 10 prompts (prompt 10)"
    assert report.corpus is not None and "given again, measures what is missing and no more" in report.corpus.do[0]


def test_a_plan_of_another_version_or_with_other_settings_is_a_report_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, dtypes=["bf16"], skip={0, 1, 2, 3, 4})
    begun(out, "old", 1000)
    made_up(out, SIZES)
    old, new = reports(Folder(out))
    assert (old.name, new.name, new.stopped) == ("a (dtypes bf16)", "a (dtypes fp16)", None)
    assert old.stopped == "not seen: 9 of 9 prompts (prompts 1 to 9 of plan-old.json)"
    assert old.corpus is not None and "dtypes bf16) asks for it and no newer plan does" in old.corpus.do[0]


def test_weights_that_were_replaced_are_left_out_and_that_is_told(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES, weights="before")
    os.utime(next(out.glob("weights-*.json")), (1000, 1000))
    made_up(out, [100.0] * 9, weights="now")
    (report,) = reports(Folder(out))
    assert report.verdict == {"fp16": "ok"} and report.corpus is not None
    assert (report.corpus.prompts, report.corpus.replaced) == (9, 9)


def test_a_share_that_never_began_is_told_by_the_option_that_measures_it(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    plan = made_up(out, SIZES, sources=("a", "b"), share=(0, 2))
    for block in plan.blocks:
        Folder(out).record(plan.key("weights of b", block)).unlink()
    seen, unseen = reports(Folder(out))
    assert seen.stopped is None and unseen.stopped == "not seen: 9 of 9 prompts (prompts 1 to 9, --shard 2/2)"


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (("./x/A", "../y/B"), ["A", "B"]),
        (("/m/one/A", "/m/two/A"), ["one/A", "two/A"]),
        (("./z", "./a"), ["z", "a"]),
        (("Qwen/Qwen3-8B", "./mine/Qwen3-8B/"), ["Qwen/Qwen3-8B", "Qwen3-8B"]),
    ],
)
def test_checkpoints_are_called_as_short_as_tells_them_apart_in_the_order_given(
    sources: tuple[str, ...], names: list[str], tmp_path: Path
) -> None:
    made_up(tmp_path / "runs", SIZES[:2], sources=sources)
    assert [report.name for report in reports(Folder(tmp_path / "runs"))] == names


def test_a_row_more_leaves_records_and_their_prompts_are_called_as_the_new_corpus_counts(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    made_up(out, SIZES[1:], texts={n: f"text {n + 1}" for n in range(8)})
    begun(out, "old", 1000)
    made_up(out, SIZES, skip={1, 2, 3, 4})
    (report,) = reports(Folder(out))
    assert report.stopped is None and report.corpus is not None and report.corpus.prompts == 9
    assert report.corpus.across[0].fail == ("prompt 2", "prompt 5", "prompt 7")
    assert [name for name, _ in report.corpus.across[0].worst[:3]] == ["prompt 5", "prompt 2", "prompt 7"]
    assert report.findings[0].place.prompt == "prompt 5"


def test_every_prompt_that_fails_is_told_by_name_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    report = merged(tmp_path, [70_000.0] * 40, block=7)
    assert report.corpus is not None
    assert report.corpus.across[0].fail == tuple(f"prompt {n}" for n in range(1, 41))


@pytest.mark.parametrize(("fail_on", "failures"), [("fail", 40), ("never", 0)])
def test_every_prompt_that_fails_fails_a_case_of_junit_opened_or_not(
    fail_on: str, failures: int, tmp_path: Path
) -> None:
    report = merged(tmp_path, [70_000.0 + n for n in range(40)], block=7)
    assert len(report.run.prompts) < 40
    root = ElementTree.fromstring(str(FORMATS["junit"].render(View((report,), fail_on))))
    assert root.get("failures") == str(failures)
    named = [f" {each.get('name')}" for each in (*root, *root.iter("testcase"))]
    assert all(any(name.endswith(f" prompt {n}") for name in named) for n in range(1, 41))


def test_a_prompt_that_the_checkpoint_does_not_take_is_not_seen_and_says_why(tmp_path: Path) -> None:
    report = merged(tmp_path, SIZES, unfit={3: "holds the token id 999"})
    assert report.stopped == "not seen: 1 of 9 prompts (prompt 4 (holds the token id 999))"
    assert report.corpus is not None and report.corpus.prompts == 8
    assert report.corpus.do[0].startswith("Correct these rows or take them out, give the command, and remove plan-")
