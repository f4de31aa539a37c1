"""`qprec probe … -o FOLDER`: many checkpoints and prompts, shared by ranks, merged by `qprec report FOLDER`."""

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qwen_precision.blocks import Folder
from qwen_precision.cli import main
from qwen_precision.diagnose import share as sharing
from qwen_precision.probe import prepared
from qwen_precision.record.file import load
from qwen_precision.render import FORMATS
from qwen_precision.report.view import BUNDLE
from support.folders import TEXTS, all_readings, made_up, measured, readings, records, write_texts
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
        shown = capsys.readouterr().out
        assert "text 1" not in shown
        if name == "json":  # the names that prompts have in summaries may be texts, too
            assert json.loads(shown)["logits"]["upcast"]["fp16"]["prompt"] is None


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
    monkeypatch.setenv("COLUMNS", "300")
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


# -- what a user types differently the second time -----------------------------------------------------------------


def test_another_spelling_of_the_path_measures_nothing_again_and_misses_nothing(
    corpus: str, demo_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "link").symlink_to(demo_folder)
    assert measured(tmp_path / "runs", str(demo_folder), *FP16, "--prompts", corpus) == 1
    before = set(Folder(tmp_path / "runs").records())
    assert measured(tmp_path / "runs", "link/", *FP16, "--prompts", corpus) == 1
    assert set(Folder(tmp_path / "runs").records()) == before
    capsys.readouterr()
    assert main(["report", "runs", "-f", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["stopped"] is None and found["corpus"]["sources"] == [str(demo_folder), "link/"]
    assert main(["report", "runs"]) == 1
    assert "the same weights as link/" in capsys.readouterr().out


def test_one_folder_under_two_names_is_there_twice(demo_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "link").symlink_to(demo_folder)
    assert main(["probe", str(demo_folder), "./link", "-o", "runs/"]) == 2
    assert f"./link is there twice ({demo_folder} is the same)" in sentence(capsys)


def test_a_row_more_costs_its_own_measurement_and_no_other(tmp_path: Path) -> None:
    write_texts(tmp_path)
    words = ("demo", *FP16, "--prompts", "corpus.txt", "--fail-on", "never")
    assert measured(tmp_path / "runs", *words) == 0
    write_texts(tmp_path, ["one more", *TEXTS])
    assert measured(tmp_path / "runs", *words) == 0
    (fresh,) = [run for run in records(tmp_path / "runs") if any(row.text == "one more" for row in run.prompts[0].rows)]
    assert len(records(tmp_path / "runs")) == 4 and len(fresh.prompts) == 1
    assert measured(tmp_path / "runs", *words) == 0 and len(records(tmp_path / "runs")) == 4


def test_a_row_that_the_checkpoint_does_not_take_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: Capture
) -> None:
    rows = ['"Hello"', "", '{"ids": [5, 99999]}', '"import os"']
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    assert main(["probe", "demo", *FP16, "--prompts", "corpus.jsonl", "-o", "runs/", "--fail-on", "never"]) == 3
    said = capsys.readouterr()
    assert "corpus.jsonl, line 3: prompt 2 is left out, it holds the token id 99999" in said.err
    assert "Not seen 1 of 3 prompts (prompt 2 (holds the token id 99999" in " ".join(said.out.split())
    assert [prompt.name for run in records(tmp_path / "runs") for prompt in run.prompts] == ["prompt 1", "prompt 3"]


def test_a_row_that_is_none_stops_everything_before_it_begins(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "corpus.jsonl").write_text('"Hello"\n\n{"txt": "a"}\n')
    assert main(["probe", "demo", *FP16, "--prompts", "corpus.jsonl", "-o", "runs/"]) == 2
    assert "corpus.jsonl, line 3 txt: is no key of a prompt" in sentence(capsys)
    assert not (tmp_path / "runs").exists()


# -- how a folder is shown -----------------------------------------------------------------------------------------


def test_a_bundle_of_a_folder_says_what_the_folder_did(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0, 300.0, 400.0, 500.0], sources=("./x/a", "b"), skip={2})
    main(["report", "runs", "-f", BUNDLE, "-o", "out.zip"])
    shown = []
    for what in ("runs", "out.zip"):
        assert main(["report", what, "-f", "json", "--engine", "vllm"]) == 1
        found = json.loads(capsys.readouterr().out)
        for each in found["reports"]:
            each["corpus"]["sources"] = [source.rpartition("/")[2] for source in each["corpus"]["sources"]]
            each["model"] = {}
        shown.append(found)
    assert shown[0] == shown[1] and shown[0]["reports"][0]["corpus"]["prompts"] == 4


@pytest.mark.parametrize("data", ["{", "[]", '["a", {}]', "[[[1]]]"])
def test_a_bundle_whose_numbers_of_all_prompts_are_damaged_is_a_sentence(
    data: str, tmp_path: Path, capsys: Capture
) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0])
    main(["report", "runs", "-o", "out.zip"])
    with zipfile.ZipFile("out.zip") as old, zipfile.ZipFile("bad.zip", "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name == "merged.json" else old.read(name))
    capsys.readouterr()
    assert main(["report", "bad.zip"]) == 3
    assert "bad.zip:merged.json: is damaged" in sentence(capsys)


def test_ci_formats_tell_how_many_prompts_and_checkpoints_fail_and_what_is_missing(
    tmp_path: Path, capsys: Capture
) -> None:
    made_up(tmp_path / "runs", [100.0, 70_000.0, 300.0, 400.0, 500.0], sources=("a", "b"), skip={2})
    assert main(["report", "runs", "-f", "github"]) == 1
    shown = capsys.readouterr().out
    assert "::notice title=qprec::2 checkpoints; fp16: 2 FAIL\n" in shown
    assert "::notice title=qprec a::fp16: 1 of 4 prompts fail\n" in shown
    assert "not seen: 1 of 5 prompts (prompt 5). The command that began plan-" in shown
    assert main(["report", "runs", "-f", "junit"]) == 1
    root = ElementTree.fromstring(capsys.readouterr().out)
    told = {each.get("name"): each.get("value") for each in root.findall("testsuite[@name='a run']//property")}
    assert (told["prompts"], told["prompts.failing.fp16"], told["blocks.missing"]) == ("4", "1", "1")
    assert "2 FAIL" in "".join(root.find("testsuite[@name='checkpoints']").itertext())  # type: ignore[union-attr]


def test_every_prompt_that_fails_is_in_the_json(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "runs", [70_000.0] * 30)
    assert main(["report", "runs", "-f", "json"]) == 1
    told = json.loads(capsys.readouterr().out)["corpus"]["dtypes"]["fp16"]
    assert told["failing_prompts"] == [f"prompt {n}" for n in range(1, 31)]


# -- against a baseline --------------------------------------------------------------------------------------------


def test_a_baseline_is_found_whatever_the_spelling_of_the_path(tmp_path: Path, capsys: Capture) -> None:
    made_up(tmp_path / "old", [100.0, 70_000.0], sources=("./x/a/",))
    made_up(tmp_path / "new", [100.0, 70_000.0], sources=("x/a",))
    for shown in ("table", "screen"):
        assert main(["report", "new", "--baseline", "old", "-f", shown]) == 0
        out = capsys.readouterr().out
        assert "0 new findings, 0 fixed" in out and "is in the baseline and not here" not in out
        assert out.index("0 new findings") < out.index("residual add after mlp")


def test_checkpoints_with_several_settings_are_compared_setting_by_setting(tmp_path: Path, capsys: Capture) -> None:
    for folder in ("old", "new"):
        for dtype in ("fp16", "bf16"):
            made_up(tmp_path / folder, [100.0, 70_000.0], dtypes=[dtype])
    assert main(["report", "new", "--baseline", "old"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("0 new findings, 0 fixed, 0 changed") == 2
    made_up(tmp_path / "other", [100.0, 70_000.0], dtypes=["fp16", "bf16"])
    assert main(["report", "other", "--baseline", "old"]) == 2
    assert "--baseline old: holds a (dtypes" in sentence(capsys)


def test_two_folders_are_told_apart_by_their_names(tmp_path: Path, capsys: Capture) -> None:
    for folder in ("old", "new"):
        made_up(tmp_path / folder, [100.0, 200.0])
    assert main(["report", "old", "new"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [["old:", "a"], ["new:", "a"]]
