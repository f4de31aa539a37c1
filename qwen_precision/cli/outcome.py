"""What a command that measured something leaves behind: files, what is shown, an exit code. One rule for all commands.

The suffix of ``-o`` is the format: ``.json`` is the run itself; any other report is written beside it. ``-`` is stdout.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import typer

from qwen_precision import report as reporting
from qwen_precision.cli import terminal
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import check_writable, write_atomically
from qwen_precision.judge import Report, rescue_exit_code
from qwen_precision.record import Run, is_record, to_json
from qwen_precision.record import save as write
from qwen_precision.render import View, why_none

STDOUT = Path("-")
RECORD = "record"
"""What stands for the run itself, among the formats."""

saved: list[Path] = []
"""What this call of the program has written, for the sentence of an interrupt."""


@dataclass(frozen=True)
class Output:
    """What is wanted, and where."""

    record: Path | None
    """Where the run is saved; None with ``-o -``."""
    report: Path | None
    """Where a report is written."""
    format: str
    """Of that report."""
    shown: str | None
    """The format on stdout; ``RECORD`` for the run itself, None for nothing."""


def output_for(
    asked: Path | None,
    format: str | None,
    default: str,
    full: bool = False,
    force: bool = False,
    reads: tuple[str | None, ...] = (),
) -> Output:
    """What ``-o``, ``--format``, ``--full`` and ``--quiet`` come to, found out before an hour of work.

    Args:
        asked: of ``-o``.
        format: of ``--format``.
        default: name of the record where ``-o`` gives none.
        full: the whole table in place of one screen.
        force: replace a file that is not an older run.
        reads: what the command reads and must not be written over.

    Raises:
        UsageError: a suffix that stands for no format, or a file that is there and is no older run.
        QprecError: a place that cannot be written.
    """
    shown = None if terminal.quiet() else format or ("table" if full else "screen")
    if full and format:
        raise UsageError("--full and --format: give one of the two.")
    if asked == STDOUT:
        name = format or RECORD
        if name != RECORD:
            reporting.format_for(name, None)
        return Output(None, None, "", name)
    inputs = [Path(each) for each in reads if each]
    check_writable(asked or Path(default), inputs)
    record, report, name = asked or Path(default), None, ""
    if asked is not None and asked.suffix not in ("", ".json"):
        name = reporting.format_for(format, asked)
        record, report = asked.with_suffix(".json"), asked
        shown = None if terminal.quiet() else "table" if full else "screen"
    elif format is not None:
        reporting.format_for(format, None)
    check_writable(record, inputs, force=force or is_record(record))
    if report is not None:
        check_writable(report, inputs, force=force)
    return Output(record, report, name, shown)


def for_file(view: View, name: str) -> str | bytes:
    """A report as it stands in a file."""
    return reporting.bundled(view) if name == reporting.BUNDLE else terminal.render(view, name, plain=True)


def keep(run: Run, output: Output) -> str:
    """Write the record of what there is so far, where one is kept; a full disk ends no measurement.

    Gives the record as a word of a command line; empty where none was written.
    """
    try:
        save(run, output)
    except QprecError as error:
        terminal.note(str(error))
        return ""
    return shlex.quote(str(output.record)) if output.record is not None else ""


def save(run: Run, output: Output) -> None:
    """Write the record, where one is kept."""
    if output.record is not None:
        write(run, output.record)
        saved.append(output.record)


def show(report: Report, output: Output, fail_on: str, rescue_asked: bool = False) -> NoReturn:
    """What was found: saved, in a report, on stdout; and the exit code of the run, or of the rescue asked for.

    Raises:
        QprecError: a file could not be written; all the rest was, and was shown.
    """
    view = View((report,), fail_on, record=shlex.quote(str(output.record)) if output.record is not None else "")
    failed: list[QprecError] = []
    for path, write_it in ((output.record, _save_run), (output.report, _save_report)):
        try:
            if path is not None:
                write_it(view, output)
                terminal.note(f"saved {path}")
        except QprecError as error:
            failed.append(error)
            if path == output.record:  # then no command may read it
                view = replace(view, reports=(replace(report, record=""),), record="")
    _print(view, report, output, rescue_asked)
    if failed:
        raise failed[0]
    raise typer.Exit(rescue_exit_code(report, fail_on) if rescue_asked else report.exit_code(fail_on))


def _save_run(view: View, output: Output) -> None:
    save(view.reports[0].run, output)


def _save_report(view: View, output: Output) -> None:
    if output.report is not None:
        write_atomically(output.report, for_file(view, output.format))


def _print(view: View, report: Report, output: Output, rescue_asked: bool) -> None:
    if output.shown == RECORD:
        terminal.result(to_json(report.run))
    elif output.shown is not None:
        terminal.result(str(terminal.render(view, output.shown)))
    plan = report.run.rescue
    if rescue_asked and (plan is None or plan.exported is None):
        why = (why_none(plan) if plan is not None else "") or report.run.unfinished or report.stopped
        terminal.note(f"no rescaled checkpoint was written{f': {why}' if why else ''}")
