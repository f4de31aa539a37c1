"""GitHub Actions annotations: a line a finding, in the workflow-command syntax.

Syntax: https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from collections.abc import Iterator

from qwen_precision.judge import Finding
from qwen_precision.qwen3 import placed
from qwen_precision.render.text import safe
from qwen_precision.render.view import View

_LEVEL = {"error": "error", "warning": "warning", "info": "notice"}
_MOST = 9
"""Annotations of one level; GitHub shows 10 of a step, and the tenth counts the rest."""


def render_github(view: View) -> str:
    """Annotations for errors first; with a baseline, for what is new."""
    lines = list(_lines(view))
    nothing = "nothing found" if view.changes is None else "nothing new"
    return "\n".join(lines) + "\n" if lines else f"::notice title=qprec::{nothing}\n"


def _lines(view: View) -> Iterator[str]:
    findings = [finding for report in view.reports for finding in report.findings]
    if view.changes is not None:
        findings = [*view.changes.new, *view.changes.risen]
    for severity, level in _LEVEL.items():
        mine = [finding for finding in findings if finding.severity == severity]
        yield from (f"::{level} title={_property(_title(finding))}::{_data(finding)}" for finding in mine[:_MOST])
        if len(mine) > _MOST:
            yield f"::{level} title=qprec::{len(mine) - _MOST} more findings of this severity"
    for report in view.reports:
        if report.stopped:
            yield f"::warning title=qprec::stopped early: {_escaped(safe(report.stopped))}"


def _title(finding: Finding) -> str:
    return f"qprec {finding.dtype}: {finding.kind}, {placed(finding.place.layer, safe(finding.place.name))}"


def _data(finding: Finding) -> str:
    return _escaped(f"{safe(finding.cause.sentence, 500)} {safe(finding.cause.advice, 500)}")


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
