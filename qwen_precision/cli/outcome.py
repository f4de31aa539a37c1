"""What a command that measured something leaves behind: the record, the table, what to do next, an exit code."""

import shlex
from pathlib import Path
from typing import NoReturn

import typer

from qwen_precision.cli import terminal
from qwen_precision.judge import Report, next_command, next_rescue, rescue_exit_code
from qwen_precision.record import Run
from qwen_precision.record import save as write
from qwen_precision.render import View

saved: list[Path] = []
"""What this call of the program has written, for the sentence of an interrupt."""


def save(run: Run, path: Path) -> None:
    """Write the record."""
    write(run, path)
    saved.append(path)


def show(report: Report, path: Path, fail_on: str, rescue_asked: bool = False) -> NoReturn:
    """The table, what to do next, and the exit code of a run that was just made, or of the rescue asked for."""
    terminal.result(str(terminal.render(View((report,), fail_on), "table")))
    file = shlex.quote(str(path))
    terminal.note(f"saved {path}; show it again with: qprec report {file}")
    command, rescue = next_command(report, file), next_rescue(report, file)
    if command is not None:
        terminal.note(f"find where it starts with: {command}")
    if rescue is not None and not rescue_asked:
        terminal.note(f"make it safe in fp16 with: {rescue}")
    if rescue_asked and (report.run.rescue is None or report.run.rescue.exported is None):
        terminal.note("no rescaled checkpoint was written")
    raise typer.Exit(rescue_exit_code(report, fail_on) if rescue_asked else report.exit_code(fail_on))
