"""Processes that write into one folder: whole files, claims that die with who holds them, nothing redone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qwen_precision.blocks import Folder, Told, for_block, reports
from qwen_precision.blocks import folder as blocks_folder
from qwen_precision.blocks.plan import Plan
from qwen_precision.blocks.summary import Summary, read_summary
from qwen_precision.cli import main
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.record.file import load
from support.builders import healthy_run
from support.folders import made_up

HOLD = """
import sys, time
from pathlib import Path
from qwen_precision.blocks import Folder
with Folder(Path(sys.argv[1])).claim("a block") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)


def test_a_block_that_another_process_holds_is_not_taken_until_that_process_is_gone(tmp_path: Path) -> None:
    child = holder(tmp_path)
    assert child.stdout is not None and child.stdout.readline() == "True\n"
    folder = Folder(tmp_path)
    with folder.claim("a block") as mine:
        assert not mine
    with folder.claim("another block") as mine:
        assert mine
    child.send_signal(signal.SIGKILL)
    child.wait()
    with folder.claim("a block") as mine:
        assert mine
    with folder.claim("a block") as again:
        assert again


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.lockf", refused)
    with Folder(tmp_path).claim("a block") as mine:
        assert mine


def one(tmp_path: Path) -> tuple[Folder, str]:
    """A folder of one record, and its key."""
    plan = made_up(tmp_path / "runs", [10.0, 20.0])
    return Folder(tmp_path / "runs"), plan.key("weights of a", plan.blocks[0])


def test_a_record_that_is_there_is_done(tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    assert folder.is_done(key, (0, 1)) and not folder.is_done("0" * 24, (0, 1))


def test_a_record_without_its_summary_is_done_and_gets_one(tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    before = folder.record(key).with_suffix(".summary").read_text()
    folder.record(key).with_suffix(".summary").unlink()
    assert folder.is_done(key, (0, 1)) and folder.record(key).with_suffix(".summary").read_text() == before


@pytest.mark.parametrize("data", [b"", b"{", b'{"schema": 4}'])
def test_a_record_that_cannot_be_read_is_not_done(data: bytes, tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    folder.record(key).write_bytes(data)
    assert not folder.is_done(key, (0, 1))


def test_a_summary_of_another_record_or_of_another_version_is_not_believed(tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    path = folder.record(key)
    summary = path.with_suffix(".summary")
    assert read_summary(path) is not None
    text = path.read_text()
    path.write_text(text.replace("2026-01-01", "2026-01-02"))  # as long as before
    assert read_summary(path) is None
    path.write_text(text)
    for old, new in (('"version":"', '"version":"9'), ('"prompts":[', '"prompts":[1,'), ('"size":', '"size":1')):
        summary.write_text((told := summary.read_text()).replace(old, new, 1))
        assert read_summary(path) is None
        summary.write_text(told)
    assert read_summary(path) is not None


def test_a_report_of_records_without_summaries_is_the_same(tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    (before,) = reports(folder)
    folder.record(key).with_suffix(".summary").unlink()
    (after,) = reports(folder)
    assert (before.verdict, before.findings, before.corpus) == (after.verdict, after.findings, after.corpus)


def test_the_same_plan_from_every_rank_is_one_file(tmp_path: Path) -> None:
    plan = made_up(tmp_path / "runs", [10.0, 20.0])
    Folder(tmp_path / "runs").keep(plan)
    ((kept,), damaged) = Folder(tmp_path / "runs").plans()
    assert kept.plan == plan and not damaged


def test_what_is_no_plan_and_no_record_is_left_alone(tmp_path: Path) -> None:
    folder, _ = one(tmp_path)
    (folder.path / "notes.json").write_text("[]")
    shutil.copy(folder.records()[0], folder.path / "copy.json")
    plain = folder.path / "run.json"
    plain.write_text((Path(__file__).parent.parent / "fixtures" / "demo-probe.json").read_text())
    (report,) = reports(folder)
    assert report.corpus is not None and report.corpus.prompts == 2 and report.verdict == {"fp16": "ok"}


@pytest.mark.parametrize("data", [b"{", b"", b"[]", b'{"plan": 9}'])
def test_a_plan_that_cannot_be_read_is_named_and_is_no_pass(data: bytes, tmp_path: Path) -> None:
    folder, _ = one(tmp_path)
    (folder.path / "plan-x.json").write_bytes(data)
    (report,) = reports(folder)
    assert report.stopped == "not seen: 1 damaged file (what is in plan-x.json)"
    assert report.verdict == {"fp16": "incomplete"} and report.exit_code("fail") == 3
    assert report.corpus is not None and "plan-x.json cannot be read as a plan" in report.corpus.do[0]


def test_a_damaged_record_is_named_where_its_block_is_asked_for(tmp_path: Path) -> None:
    plan = made_up(tmp_path / "runs", [10.0, 20.0, 30.0], sources=("a", "b"))
    folder = Folder(tmp_path / "runs")
    folder.record(key := plan.key("weights of a", plan.blocks[1])).write_text("{")
    mine, other = reports(folder)
    assert mine.stopped == "not seen: 1 of 3 prompts (prompt 3)" and other.stopped is None
    assert mine.corpus is not None and mine.corpus.do[1].startswith(f"{key}.json is not JSON: give its command again")


def test_a_damaged_record_that_nobody_asks_for_is_named_too(tmp_path: Path) -> None:
    folder, _ = one(tmp_path)
    (folder.path / f"{'0' * 24}.json").write_text("{")
    (report,) = reports(folder)
    assert report.stopped == f"not seen: 1 damaged file (what is in {'0' * 24}.json)"


def test_a_folder_of_nothing_but_a_damaged_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / "plan-x.json").write_text("{")
    with pytest.raises(QprecError, match=r"holds nothing that can be read: plan-x.json"):
        reports(Folder(tmp_path))


def test_what_a_name_stands_for_is_what_was_met_last(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for when, weights in ((10, "new"), (20, "old"), (30, "new")):
        folder.remember("a", None, weights)
        newest = max(tmp_path.glob("weights-*.json"), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (when, when))
        assert folder.known() == {("a", None): weights}
    assert len(list(tmp_path.iterdir())) == 2 and folder.records() == []


def test_a_folder_that_cannot_be_made_or_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Folder(tmp_path / "file").prepare()
    with pytest.raises(QprecError, match="cannot be made"):
        Folder(tmp_path / "file" / "runs").prepare()


def test_a_folder_that_vanishes_and_a_full_disk_are_sentences_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = one(tmp_path)
    run = load(folder.record(key))
    ((kept,), _) = folder.plans()
    other = healthy_run(settings=run.settings)
    told = {prompt.name: Told("0" * 12, True) for prompt in other.prompts}
    report = judge(for_block(other, "other", kept.plan, kept.plan.blocks[0], told))

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(QprecError, match="No space left"):
            folder.save("f" * 24, report, (0, 1))
    assert not [name for name in os.listdir(folder.path) if name.startswith(("f" * 24, ".qprec-partial"))]
    shutil.rmtree(folder.path)
    with pytest.raises(QprecError, match="does not exist"):
        folder.save("f" * 24, report, (0, 1))
    with pytest.raises(QprecError, match="cannot be read"):
        reports(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rows":{"fp16"', '"rows":{"fp99"'),
        ('"share":[0,1]', '"share":[1,1]'),
        ('"share":[0,1]', '"share":[0,9999999999]'),
        ('"standing":[["', '"standing":[["x",0.0,99],["'),
        ('"names":["', '"names":["x","'),
        ('"agree":', '"agree":"x"'),
        ('"bought":{"fp16"', '"bought":{"fp99"'),
        ('"tokens":', '"tokens":-'),
    ],
)
def test_a_summary_of_a_stranger_that_fits_nothing_is_left_alone(old: str, new: str, tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    path = folder.record(key).with_suffix(".summary")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert read_summary(folder.record(key)) is None
    (report,) = reports(folder)
    assert report.corpus is not None and report.corpus.prompts == 2


@pytest.mark.parametrize("settings", [{}, {"dtypes": 5}, {"dtypes": ["fp99"]}])
def test_a_plan_of_a_stranger_is_shown_as_far_as_it_makes_sense(settings: dict[str, object], tmp_path: Path) -> None:
    plan = made_up(tmp_path / "runs", [10.0, 20.0])
    Folder(tmp_path / "runs").keep(plan.model_copy(update={"sources": ["\x1b[2J"], "settings": settings}))
    assert sorted(len(report.verdict) for report in reports(Folder(tmp_path / "runs"))) == [0, 1]
    assert main(["report", str(tmp_path / "runs"), "-q"]) in (0, 3)


def test_a_plan_of_ten_thousand_blocks_and_a_million_prompts_is_read(tmp_path: Path) -> None:
    plan = made_up(tmp_path / "runs", [10.0, 20.0])
    block = plan.blocks[0].model_copy(update={"count": 100, "hashes": "0123456789ab" * 100})
    blocks = [block.model_copy(update={"first": number, "digest": "f" * 64}) for number in range(10_000)]
    large = plan.model_copy(update={"blocks": blocks, "prompts": 1_000_000})
    folder = Folder(tmp_path / "runs")
    folder.keep(large)
    assert large in [kept.plan for kept in folder.plans()[0]]


def test_a_plan_or_summary_of_more_values_than_one_can_have_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object) -> None:
        pytest.fail("was made before it was counted")

    folder, key = one(tmp_path)
    summary, (plan,) = folder.record(key).with_suffix(".summary"), folder.path.glob("plan-*.json")
    for path in (summary, plan):
        path.write_text(path.read_text().rstrip()[:-1] + ',"x":[' + "{}," * 600_000 + "{}]}")
    monkeypatch.setattr(Summary, "model_validate_json", made)
    monkeypatch.setattr(Plan, "model_validate_json", made)
    kept, (damage,) = folder.plans()
    assert not kept and "values" in damage.said and read_summary(folder.record(key)) is None


def test_of_a_thousand_things_that_are_wrong_in_a_list_the_first_is_told(tmp_path: Path) -> None:
    folder, key = one(tmp_path)
    summary, (plan,) = folder.record(key).with_suffix(".summary"), folder.path.glob("plan-*.json")
    for kind, path, keys in ((Plan, plan, ["blocks"]), (Summary, summary, ["names", "prompts", "standing"])):
        for name in keys:
            data = {**json.loads(path.read_text()), name: [{}] * 1000}
            with pytest.raises(ValidationError) as caught:
                kind.model_validate_json(json.dumps(data))
            assert {each["loc"][:2] for each in caught.value.errors()} == {(name, 0)}


def test_the_records_of_a_folder_are_read_once_for_all_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(tmp_path, [100.0] * 6, sources=("a", "b"))
    plan = made_up(tmp_path / "other", [100.0] * 6, block=3, sources=("a", "b"))
    read: list[Path] = []
    monkeypatch.setattr(blocks_folder, "read_summary", lambda path: read.append(path) or read_summary(path))
    folder = Folder(tmp_path)
    found = [folder.seen(plan, f"weights of {source}") for source in ("a", "b", "c")]
    assert [len(each) for each in found] == [6, 6, 0] and len(read) == len(set(read)) == 6
