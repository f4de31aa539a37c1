"""``qprec report``."""

import os
import shlex
import tempfile
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwen_precision import report as reporting
from qwen_precision.cli import options, outcome, terminal
from qwen_precision.errors import UsageError
from qwen_precision.files import append, check_writable, write_atomically
from qwen_precision.judge import CAUSES


def _explain_cause(name: str | None) -> None:
    if name is None:
        return
    options.choice_from(CAUSES, "cause")(name)
    meaning = CAUSES[name]
    terminal.result(
        f"{name}\n  means    {meaning.said.format(dtype='the dtype', how='')}\n  shown by {meaning.shown}\n"
        f"  not to be mixed up: {meaning.unlike}\n"
    )
    raise typer.Exit


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs that `qprec probe` or `generate` saved, or bundles.", parser=options.path
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--format",
            help=f"How to show it: {', '.join(reporting.NAMES)}. Default: by the suffix of -o, else table.",
            metavar="NAME",
            callback=options.choice_from(reporting.NAMES, "format"),
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a file; - is stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(help="An older run: only what is new gives exit code 1.", metavar="FILE", parser=options.path),
    ] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Without prompts, texts and token strings.")] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="What comes of it there; repeatable; or all. Default: all, if fp16 fails.", metavar="NAME"),
    ] = None,
    fail_on: options.FailOnOption = "fail",
    quiet: options.QuietOption = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    explain_cause: Annotated[
        str | None,
        typer.Option(
            "--explain-cause", metavar="NAME", is_eager=True, callback=_explain_cause, help="What a cause means."
        ),
    ] = None,
) -> None:
    """Show saved runs again: verdict, NaN, inf and "!!!!" findings, headroom. Measures nothing.

    And what float32 logits buy and cost, with advice where a number asks for it.
    """
    output = None if output == outcome.STDOUT else output
    if open_ and output is None:
        output, force = Path(tempfile.mkdtemp(prefix="qprec-")) / "report.html", True
    if open_ and reporting.format_for(format, output) != "html":
        raise UsageError("--open: opens a page; give -o FILE.html, or leave -o and --format out.")
    name = reporting.format_for(format, output)
    if output is not None:
        check_writable(output, [*runs, *([baseline] if baseline else [])], force=force)
    shown = reporting.view(runs, fail_on, baseline, redact, engine or [])
    shown = replace(shown, record=shlex.quote(str(runs[0])))
    if output is not None:
        write_atomically(output, outcome.for_file(shown, name))
        terminal.note(f"wrote {output}")
        if open_ and not webbrowser.open(output.resolve().as_uri()):
            terminal.note("no browser could be opened")
    elif not quiet:
        terminal.result(str(terminal.render(shown, name)))
    summary = os.environ.get("GITHUB_STEP_SUMMARY") if name == "github" else None
    if summary:
        append(Path(summary), str(terminal.render(shown, "markdown", plain=True)), "GITHUB_STEP_SUMMARY")
    raise typer.Exit(shown.exit_code)
