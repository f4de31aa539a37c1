"""One self-contained HTML page: no network, no script, light and dark. Everything is escaped by the template engine."""

from dataclasses import dataclass
from typing import Any

from qwen_precision.judge import Group, HeadroomGain, Precision, Report, grouped, headroom_gains, same_again
from qwen_precision.render.pictures import pictures
from qwen_precision.render.text import count, number, room, safe
from qwen_precision.render.view import View, record_of
from qwen_precision.render.words import engines, logits, why
from qwen_precision.render.words import rescue as words
from qwen_precision.render.words.answer import Answer, answer
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.continuation import went
from qwen_precision.render.words.corpus import across, beside
from qwen_precision.render.words.finding import COUNTED, facts
from qwen_precision.render.words.notseen import not_seen
from qwen_precision.render.words.time import time_words

_MOST = 60
"""Findings, trips and prompts shown of each; the rest is counted."""
_MOVED = 12
"""Operations whose headroom before and after a rescue is shown."""


@dataclass(frozen=True)
class _Page:
    """One report as the template sees it."""

    report: Report
    told: Answer
    groups: list[Group]
    pictures: list[tuple[str, Any]]
    """The first is the one that says most."""
    command: str
    precision: dict[str, Precision]
    rescue: "_Rescue | None"


@dataclass(frozen=True)
class _Rescue:
    """A planned rescue as the template sees it."""

    headline: str
    factors: list[str]
    rows: list[HeadroomGain]
    costs: str
    stuck: list[str]
    proof: list[tuple[str, str]]


def _rescue(report: Report) -> _Rescue | None:
    plan = report.run.rescue
    if plan is None:
        return None
    nothing = plan.rescaling.changes_nothing
    return _Rescue(
        words.headline(plan),
        list(words.factors(plan)),
        [] if nothing else headroom_gains(report.run)[:_MOVED],
        "" if nothing else words.costs(report, plan),
        list(words.stuck(plan)),
        list(words.proof(report, plan.exported)) if plan.exported is not None else [],
    )


def render_html(view: View) -> str:
    """All reports on one page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    engine = Environment(
        loader=PackageLoader("qwen_precision.render", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = {"not_seen": not_seen, "facts": facts, "why": why, "went": went, "time_words": time_words, "across": across}
    engine.globals.update(**words, engines=engines, logits=logits, counted=COUNTED)
    engine.filters.update(
        inert=lambda value, longest=500: safe(str(value), longest), number=number, room=room, count=count
    )
    pages = [
        # The SVG is matplotlib's own text, in which every string is drawn as outlines: the one thing not escaped.
        _Page(
            report,
            answer(report),
            grouped(report.findings),
            [(caption, Markup(svg)) for caption, svg in pictures(report)],
            same_again(report.run, record_of(report)),
            report.precision,
            _rescue(report),
        )
        for report in view.reports
    ]
    lines = list(change_lines(view))
    return engine.get_template("report.html.j2").render(
        pages=pages, beside=beside(view.reports), changes=lines, most=_MOST
    )
