"""`qprec report` through `main`: formats by suffix, baselines, bundles from strangers, one sentence a mistake."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_precision.cli.app import main
from qwen_precision.errors import QprecError
from qwen_precision.judge.checks import judge
from qwen_precision.judge.engines import with_engines
from qwen_precision.record.file import load, parse, save, to_json
from qwen_precision.render import FORMATS, one
from qwen_precision.render.schema import report_schema
from qwen_precision.settings.config import configs_folder
from qwen_precision.settings.engines import ALL, load_engines
from support.builders import RUNS, a_model, exclamation_run, healthy_run, overflowing_run, stopped_run
from support.runs import sentence

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("scratch")


@pytest.fixture(autouse=True)
def saved(scratch: None) -> None:
    save(overflowing_run(), Path("bad.json"))
    save(healthy_run(), Path("good.json"))
    save(exclamation_run(), Path("gen.json"))


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.md", "# qprec probe"),
        ("a.html", "<!doctype html>"),
        ("a.xml", "<?xml"),
        ("a.json", "{"),
        ("a.svg", "<?xml"),
        ("a.txt", "qprec  Qwen"),
        ("a", "qprec  Qwen"),
        ("a.MD", "# qprec probe"),
    ],
)
def test_the_suffix_chooses_the_format(name: str, start: str, capsys: Capture) -> None:
    assert main(["report", "bad.json", "-o", name]) == 1
    assert Path(name).read_text(encoding="utf-8").startswith(start) and capsys.readouterr().out == ""


def test_a_picture_and_a_bundle_are_files_and_the_format_wins_over_the_suffix(capsys: Capture) -> None:
    assert main(["report", "bad.json", "-o", "a.png"]) == 1
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", "bad.json", "-o", "b.zip"]) == 1
    assert zipfile.is_zipfile("b.zip")
    assert main(["report", "bad.json", "-o", "c.log", "--format", "markdown"]) == 1
    assert Path("c.log").read_text().startswith("# qprec")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bad.json", "-o", "a.pdf"], 2, ["a.pdf", "'.pdf'", "--format"]),
        (["bad.json", "--format", "png"], 2, ["--format png", "-o"]),
        (["bad.json", "--format", "bundle"], 2, ["--format bundle", "-o"]),
        (["bad.json", "--format", "docx"], 2, ["docx", "markdown"]),
        (["bad.json", "good.json", "--baseline", "good.json"], 2, ["--baseline good.json", "one"]),
        (["gen.json", "--baseline", "good.json"], 2, ["--baseline good.json", "same command"]),
        (["bad.json", "--baseline", "missing.json"], 3, ["missing.json"]),
        (["bad.json", "missing.json"], 3, ["missing.json"]),
        (["bad.json", "-o", "good.json"], 2, ["good.json", "--force"]),
        (["bad.json", "-o", "bad.json", "--force"], 3, ["would write over"]),
        (["bad.json", "-o", "no/such/folder.md"], 3, ["no/such"]),
        (["bad.json", "--engine", "vlm"], 2, ["--engine", "'vlm'", "did you mean 'vllm'?"]),
        (["bad.json", "--engine", "none.yaml"], 2, ["--engine none.yaml", "cannot read"]),
    ],
)
def test_a_wrong_request_gets_one_sentence(arguments: list[str], code: int, words: list[str], capsys: Capture) -> None:
    before = Path("good.json").read_text()
    assert main(["report", *arguments]) == code
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert Path("good.json").read_text() == before


def test_an_existing_file_is_replaced_only_when_asked(capsys: Capture) -> None:
    Path("a.md").write_text("mine")
    assert main(["report", "bad.json", "-o", "a.md"]) == 2 and Path("a.md").read_text() == "mine"
    assert main(["report", "bad.json", "-o", "a.md", "--force"]) == 1 and "# qprec" in Path("a.md").read_text()


def test_the_exit_code_is_that_of_the_worst_run_or_of_what_is_new(capsys: Capture) -> None:
    assert main(["report", "good.json", "bad.json"]) == 1
    assert main(["report", "good.json", "good.json"]) == 0
    save(stopped_run(), Path("stopped.json"))
    assert main(["report", "stopped.json", "good.json"]) == 3
    assert main(["report", "stopped.json", "bad.json"]) == 1
    assert main(["report", "bad.json", "--baseline", "bad.json"]) == 0
    assert main(["report", "bad.json", "--baseline", "good.json"]) == 1
    assert "new: fp16 overflow, layer 31" in " ".join(capsys.readouterr().out.split())


def test_engines_are_told_of_every_run_and_change_no_exit_code(capsys: Capture) -> None:
    assert main(["report", "good.json", "bad.json", "--engine", "vllm", "--engine", "llama.cpp-f16"]) == 1
    out = capsys.readouterr().out
    assert out.count("\nvllm ") == 3 and out.count("\nllama.cpp-f16 ") == 2  # one of them is named with what avoids it
    assert main(["report", "good.json", "--engine", "all"]) == 0


def test_an_engine_of_ones_own_is_a_file(capsys: Capture) -> None:
    rule = {"values": ["outputs"], "because": "x", "source": "https://example.org", "version": "1"}
    Path("mine.yaml").write_text(yaml.safe_dump({"runs": "mine", "rules": [rule]}))
    assert main(["report", "bad.json", "--engine", "mine.yaml"]) == 1
    assert "\nmine    FAIL" in capsys.readouterr().out


def test_the_report_in_a_bundle_tells_the_engines_that_were_asked_about(capsys: Capture) -> None:
    assert main(["report", "bad.json", "-o", "b.zip", "--engine", "vllm"]) == 1
    with zipfile.ZipFile("b.zip") as archive:
        assert "| vllm | **FAIL**" in archive.read("report.md").decode()


def test_github_writes_annotations_and_the_job_summary(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    assert main(["report", "bad.json", "gen.json", "--format", "github"]) == 1
    assert capsys.readouterr().out.startswith("::error title=qprec Qwen/Qwen3-8B%2C fp16%3A overflow%2C layer 31")
    text = Path("summary.md").read_text()
    assert text.startswith("before\n# qprec probe") and "# qprec generate" in text


def test_a_job_summary_that_is_a_pipe_is_refused_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)  # so that a writer would not hang
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "pipe")
    assert main(["report", "bad.json", "--format", "github"]) == 3
    os.close(reader)
    assert "GITHUB_STEP_SUMMARY pipe: is no regular file" in capsys.readouterr().err


def test_a_terminal_of_impossible_width_is_taken_for_one_of_500_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shown = []
    for columns in ("9" * 23, "500"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["report", "bad.json"]) == 1
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_a_link_that_leads_to_itself_is_a_sentence_and_stays(capsys: Capture) -> None:
    Path("there").symlink_to("back")
    Path("back").symlink_to("there")
    assert main(["report", "bad.json", "-o", "there", "--force"]) == 3
    assert "-o there: is a link that leads back to itself" in sentence(capsys)
    assert Path("there").is_symlink() and Path("back").is_symlink()


@pytest.mark.parametrize("words", [[""], ["bad.json", "--baseline", ""]])
def test_an_empty_path_is_called_empty_and_not_the_working_folder(words: list[str], capsys: Capture) -> None:
    assert main(["report", *words]) == 2
    assert "is empty; give the name of a file or a folder" in sentence(capsys)


def test_a_name_that_is_too_long_is_said_with_what_to_do(capsys: Capture) -> None:
    assert main(["report", "bad.json", "-o", "a" * 300]) == 3
    assert sentence(capsys).endswith("cannot be written (File name too long); give a shorter name.")


def test_the_workflow_to_copy_uses_commands_that_exist(capsys: Capture) -> None:
    workflow = yaml.safe_load((configs_folder() / "ci" / "qprec.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["fp16"]["steps"] if "run" in step]
    commands = [line for step in steps for line in step.splitlines() if line.startswith("qprec ")]
    assert len(commands) == 5
    codes = [main([part.strip('"').replace("$MODEL", "demo") for part in line.split()[1:]]) for line in commands]
    assert codes == [0, 0, 0, 0, 1] and Path("qprec.zip").exists() and Path("qprec.xml").exists()


@pytest.mark.parametrize("path", sorted((configs_folder() / "ci").iterdir()), ids=lambda path: path.name)
def test_a_file_to_copy_installs_a_pinned_revision_and_says_what_to_fill_in(path: Path) -> None:
    text = path.read_text()
    installs = re.findall(r"pip install (.*)", text)
    assert set(installs) == {'"qprec @ git+https://github.com/OWNER/qprec@REVISION"'}
    comments = " ".join(line.strip(" #") for line in text.splitlines() if line.strip().startswith("#"))
    assert "OWNER" in comments and "REVISION" in comments


# -- the published schema ------------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_code(request: pytest.FixtureRequest) -> None:
    path, text = configs_folder() / "schema" / "report.json", json.dumps(report_schema(), indent=2) + "\n"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.read_text() == text, "run `make golden` and read the diff"


@pytest.mark.parametrize("name", RUNS)
def test_the_json_of_every_kind_of_run_fits_the_schema(name: str) -> None:
    import jsonschema

    jsonschema.validate(json.loads(str(FORMATS["json"].render(one(judge(RUNS[name]()))))), report_schema())


# -- bundles -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_back_with_the_same_table(capsys: Capture) -> None:
    main(["report", "bad.json"])
    table = capsys.readouterr().out
    main(["report", "bad.json", "-o", "b.zip"])
    capsys.readouterr()
    assert main(["report", "b.zip"]) == 1 and capsys.readouterr().out == table
    assert {info.date_time for info in zipfile.ZipFile("b.zip").infolist()} == {(1980, 1, 1, 0, 0, 0)}
    names = ["environment.json", "report.html", "report.md", "repro.py", "run.json"]
    assert sorted(zipfile.ZipFile("b.zip").namelist()) == names


def test_a_bundle_of_several_runs_holds_them_all(capsys: Capture) -> None:
    main(["report", "bad.json", "gen.json", "-o", "b.zip"])
    capsys.readouterr()
    assert main(["report", "b.zip"]) == 1
    out = capsys.readouterr().out
    assert "b.zip 1 (probe)" in out and "b.zip 2 (generate)" in out


def test_no_path_and_no_user_is_in_a_bundle_and_redacted_no_text_either(capsys: Capture) -> None:
    made = overflowing_run(model=a_model(source="/home/alice/m"), stopped="/home/alice/m/x.safetensors: broken")
    save(made, Path("alice.json"))
    main(["report", "alice.json", "gen.json", "-o", "b.zip", "--redact"])
    for name in zipfile.ZipFile("b.zip").namelist():
        text = zipfile.ZipFile("b.zip").read(name).decode()
        assert "/home/" not in text and "Hello" not in text and "general" not in text, name
    main(["report", "gen.json", "--redact"])
    out = capsys.readouterr().out
    assert "Hello" not in out and "degenerate-text" in out and "sha256" in out


def zipped(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        {"../run.json": b"{}"},
        {"/etc/passwd": b""},
        {"run.json": b"{}", "evil.sh": b""},
        {"report.md": b"x"},
        {"run.json": b"{"},
        {"run.json": b"\xff\xfe"},
        {"run.json/": b""},
        {},
    ],
    ids=str,
)
def test_a_zip_that_is_no_bundle_is_refused_and_nothing_is_unpacked(members: dict[str, bytes], capsys: Capture) -> None:
    Path("b.zip").write_bytes(zipped(members))
    before = sorted(Path().iterdir())
    assert main(["report", "b.zip"]) == 3
    assert "b.zip" in sentence(capsys) and sorted(Path().iterdir()) == before


def test_one_member_that_does_not_belong_spoils_a_good_bundle(capsys: Capture) -> None:
    good = Path("bad.json").read_bytes()
    for name in ("evil.sh", "../run-2.json", "run-2.json.exe", "a/run.json"):
        Path("b.zip").write_bytes(zipped({"run.json": good, name: b"x"}))
        assert main(["report", "b.zip"]) == 3 and name in sentence(capsys)
    Path("b.zip").write_bytes(zipped({"run.json": good}))
    assert main(["report", "b.zip"]) == 1


def test_a_bomb_is_refused_by_what_it_unpacks_to(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import qwen_precision.report.bundle as bundle

    monkeypatch.setattr(bundle, "MAX_BYTES", 2 * 1024 * 1024)
    Path("b.zip").write_bytes(zipped({"run.json": b" " * 50_000_000}))
    assert Path("b.zip").stat().st_size < 100_000
    assert main(["report", "b.zip"]) == 3 and "larger than 2 MiB" in sentence(capsys)


def test_a_member_that_is_damaged_inside_is_one_sentence(capsys: Capture) -> None:
    main(["report", "bad.json", "-o", "b.zip"])
    data = bytearray(Path("b.zip").read_bytes())
    data[len(data) - 1200 : len(data) - 900] = b"\x55" * 300
    for at in (60, 200, len(data) // 2):
        broken = bytearray(data)
        broken[at : at + 200] = b"\x55" * 200
        Path("b.zip").write_bytes(bytes(broken))
        capsys.readouterr()
        assert main(["report", "b.zip"]) in (1, 3)
        assert "Traceback" not in capsys.readouterr().err


def test_a_member_packed_in_another_way_or_twice_is_refused(capsys: Capture) -> None:
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile("b.zip", "w", kind) as archive:
            archive.writestr("run.json", Path("bad.json").read_bytes())
        assert main(["report", "b.zip"]) == 3 and "does not write" in sentence(capsys)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile("b.zip", "w") as archive:
        archive.writestr("run.json", "{}")
        archive.writestr("run.json", "{}")
    assert main(["report", "b.zip"]) == 3 and "twice" in sentence(capsys)


def test_a_bundle_of_another_name_is_known_by_its_first_bytes(capsys: Capture) -> None:
    main(["report", "bad.json", "-o", "b.zip"])
    Path("b.zip").rename("attachment")
    assert main(["report", "attachment"]) == 1


def test_two_files_of_one_name_are_told_apart_and_another_model_is_no_baseline(capsys: Capture) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        save(healthy_run(), Path(folder) / "run.json")
    assert main(["report", "a/run.json", "b/run.json"]) == 0
    out = capsys.readouterr().out
    assert "a/run.json (probe)" in out and "b/run.json (probe)" in out
    save(healthy_run(model=a_model(parameters=7)), Path("other.json"))
    assert main(["report", "bad.json", "--baseline", "other.json"]) == 2 and "another model" in sentence(capsys)


@pytest.mark.parametrize("cut", [0, 1, 10, 100, -1, -30])
def test_a_damaged_zip_is_one_sentence(cut: int, capsys: Capture) -> None:
    main(["report", "bad.json", "-o", "b.zip"])
    capsys.readouterr()
    data = Path("b.zip").read_bytes()
    Path("b.zip").write_bytes(data[:cut])
    assert main(["report", "b.zip"]) == 3
    assert "b.zip" in sentence(capsys)


# -- the loader, fuzzed --------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**60)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["nan", "fp16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
RECORDS = [json.loads(to_json(RUNS[name]())) for name in ("one-overflow", "text-exclamation", "text-refused")]


def replaced(data: object, path: list[int], value: object) -> object:
    """A copy with the node that the numbers of ``path`` lead to replaced."""
    if not path or not isinstance(data, (dict, list)) or not data:
        return value
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[path[0] % len(keys)]
    inner = replaced(data[key], path[1:], value)
    if isinstance(data, dict):
        return {**data, key: inner}
    return [inner if number == key else item for number, item in enumerate(data)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.sampled_from(RECORDS), path=st.lists(st.integers(0, 60), min_size=1, max_size=7), value=JSON)
def test_no_record_gives_a_traceback_whatever_stands_where(record: dict, path: list[int], value: object) -> None:
    text = json.dumps(replaced(record, path, value), allow_nan=True)
    try:
        run = parse(text, "run.json")
    except QprecError as error:
        assert "run.json" in str(error)
        return
    report = with_engines(judge(run), load_engines([ALL]))
    for name in ("screen", "table", "markdown", "json", "junit", "github", "html"):
        FORMATS[name].render(one(report))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_no_text_gives_a_traceback(text: str) -> None:
    with pytest.raises(QprecError):
        parse(text, "run.json")


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    for name, make in RUNS.items():
        save(make(), tmp_path / f"{name}.json")
        assert to_json(load(tmp_path / f"{name}.json")) == to_json(make())
