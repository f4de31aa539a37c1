"""``qprec report``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qwen_precision import report as reporting
from qwen_precision.cli import options, terminal
from qwen_precision.files import append, check_writable, write_atomically


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs that `qprec probe` or `generate` saved, or bundles.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--format",
            help="How to show it. Default: by the suffix of -o, else table.",
            metavar="|".join(reporting.NAMES),
            callback=options.choice_from(reporting.NAMES, "format"),
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to a file, not stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="An older run: only what is new gives exit code 1.")] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Without prompts, texts and token strings.")] = False,
    fail_on: options.FailOnOption = "fail",
) -> None:
    """Show saved runs again: verdict, NaN, inf and "!!!!" findings, headroom. Measures nothing."""
    name = reporting.format_for(format, output)
    if output is not None:
        check_writable(output, [*runs, *([baseline] if baseline else [])], force=force)
    shown = reporting.view(runs, fail_on, baseline, redact)
    text = reporting.bundled(shown) if name == reporting.BUNDLE else terminal.render(shown, name, output is not None)
    if output is not None:
        write_atomically(output, text)
        terminal.note(f"wrote {output}")
    else:
        terminal.result(str(text))
    summary = os.environ.get("GITHUB_STEP_SUMMARY") if name == "github" else None
    if summary:
        append(Path(summary), str(terminal.render(shown, "markdown", plain=True)), "GITHUB_STEP_SUMMARY")
    raise typer.Exit(shown.exit_code)
