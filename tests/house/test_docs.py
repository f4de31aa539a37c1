"""What the README shows is what the program does. `make golden` writes the generated blocks anew."""

import io
import re
from pathlib import Path

import pytest
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge.checks import CHECKS, judge
from qwen_precision.judge.engines import with_engines
from qwen_precision.judge.meanings import CAUSES
from qwen_precision.model.compressed import FORMATS as FORMATS_READ
from qwen_precision.model.quantised import METHODS
from qwen_precision.record import load
from qwen_precision.render import FORMATS, View
from qwen_precision.settings.engines import ALL, load_engines
from qwen_precision.settings.guards import GUARDS
from support.checkpoints import ROOT
from support.demo import DEMO_RUNS, printed, stored

README, MORE = ROOT / "README.md", ROOT / "configs" / "README.md"
PICTURE = ROOT / "configs" / "screen.svg"


def shown(name: str, format: str = "screen") -> tuple[str, str]:
    """A command and what it prints, from the stored Run: no CPU's digits are compared with another's."""
    return f"$ qprec {' '.join(DEMO_RUNS[name])}", printed(["report", str(stored(name)), "--format", format])


def picture() -> str:
    """The first screen as a terminal shows it, drawn by rich; no font is fetched."""
    report = with_engines(judge(load(stored("demo-probe"))))  # as `qprec probe` does
    view = View((report,), record="qprec-run.json", colour=True)
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text("$ qprec probe demo"))
    console.print(Text.from_ansi(str(FORMATS["screen"].render(view))))
    plain = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="qprec", code_format=plain, unique_id="qprec")


def generate_block() -> str:
    parts = []
    for command, text in map(shown, ("demo-no-guards", "demo-generate")):
        parts.append(f"{command}\n…\n{text[text.index('fp16  ') : text.index(chr(10) * 2 + 'Find it')]}")
    return "```\n" + "\n\n".join(parts) + "\n```"


def rescue_block() -> str:
    command, text = shown("demo-rescue", "table")
    section = text[text.index("Rescue\n") : text.index("\n\nError against")]
    return f"```\n{command} --full\n…\n{section}\n```"


def formats_block() -> str:
    rows = [f"| {name} | {' '.join(row.suffixes) or '-'} | {row.about} |" for name, row in FORMATS.items()]
    rows.append("| bundle | .zip | all of it in one file, for a bug report |")
    return "| format | suffix | for |\n|---|---|---|\n" + "\n".join(rows)


def guards_block() -> str:
    rows = [f"| `{name}` | {(guard.__doc__ or '').strip().splitlines()[0]} |" for name, guard in GUARDS.items()]
    return "| guard | what it does |\n|---|---|\n" + "\n".join(rows)


def causes_block() -> str:
    rows = [f"| {name} | {each.shown} |" for name, each in CAUSES.items()]
    return "| cause | what shows it |\n|---|---|\n" + "\n".join(rows)


def engines_block() -> str:
    """Name, how it is started, what passes through fp16, what avoids it; each with the place where it was read."""
    lines = ["| engine | as it is started | through fp16 pass | avoided by |", "|---|---|---|---|"]
    for engine in load_engines([ALL]):
        values, options = [], {}
        for rule in engine.rules:
            only = f", {' and '.join(rule.models)} alone" if rule.models else ""
            clipped = ", which become the largest number" if rule.saturates else ""
            values.append(f"{', '.join(rule.values)} ([{rule.version}]({rule.source})){clipped}{only}")
            options |= {each.option: f"`{each.option}` ([{each.evidence}]({each.source}))" for each in rule.avoid}
        how = f"{engine.runs}. {engine.note}" if engine.note else engine.runs
        lines.append(f"| `{engine.name}` | {how} | {'; '.join(values)} | {', '.join(options.values())} |")
    return "\n".join(lines)


def checks_block() -> str:
    rows = [f"| {name} | {check.about} |" for name, check in CHECKS.items()]
    return "| check | finds |\n|---|---|\n" + "\n".join(rows)


def dtypes_block() -> str:
    rows = [
        f"| {row.name} | {row.max:.6g} | {row.smallest_normal:.3g} | {row.smallest_subnormal:.3g} | {row.eps:.3g} |"
        for row in DTYPES.values()
    ]
    head = "| dtype | largest | smallest normal | smallest | relative step |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows)


BLOCKS = {
    "generate": (README, generate_block),
    "rescue": (MORE, rescue_block),
    "formats": (README, formats_block),
    "guards": (MORE, guards_block),
    "causes": (MORE, causes_block),
    "checks": (MORE, checks_block),
    "engines": (MORE, engines_block),
    "dtypes": (MORE, dtypes_block),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_generated_block_of_the_documentation_is_current(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    file, block = BLOCKS[name]
    wanted = f"<!-- begin:{name} -->\n{block()}\n<!-- end:{name} -->"
    text = file.read_text(encoding="utf-8")
    if request.config.getoption("--update-golden"):
        text = re.sub(f"<!-- begin:{name} -->.*?<!-- end:{name} -->", lambda _: wanted, text, flags=re.DOTALL)
        file.write_text(text, encoding="utf-8")
    assert wanted in text, f"run `make golden` and read the diff of {file.name} ({name})"


def test_the_picture_of_the_readme_is_what_the_program_prints(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        PICTURE.write_text(picture(), encoding="utf-8")
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `make golden` and look at configs/screen.svg"
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", picture()).replace("https://www.textualize.io", "")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("command", [[], ["probe"], ["generate"], ["report"]])
def test_help_at_80_columns_cuts_no_name_and_no_line(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = printed([*command, "--help"])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert not any(line.endswith("...") for line in lines[1:])


def test_the_readme_names_every_exit_code_and_no_other() -> None:
    section = README.read_text().split("## Exit codes")[1].split("##")[0]
    assert re.findall(r"^\| (\d) \|", section, flags=re.MULTILINE) == ["0", "1", "2", "3"]


def test_the_readme_names_every_quantisation_that_is_read() -> None:
    section = README.read_text(encoding="utf-8").split("### What is read")[1].split("\n#")[0]
    assert {f"`{name}`" for name in (*METHODS, *FORMATS_READ)} <= set(re.findall(r"`[\w-]+`", section))


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "make test" in README.read_text()
    assert "make check" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^check:.*\btest\b", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_tested_versions_are_those_that_are_pinned() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    readme = README.read_text()
    assert pins["torch"] == "2.13.0" and f"torch {pins['torch']}" in readme
    assert pins["transformers"] in readme and pins["transformers"] in (ROOT / "pyproject.toml").read_text()


def test_nothing_points_at_a_place_a_user_does_not_have() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "qwen_precision").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert "/shared" not in path.read_text() and "/work/" not in path.read_text(), path
