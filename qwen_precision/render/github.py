"""GitHub Actions annotations: a line for an operation that is found in one layer or in several, as workflow commands.

Syntax: https://docs.github.com/actions/reference/workflow-commands-for-github-actions
"""

from collections.abc import Iterator

from qwen_precision.judge import Finding, Group, Report, grouped
from qwen_precision.render.text import count, safe
from qwen_precision.render.view import View, model_named
from qwen_precision.render.words import corpus, engines, logits

_LEVEL = {"error": "error", "warning": "warning", "info": "notice"}
_MOST = 9
"""Annotations of one level; GitHub shows 10 of a step, and the tenth counts the rest."""


def render_github(view: View) -> str:
    """Annotations for errors first; with a baseline, for what is new."""
    lines = list(_lines(view))
    nothing = "nothing found" if not view.changes else "nothing new"
    models = ", ".join(dict.fromkeys(safe(model_named(report)) for report in view.reports))
    lines = lines or [f"::notice title={_property(f'qprec {models}')}::{nothing}"]
    return "\n".join([*lines, *_logits(view)]) + "\n"


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


def _logits(view: View) -> Iterator[str]:
    """A notice a checkpoint: what float32 logits buy, and cost, whether or not anything is advised."""
    told = [(report, words) for report in view.reports if (words := logits.in_brief(report))]
    for report, words in told[:_MOST]:
        title = _property(f"qprec {safe(model_named(report))}, float32 logits")
        yield f"::notice title={title}::{_escaped('; '.join(safe(line, 500) for _, line in words))}"
    if len(told) > _MOST:
        yield f"::notice title=qprec::float32 logits of {len(told) - _MOST} more checkpoints: see the job summary"


def _engines(report: Report) -> Iterator[str]:
    """A notice for each engine that was asked about, and in which it is not well."""
    told = [each for each in report.engines if each.verdict != "ok"]
    for each in told[:_MOST]:
        title = _property(f"qprec {safe(model_named(report))}, {safe(each.engine.name, 40)}: {each.verdict.upper()}")
        yield f"::notice title={title}::{_escaped(safe(engines.told(report, each), 1000))}"
    if len(told) > _MOST:
        yield f"::notice title=qprec::{len(told) - _MOST} more engines: {_escaped(safe(engines.briefly(told[_MOST:])))}"


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
