"""`qprec probe … -o FOLDER`: many checkpoints and prompts, shared by ranks, merged by `qprec report FOLDER`."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.blocks import Folder
from qwen_precision.cli import main
from qwen_precision.diagnose import share as sharing
from qwen_precision.probe import prepared
from qwen_precision.record.file import load
from qwen_precision.render import FORMATS
from qwen_precision.report.view import BUNDLE
from support.folders import all_readings, made_up, measured, readings, records, write_texts
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
FP16 = ("--dtype", "fp16", "--no-explain", "--block", "2")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return str(write_texts(tmp_path))


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("shape", ["demo_folder", "healthy_moe"])
def test_shares_together_are_what_one_process_measures_reading_for_reading(
    shape: str, memory: str, corpus: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(shape))
    words = (model, *FP16, "--prompts", corpus, "--memory", memory)
    for number in (1, 2, 3):
        assert measured(tmp_path / "runs", *words, "--shard", f"{number}/3") == 0
    assert len(records(tmp_path / "runs")) == 3
    plain = [word for word in words if word not in ("--block", "2")]
    main(["probe", *plain, "-o", "one.json", "-q"])
    assert all_readings(tmp_path / "runs") == readings(load(Path("one.json")))


def test_a_share_ends_with_0_whatever_was_found_and_the_merged_report_with_the_verdict(
    corpus: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "runs"
    assert measured(out, "demo", *FP16, "--prompts", corpus, "--shard", "1/2") == 0
    assert main(["report", str(out), "-f", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == {"fp16": "fail"} and found["corpus"]["not_seen"] == ["prompts 3 to 6, --shard 2/2"]
    assert measured(out, "demo", *FP16, "--prompts", corpus, "--shard", "2/2") == 0
    assert main(["report", str(out), "-f", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["corpus"]["missing_blocks"] == 0 and found["stopped"] is None
    assert measured(out, "demo", *FP16, "--prompts", corpus) == 1  # alone it has the verdict


def test_what_is_there_is_not_measured_again_unless_it_is_forced(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("demo", *FP16, "--prompts", corpus, "--fail-on", "never")
    out, count = tmp_path / "runs", []

    def counted(*arguments: Any) -> Any:
        count.append(arguments)
        return prepared(*arguments)

    monkeypatch.setattr(sharing, "prepared", counted)
    assert measured(out, *words) == 0 and len(count) == 3
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert measured(out, *words) == 0 and len(count) == 3
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    Folder(out).records()[0].unlink()
    assert measured(out, *words) == 0 and len(count) == 4
    assert measured(out, *words, "--force") == 0 and len(count) == 7


def test_an_interrupt_costs_the_block_it_meets_and_the_same_command_goes_on(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ("demo", *FP16, "--prompts", corpus, "--fail-on", "never")
    count = []

    def interrupted(*arguments: Any) -> Any:
        count.append(arguments)
        if len(count) == 2:
            raise KeyboardInterrupt
        return prepared(*arguments)

    monkeypatch.setattr(sharing, "prepared", interrupted)
    assert measured(tmp_path / "runs", *words) == 3
    assert len(records(tmp_path / "runs")) == 1 and "interrupted" in capsys.readouterr().err
    assert measured(tmp_path / "runs", *words) == 0
    assert len(count) == 4 and len(records(tmp_path / "runs")) == 3


def test_prompts_that_are_too_many_for_the_memory_are_measured_in_halves(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sharing.measure
    words = ("demo", "--dtype", "fp16", "--no-explain", "--prompts", corpus, "--fail-on", "never")

    def small(job: Any, progress: Any) -> Any:
        run = plain(job, progress)
        return run if len(job.prompts) <= 2 else run.model_copy(update={"stopped": "out of memory on cpu"})

    monkeypatch.setattr(sharing, "measure", small)
    assert measured(tmp_path / "halves", *words) == 0
    monkeypatch.undo()
    assert measured(tmp_path / "whole", *words) == 0
    assert len(records(tmp_path / "halves")) == 1
    assert all_readings(tmp_path / "halves") == all_readings(tmp_path / "whole")


def test_checkpoints_stand_side_by_side_and_one_that_cannot_be_opened_stops_no_other(
    corpus: str, healthy: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    words = ("demo", "./broken", str(healthy), *FP16, "--prompts", corpus)
    assert main(["probe", *words, "-o", "runs/"]) == 1
    said = capsys.readouterr()
    assert said.err.count("config.json") == 1 and "6 blocks measured" in said.err
    head, demo, broken, fine = said.out.splitlines()[:4]
    assert "least room" in head and broken.startswith("broken ") and "INCOMPLETE" in broken
    assert "FAIL" in demo and "5 of 6" in demo and "OK" in fine and "0 of 6" in fine


@pytest.mark.parametrize("typo", ["./nothing", "./empty"])
def test_a_checkpoint_that_is_not_there_is_a_sentence_and_leaves_no_plan(
    typo: str, corpus: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["probe", "demo", typo, "--prompts", corpus, "-o", "runs/", "-q"]) == 3
    assert f"{typo}: " in sentence(capsys) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if not row.binary])
def test_every_format_shows_a_folder(name: str, tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0, 300.0, 400.0, 500.0], skip={2})
    assert main(["report", "runs", "-f", name]) == 1
    shown = capsys.readouterr().out
    if name not in ("svg", "repro"):
        assert ("residual add after mlp" in shown and "1 of 4" in shown) or name in ("junit", "github", "json")
    if name not in ("svg", "repro", "screen"):
        assert "prompt 5" in shown
    if name == "screen":
        assert "Not seen" in shown


def test_a_bundle_of_a_folder_reads_back(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0], sources=("a", "b"))
    assert main(["report", "runs", "-f", BUNDLE, "-o", "out.zip"]) == 1
    assert main(["report", "out.zip", "-f", "json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["reports"]) == 2


def test_redacted_a_folder_shows_no_prompt(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0])
    for name in ("table", "json", "html"):
        assert main(["report", "runs", "--redact", "-f", name]) == 1
        assert "text 1" not in capsys.readouterr().out


def test_a_folder_is_compared_with_an_older_one_checkpoint_by_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "old", [100.0, 70_000.0], sources=("a", "gone"))
    made_up(tmp_path / "same", [100.0, 71_000.0], sources=("a",))
    made_up(tmp_path / "new", [100.0, 70_000.0, 300.0], sources=("a", "b"))
    assert main(["report", "same", "--baseline", "old"]) == 0
    assert "gone: is in the baseline and not here" in capsys.readouterr().out
    assert main(["report", "new", "--baseline", "old", "-f", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [len(each["changes"]["new"]) for each in found["reports"]] == [0, 1] and found["gone"] == ["gone"]
    for name in ("table", "markdown", "html", "junit", "github"):
        assert main(["report", "new", "--baseline", "old", "-f", name]) == 1
        assert "b" in capsys.readouterr().out


def test_what_a_command_would_do_is_told_before_anything_is_done(
    corpus: str, healthy: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_precision.model.weights.read_tensor", None)  # no weight is read
    words = ["probe", "demo", str(healthy), "--prompts", corpus, "--block", "2", "-o", "runs/", "--dry-run"]
    assert main([*words, "--shard", "2/3"]) == 0
    shown = capsys.readouterr().out
    assert "6 in 3 blocks" in shown and "2 of 6 blocks; first demo, prompts 5 to 6" in shown
    assert "demo: 2 prompts in 1 block\n" in shown and f"{healthy}: 2 prompts in 1 block\n" in shown
    assert shown.count("  memory") == shown.count("  time") == shown.count("  download") == 2
    assert not (tmp_path / "runs").exists()
    assert main([*words[:2], "./nothing", *words[3:]]) == 3
    assert "./nothing: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["a", "b"], "MODEL: 2 were given"),
        (["a", "--shard", "1/2"], "--shard: is for records in a folder"),
        (["a", "--jobs", "2"], "--jobs: is for records in a folder"),
        (["a", "a", "-o", "runs/"], "a is there twice"),
        (["a", "-o", "runs/", "--rescue-to", "x"], "--rescue-to: is for one checkpoint"),
        (["a", "-o", "runs/", "--shard", "3/2"], "--shard 3/2"),
        (["a", "-o", "runs/", "--jobs", "many"], "--jobs many"),
        (["a", "-o", "runs/", "--shard", "1/2", "--prompts", "-"], "only one of several ranks"),
        (["a", "-o", "runs/", "--sweep", "length"], "--sweep length"),
        (["a", "-o", "runs/", "-f", "png"], "--format png"),
        (["a", "-o", "runs/", "--full", "-f", "json"], "--full and --format"),
        (["a", "-o", "corpus.txt/"], "is a file"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(words: list[str], word: str, corpus: str, capsys: Capture) -> None:
    assert main(["probe", *words]) == 2
    assert word in sentence(capsys)


def test_ranks_that_would_write_one_file_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["probe", "demo"]) == 2
    assert "2 ranks would write one file" in sentence(capsys)


def test_a_sweep_in_parts_is_the_sweep_of_one_process(tmp_path: Path, capsys: Capture) -> None:
    words = (
        "demo",
        "--dtype",
        "fp16",
        "--no-explain",
        "--prompt",
        "Hello",
        "--sweep",
        "first-token",
        "--sweep-limit",
        "64",
    )
    for number in (1, 2):
        assert measured(tmp_path / "runs", *words, "--shard", f"{number}/2") == 0
    assert main(["report", "runs", "-f", "json"]) == 1
    ours = json.loads(capsys.readouterr().out)["sweep"]
    main(["probe", *words, "-o", "one.json", "-q"])
    theirs = load(Path("one.json")).sweep
    assert theirs is not None and len(records(tmp_path / "runs")) == 5
    assert (ours["tried"], ours["total"], ours["over"]) == (theirs.tried, theirs.total, theirs.over)
    told = [(each["ids"], each["magnitude"], each["name"], each["channel"]) for each in ours["worst"]]
    assert told == [(each.ids, each.magnitude, each.name, each.channel) for each in theirs.worst]
