"""What people expect of any command line: one rule for outputs, standard input, quiet, other words, near misses."""

import io
import json
from pathlib import Path

import pytest

from qwen_precision.cli.app import main
from qwen_precision.record import load, parse, save
from qwen_precision.record.run import Run
from support.builders import healthy_run, overflowing_run
from support.runs import sentence

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["probe", "demo", "--dtype", "fp16", "--prompt", "Hello"]


def saved(run: Run, name: str = "run.json") -> str:
    save(run, Path(name))
    return name


def test_a_dash_as_output_prints_the_run_and_saves_nothing(capsys: Capture) -> None:
    assert main([*PROBE, "-o", "-"]) == 1
    out = capsys.readouterr().out
    assert parse(out, "stdout").verb == "probe" and not list(Path().iterdir())
    assert main([*PROBE, "-o", "-", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == {"fp16": "fail"} and not list(Path().iterdir())


def test_no_command_at_all_gets_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("Usage: qprec") and "\n  probe " in told.err


def test_a_command_that_is_nearly_right_is_asked_about_and_the_question_ends_there(capsys: Capture) -> None:
    assert main(["prob", "demo"]) == 2
    assert sentence(capsys) == "qprec: No such command 'prob'. Did you mean 'probe'? See: qprec --help"


@pytest.mark.parametrize("words", [["-o", ""], ["--output", ""], ["--output="]])
@pytest.mark.parametrize("verb", ["probe", "generate"])
def test_an_output_without_a_name_is_not_the_working_folder(verb: str, words: list[str], capsys: Capture) -> None:
    assert main([verb, "demo", *words]) == 2
    assert (
        capsys.readouterr().err
        == f"qprec: {words[0].rstrip('=')}: is empty; give the name of a file, or - for stdout.\n"
    )


def test_a_suffix_is_a_format_and_the_run_is_kept_beside_it(capsys: Capture) -> None:
    assert main([*PROBE, "-o", "found.md"]) == 1
    assert Path("found.md").read_text().startswith("# qprec probe demo") and load(Path("found.json")).verb == "probe"
    assert "Starts    layer 3" in capsys.readouterr().out
    assert main([*PROBE, "-o", "found.pdf"]) == 2 and "'.pdf'" in sentence(capsys)


def test_only_an_older_run_is_replaced_without_force(capsys: Capture) -> None:
    Path("notes.json").write_text('{"mine": 1}')
    Path("notes.md").write_text("mine")
    for name in ("notes.json", "notes.md"):
        assert main([*PROBE, "-o", name]) == 2
        assert "is there already; add --force" in sentence(capsys)
    assert Path("notes.json").read_text() == '{"mine": 1}' and Path("notes.md").read_text() == "mine"
    assert main([*PROBE, "-o", "notes.json", "--force"]) == 1
    assert main([*PROBE, "-o", "notes.json"]) == 1


def test_a_format_takes_the_place_of_the_screen(capsys: Capture) -> None:
    assert main([*PROBE, "--format", "markdown"]) == 1
    assert capsys.readouterr().out.startswith("# qprec probe demo") and Path("qprec-run.json").is_file()
    assert main([*PROBE, "--full"]) == 1
    assert "Headroom in fp16" in capsys.readouterr().out
    assert main([*PROBE, "--full", "--format", "json"]) == 2 and "--full and --format" in sentence(capsys)


def test_quiet_says_nothing_and_the_exit_code_everything(capsys: Capture) -> None:
    assert main([*PROBE, "-q"]) == 1
    assert capsys.readouterr() == ("", "") and Path("qprec-run.json").is_file()
    assert main([*PROBE, "-q", "--device", "tpu"]) == 2
    assert "--device tpu" in sentence(capsys)


def test_prompts_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert main(["probe", "demo", "--dtype", "bf16", "--prompt", "-"]) == 0
    assert [row.text for prompt in load(Path("qprec-run.json")).prompts for row in prompt.rows] == ["two\nlines"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["probe", "demo", "--dtype", "bf16", "--prompts", "-"]) == 0
    assert [row.text for prompt in load(Path("qprec-run.json")).prompts for row in prompt.rows] == ["one", "two"]


def test_text_alone_is_text_alone(capsys: Capture) -> None:
    assert main(["generate", "demo", "--dtype", "fp32", "--text"]) == 0
    assert capsys.readouterr().out == "叫做外滩，晚上灯光很美。\n"
    assert main(["generate", "demo", "--text", "--stream"]) == 2 and "--text" in sentence(capsys)


@pytest.mark.parametrize(
    ("said", "dtypes"),
    [("float16", ["fp16"]), ("half", ["fp16"]), ("bfloat16", ["bf16"]), ("fp16,bf16", ["fp16", "bf16"])],
)
def test_a_dtype_is_known_by_its_other_names(said: str, dtypes: list[str]) -> None:
    main(["probe", "demo", "--dtype", said, "--prompt", "Hello", "--no-explain"])
    assert load(Path("qprec-run.json")).dtypes == dtypes


@pytest.mark.parametrize(
    ("model", "code", "hint"),
    [
        ("dmeo", 3, "did you mean demo?"),
        ("Qwen3-8B", 3, "did you mean Qwen/Qwen3-8B?"),
        ("./mymodle", 3, "did you mean ./mymodel?"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", 2, "give the id alone: Qwen/Qwen3-8B"),
        ("hf.co/Qwen/Qwen3-8B", 2, "give the id alone: Qwen/Qwen3-8B"),
    ],
)
def test_a_near_miss_gets_a_hint(model: str, code: int, hint: str, capsys: Capture) -> None:
    Path("mymodel").mkdir()
    assert main(["probe", model]) == code
    assert hint in sentence(capsys)


def test_a_dry_run_tells_what_it_would_take_and_reads_no_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("qwen_precision.model.weights.read_tensor", lambda *given: pytest.fail("a weight was read"))
    assert main(["probe", "demo", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == [
        "download",
        "device",
        "memory",
        "attention",
        "prompts",
        "time",
    ]
    assert not list(Path().iterdir())


@pytest.mark.parametrize("more", [[], ["-o", "runs/"]])
def test_a_dry_run_is_as_wide_as_the_terminal(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["probe", "demo", "--dry-run", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.startswith(" " * 10) and "controls after" in line for line in lines)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], ["probe"], ["generate"], ["report"]])
def test_help_has_a_short_name(command: list[str], flag: str, capsys: Capture) -> None:
    assert main([*command, flag]) == 0
    assert "Usage: qprec" in capsys.readouterr().out


def test_colour_follows_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    file = saved(overflowing_run())
    main(["report", file])
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["report", file])
    assert "\x1b[" in capsys.readouterr().out
    main(["report", file, "-o", "table.txt"])
    assert "\x1b" not in Path("table.txt").read_text()
    capsys.readouterr()
    monkeypatch.setenv("NO_COLOR", "1")
    main(["report", file])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["report --explain-cause", "probe demo --dtype", "generate demo -o"])
def test_an_option_without_its_value_points_to_the_help_of_its_command(line: str, capsys: Capture) -> None:
    assert main(line.split()) == 2
    assert sentence(capsys).endswith(f"requires an argument. See: qprec {line.split()[0]} --help")


def test_a_cause_is_explained_without_a_run(capsys: Capture) -> None:
    assert main(["report", "--explain-cause", "accumulation"]) == 0
    assert "a partial sum" in capsys.readouterr().out
    assert main(["report", "--explain-cause", "gremlins"]) == 2
    assert "out-of-range" in sentence(capsys)


def test_a_page_is_opened_where_it_was_written(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    file = saved(healthy_run())
    assert main(["report", file, "--open", "-o", "page.html"]) == 0
    assert opened == [Path("page.html").resolve().as_uri()]
    assert main(["report", file, "--open", "-o", "page.md"]) == 2


def test_an_error_from_a_stranger_is_inert(capsys: Capture) -> None:
    assert main(["probe", "./\x1b[2Jnowhere"]) == 3
    assert "\x1b" not in sentence(capsys)
