"""The demo as the README shows it: four Runs that are stored, and what of a Run has to be the same on any machine.

The README is rendered from the stored ones, because the last digits, the sparklines and even which channels come first
depend on how a CPU sums. What a user decides by does not; `decided` gives that.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding, rescue_exit_code
from qwen_precision.record.file import load, save
from qwen_precision.record.run import Run
from support.checkpoints import ROOT
from support.runs import timeless

DEMO_RUNS: dict[str, list[str]] = {
    "demo-probe": ["probe", "demo"],
    "demo-no-guards": ["generate", "demo", "--dtype", "fp16", "--no-guards", "--max-new-tokens", "16"],
    "demo-generate": ["generate", "demo", "--dtype", "fp16"],
    "demo-rescue": ["probe", "demo", "--rescue-to", "demo-fp16safe"],
}
"""By name of the file: the command, as the README prints it."""

_REASONS = {("device", "asked for"): "auto: no GPU is here", ("memory", "auto"): "auto: it fits"}


def stored(name: str) -> Path:
    """Where a Run of the table is kept."""
    return ROOT / "tests" / "fixtures" / f"{name}.json"


def printed(arguments: list[str]) -> str:
    """What a command prints."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(io.StringIO()):
        main(arguments)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()).strip("\n")


def measured(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, int]:
    """The command carried out on this machine's CPU, in an empty folder: its Run and its exit code."""
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main([*DEMO_RUNS[name], "--device", "cpu", "-o", "run.json"])
    return load(folder / "run.json"), code


def store(name: str, run: Run) -> None:
    """Keep a Run, without what differs from day to day and by how much memory is free."""
    changes: dict[str, Any] = {"created": "2026-01-01T00:00:00+00:00", "seconds": run.seconds}
    changes["settings"] = {**run.settings, "device": "auto"}
    changes["choices"] = [
        choice.model_copy(update={"reason": _REASONS.get((choice.what, choice.reason.split(":")[0]), choice.reason)})
        for choice in run.choices
    ]
    save(timeless(run).model_copy(update=changes), stored(name))


def decided(run: Run) -> dict[str, Any]:
    """All that a user decides by: nothing in it is a measured number."""
    report = judge(run)
    found = [each for each in report.findings if each.severity == "error"]
    exported = run.rescue.exported if run.rescue is not None else None
    return {
        "verdicts": report.verdict,
        "exit code": rescue_exit_code(report, "fail") if exported is not None else report.exit_code("fail"),
        "errors": [(each.kind, each.dtype, each.place.layer, each.place.name) for each in found],
        "origins": [_origin(each) for each in found[:1]],
        "texts": [row.text for row in run.generation.rows] if run.generation is not None else None,
        "rescue possible": run.rescue.possible if run.rescue is not None else None,
        "rescue verified": (exported.verified, exported.identical, exported.verdict) if exported is not None else None,
    }


def _origin(finding: Finding) -> tuple[Any, ...]:
    place, token = finding.place, finding.place.token
    where = None if token is None else (token.row, token.position, token.id)
    return (place.layer, place.module, place.op, place.step, where, finding.cause.kind)
