"""GitHub Actions annotations: a line for an operation that is found in one layer or in several, as workflow commands.

Syntax: https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from collections.abc import Iterator

from qwen_precision.judge import Finding, Group, Report, grouped
from qwen_precision.render.text import count, safe
from qwen_precision.render.view import View, model_named
from qwen_precision.render.words import corpus
from qwen_precision.render.words import engines as words

_LEVEL = {"error": "error", "warning": "warning", "info": "notice"}
_MOST = 9
"""Annotations of one level; GitHub shows 10 of a step, and the tenth counts the rest."""


def render_github(view: View) -> str:
    """Annotations for errors first; with a baseline, for what is new."""
    lines = list(_lines(view))
    nothing = "nothing found" if not view.changes else "nothing new"
    models = ", ".join(dict.fromkeys(safe(model_named(report)) for report in view.reports))
    return "\n".join(lines) + "\n" if lines else f"::notice title={_property(f'qprec {models}')}::{nothing}\n"


def _lines(view: View) -> Iterator[str]:
    found = [(report, group) for report in view.reports for group in grouped(_findings(view, report))]
    for severity, level in _LEVEL.items():
        mine = [(report, group) for report, group in found if group.first.severity == severity]
        yield from (
            f"::{level} title={_property(_title(report, group))}::{_data(group)}" for report, group in mine[:_MOST]
        )
        if len(mine) > _MOST:
            yield f"::{level} title=qprec::{_more([group for _, group in mine[_MOST:]])}"
    several = corpus.checkpoints(view.reports)
    if several:
        yield f"::notice title=qprec::{_escaped(several)}"
    for report in view.reports:
        if report.corpus is not None:
            yield f"::notice title={_property(f'qprec {safe(report.name)}')}::{_escaped(corpus.counted(report))}"
        yield from _engines(report)
        if report.stopped:
            title = _property(f"qprec {safe(model_named(report))}")
            early = "stopped early: " if report.corpus is None else ""
            do = "".join(f". {each}" for each in report.corpus.do[:1]) if report.corpus is not None else ""
            yield f"::warning title={title}::{_escaped(f'{early}{safe(report.stopped)}{safe(do)}')}"


def _engines(report: Report) -> Iterator[str]:
    """A notice for each engine that was asked about, and in which it is not well."""
    told = [each for each in report.engines if each.verdict != "ok"]
    for each in told[:_MOST]:
        title = _property(f"qprec {safe(model_named(report))}, {safe(each.engine.name, 40)}: {each.verdict.upper()}")
        said = [words.where(each), words.avoids(report, each), words.lacks(each)]
        yield f"::notice title={title}::{_escaped('; '.join(safe(part, 500) for part in said if part))}"
    if len(told) > _MOST:
        yield f"::notice title=qprec::{len(told) - _MOST} more engines: {_escaped(safe(words.briefly(told[_MOST:])))}"


def _findings(view: View, report: Report) -> list[Finding]:
    changes = view.against(report)
    return report.findings if changes is None else [*changes.new, *changes.risen]


def _title(report: Report, group: Group) -> str:
    first = group.first
    return f"qprec {safe(model_named(report))}, {first.dtype}: {first.kind}, {safe(group.where)}"


def _more(groups: list[Group]) -> str:
    findings = count(sum(len(group.findings) for group in groups), "more finding")
    return f"{findings} of this severity, of {count(len(groups), 'other operation')}"


def _data(group: Group) -> str:
    first = group.first
    # The sentence has the numbers of one layer.
    where = f"In layer {first.place.layer}: " if len(group.layers) > 1 else ""
    return _escaped(f"{where}{safe(first.cause.sentence, 500)} {safe(first.cause.advice, 500)}")


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
