"""What is merely wrong gets one sentence and an exit code from 0 to 3: words, files, streams, limits of the system."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_precision.cli import main
from support.checkpoints import edit_json
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["probe", "demo", "--dtype", "fp16", "--prompt", "hello", "--no-explain"]

NOT_YAML = {
    "timestamp": "!!timestamp x",
    "nested": "budget: !!timestamp x",
    "bool": "!!bool x",
    "date": "fail_on: 2001-99-99",
    "merge": "a: &a {b: 1}\nc:\n  <<: *a\n",
    "half a character": 'fail_on: "\\ud800"',
    "object": "!!python/object/apply:os.system [echo]",
    "base of 60": "budget: !!int 59:59",
    "deep": "[" * 100_000,
    "nul": "a\0b",
}


@pytest.mark.parametrize("text", NOT_YAML.values(), ids=NOT_YAML.keys())
@pytest.mark.parametrize("option", ["--config", "--prompts", "--guards"])
def test_yaml_that_is_none_is_called_so(option: str, text: str, capsys: Capture) -> None:
    Path("file.yaml").write_text(text, encoding="utf-8")
    verb = ["generate", "demo"] if option == "--guards" else ["probe", "demo"]
    assert main([*verb, option, "file.yaml"]) == 2
    assert "file.yaml" in (said := sentence(capsys)) and "is not valid YAML" in said


@pytest.mark.parametrize("option", ["--config", "--prompts", "--guards"])
def test_more_values_than_a_yaml_file_is_read_for_are_said_to_be_too_many(option: str, capsys: Capture) -> None:
    Path("file.yaml").write_text("a: [" + "1," * 100_001 + "]")
    verb = ["generate", "demo"] if option == "--guards" else ["probe", "demo"]
    assert main([*verb, option, "file.yaml"]) == 2
    assert "file.yaml holds more than 100,000 values" in sentence(capsys)


def test_a_number_to_the_base_of_60_is_a_text_however_long(capsys: Capture) -> None:
    for option, key in (("--config", "budget"), ("--guards", "clamp")):
        Path("file.yaml").write_text(f"{key}: {':'.join(['59'] * 50_000)}")
        verb = ["generate", "demo"] if option == "--guards" else ["probe", "demo"]
        assert main([*verb, option, "file.yaml"]) == 2
        assert f"{key}: should be" in sentence(capsys)


def test_merge_keys_that_stand_for_more_than_memory_holds_are_refused_at_once(capsys: Capture) -> None:
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40)]
    Path("file.yaml").write_text("\n".join(lines))
    assert main(["probe", "demo", "--config", "file.yaml"]) == 2
    assert "file.yaml line 2 is not valid YAML" in sentence(capsys)


@pytest.mark.parametrize("word", ["a\0b", "a\ud800b"])
@pytest.mark.parametrize(
    "args",
    [["probe"], ["report"], ["probe", "demo", "-o"], ["probe", "demo", "--prompts"], ["generate", "demo", "--guards"]],
)
def test_a_word_that_no_file_can_be_called_by_is_refused(args: list[str], word: str, capsys: Capture) -> None:
    assert main([*args, word]) == 2
    assert "is no text that a file or a prompt can have" in sentence(capsys)


@pytest.mark.parametrize(
    "args", [["probe", "X"], ["report", "X"], ["probe", "demo", "--prompts", "X"], ["report", "X", "-o", "Y.html"]]
)
def test_a_name_too_long_for_the_file_system_is_a_sentence(args: list[str], capsys: Capture) -> None:
    assert main([each.replace("X", "x" * 5000).replace("Y", "y" * 300) for each in args]) in (2, 3)
    sentence(capsys)


@pytest.mark.parametrize("args", [PROBE, ["generate", "demo"], ["report", "run.json", "-o", "x.html"]])
def test_a_working_folder_that_is_gone_is_named(args: list[str], tmp_path: Path, capsys: Capture) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        assert main(args) == 3
    finally:
        os.chdir(tmp_path)
    assert "the working folder cannot be read" in sentence(capsys)


SPECIAL = {
    "prompts": (["probe", "demo", "--prompts", "X"], 2),
    "prompts.yaml": (["probe", "demo", "--prompts", "X.yaml"], 2),
    "prompts.json": (["probe", "demo", "--prompts", "X.json"], 3),
    "config": (["probe", "demo", "--config", "X.yaml"], 2),
    "guards": (["generate", "demo", "--guards", "X.yaml"], 2),
    "texts": (["probe", "demo", "--sweep", "first-token", "--sweep-texts", "X"], 2),
    "record": (["report", "X.json"], 3),
    "bundle": (["report", "X.zip"], 3),
    "baseline": (["report", "run.json", "--baseline", "X.json"], 3),
    "probe run": (["generate", "demo", "--probe-run", "X.json"], 3),
}


@pytest.mark.parametrize("device", ["pipe", "zero"])
@pytest.mark.parametrize(("args", "code"), SPECIAL.values(), ids=SPECIAL.keys())
def test_what_is_no_regular_file_is_refused_unread(args: list[str], code: int, device: str, capsys: Capture) -> None:
    (demo := Path("run.json")).write_bytes((Path(__file__).parent.parent / "fixtures" / "demo-probe.json").read_bytes())
    assert demo.is_file()
    for name in ("X", "X.yaml", "X.json", "X.zip"):
        os.mkfifo(name) if device == "pipe" else os.symlink("/dev/zero", name)
    assert main(args) == code
    assert "is no regular file" in sentence(capsys)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("device", ["pipe", "zero"])
def test_a_checkpoints_file_that_is_no_file_is_refused_unread(
    name: str, device: str, broken: Path, capsys: Capture
) -> None:
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name) if device == "pipe" else os.symlink("/dev/zero", broken / name)
    for verb in ("probe", "generate"):
        assert main([verb, "model"]) == 3
        assert f"{name}: is no regular file" in sentence(capsys)


def test_a_pipe_that_nobody_reads_is_no_output(capsys: Capture) -> None:
    os.mkfifo("run.json")
    assert main([*PROBE, "-o", "run.json"]) == 3
    assert "-o run.json: cannot be written" in sentence(capsys)


def test_a_shards_name_that_no_file_can_have_is_refused(broken: Path, capsys: Capture) -> None:
    for name in ("y" * 300, "y\0y"):
        (broken / "model.safetensors").unlink(missing_ok=True)
        (broken / "model.safetensors.index.json").write_text("{}")
        edit_json(broken / "model.safetensors.index.json", weight_map={"x": name})
        assert main(["probe", "model"]) == 3
        assert "model" in sentence(capsys)


def _process(args: list[str], shell: str) -> subprocess.CompletedProcess[str]:
    words = " ".join(["exec", sys.executable, "-m", "qwen_precision", *args])
    here = str(Path(__file__).parent.parent.parent)
    env = {**os.environ, "PYTHONPATH": here}
    return subprocess.run(["bash", "-c", shell.replace("QPREC", words)], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("QPREC >&-", 3),
        ("QPREC 2>&-", 0),
        ("QPREC >&- 2>&-", 3),
        ("QPREC >/dev/full", 3),
        ("QPREC 2>/dev/full", 0),
        ("QPREC >/dev/full 2>/dev/full", 3),
        ("(QPREC) | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_streams_that_are_closed_or_full_change_no_other_exit_code(shell: str, code: int) -> None:
    fixture = str(Path(__file__).parent.parent / "fixtures" / "demo-probe.json")
    done = _process(["report", fixture, "--fail-on", "never"], shell)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_pipe_that_nobody_reads_to_its_end_leaves_the_exit_code_of_the_run() -> None:
    fixture = str(Path(__file__).parent.parent / "fixtures" / "demo-probe.json")
    shell = "(QPREC) | true; exit ${PIPESTATUS[0]}"
    assert _process(["report", fixture], shell).returncode == 1
    assert _process(["report", "--help"], shell).returncode == 0


def test_a_version_that_cannot_be_printed_names_stdout() -> None:
    done = _process(["--version"], "QPREC >/dev/full")
    assert (done.returncode, done.stderr) == (3, "qprec: stdout: cannot be written (No space left on device).\n")


def test_a_folder_whose_name_is_not_utf_8_is_said_to_have_such_a_name(broken: Path, capsys: Capture) -> None:
    name = os.fsdecode(b"m\xff")
    try:
        broken.rename(name)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert main(["probe", name]) == 3
    assert "m\\udcff: the folder's name is not UTF-8, which tokenizers cannot open; rename it" in sentence(capsys)


def test_an_error_is_exit_code_3_also_where_nobody_can_be_told() -> None:
    for shell in ("QPREC 2>&-", "QPREC 2>/dev/full"):
        assert _process(["report", "nothing.json"], shell).returncode == 3


@pytest.mark.parametrize("files", [6, 8, 12])
def test_too_few_open_files_is_a_sentence(files: int) -> None:
    fixture = str(Path(__file__).parent.parent / "fixtures" / "demo-probe.json")
    done = _process(["report", fixture, "-o", "page.html", "--fail-on", "never"], f"ulimit -n {files}; QPREC")
    assert done.returncode in (0, 3) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "ulimit" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.EIO])
def test_an_error_of_the_system_is_no_bug_and_says_where_the_run_is(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("qwen_precision.cli.outcome.View", failing)
    assert main(["generate", "demo", "--max-new-tokens", "1", "-o", "run.json"]) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qprec: ")]
    assert len(said) == 1 and said[0].startswith(f"qprec: somewhere: {os.strerror(number)}; ")
    assert "the run so far is in run.json" in said[0]


def test_a_real_bug_is_one_sentence_with_the_path_of_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("qwen_precision.cli.outcome.View", failing)
    assert main(["generate", "demo", "--max-new-tokens", "1", "-o", "run.json"]) == 3
    told = capsys.readouterr().err
    (report,) = tmp_path.glob("qprec-bug-*.txt")
    assert "this is a bug in qprec" in told and str(report) in told and "Traceback" not in told
    assert "The run so far is in run.json" in told
    assert "in failing" in report.read_text() and "KeyError: 'oops'" in report.read_text()
