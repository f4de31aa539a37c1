"""The rich table for a terminal: verdict, findings, then headroom by layer, smallest first.

Layer and place are columns of their own and never cut: ``model.layers.3…`` could be layer 3 or layer 31.
Only free text folds. All strings of the record are inert (``text.safe``, and ``Text`` has no markup).
"""

import math
from collections.abc import Iterable, Iterator

from rich.console import Group as Stacked
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge import Group, Report, grouped
from qwen_precision.qwen3 import name_of
from qwen_precision.render.console import VERDICT, printed, room_style
from qwen_precision.render.table.beside import side_by_side
from qwen_precision.render.table.engines import engine_parts
from qwen_precision.render.table.generation import summary, texts, trips
from qwen_precision.render.table.logits import logits_parts
from qwen_precision.render.table.precision import precision_parts
from qwen_precision.render.table.rescue import rescue_parts
from qwen_precision.render.table.why import why_parts
from qwen_precision.render.text import count, number, room, safe
from qwen_precision.render.view import View
from qwen_precision.render.words.answer import verdict_words
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.corpus import across, in_all
from qwen_precision.render.words.finding import COUNTED, facts
from qwen_precision.render.words.notseen import not_seen
from qwen_precision.render.words.time import time_words

_BAR = 18
_GROUPS = 12
"""Groups of findings shown a dtype; the rest is counted."""
_ROWS = 10
"""Layers shown in the headroom table; the rest have more room and are counted."""


def render_table(view: View) -> str:
    """All reports as terminal text; several are first summed up side by side."""
    return printed(_all(view), view)


def _all(view: View) -> Iterator[RenderableType]:
    if len(view.reports) > 1:
        yield side_by_side(view.reports)
    merged = any(report.corpus is not None for report in view.reports)
    if merged:  # what is new comes before a screen a checkpoint
        yield from _changes(view)
    for report in view.reports:
        if len(view.reports) > 1:
            yield Text(f"\n== {safe(report.name)}\n", style="bold")
        yield from _parts(report)
    if not merged:
        yield from _changes(view)


def _changes(view: View) -> Iterator[RenderableType]:
    if view.changes:
        yield Text("\nAgainst the baseline", style="bold")
        yield from (Text(line) for line in change_lines(view))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _headline(report)
    if report.stopped and report.corpus is not None:
        yield Text(f"\nN{safe(report.stopped)[1:]}. What was not reached is not judged.", style="yellow")
    elif report.stopped:
        yield Text(f"\nStopped early: {safe(report.stopped)}. What was not reached is not judged.", style="yellow")
    if report.run.unfinished:
        yield Text(f"\nNot finished: {safe(report.run.unfinished)}.", style="yellow")
    if report.corpus is not None:
        yield _pairs("All prompts", across(report))
    made = report.run.generation
    if made is not None:
        yield from texts(made)
    for dtype in dict.fromkeys([*report.verdict, *(finding.dtype for finding in report.findings)]):
        mine = grouped(finding for finding in report.findings if finding.dtype == dtype)
        if mine:
            yield Text(f"\nFindings in {dtype if dtype in report.verdict else 'the reference'}", style="bold")
            yield from _findings(report, mine)
    if made is not None:
        yield from trips(made)
    for dtype in report.verdict:
        if DTYPES[dtype].max < 1e30 and report.headroom[dtype]:
            yield _headroom(report, dtype)
    yield from engine_parts(report)
    yield from rescue_parts(report)
    yield from precision_parts(report)
    yield from logits_parts(report)
    yield from why_parts(report)
    yield from _weights(report)
    for line in (*not_seen(report), COUNTED):
        yield Text(safe(line, 400), style="dim")


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("label", no_wrap=True, style="dim")
    table.add_column("said", overflow="fold")
    for label, said in rows:
        table.add_row(Text(safe(label)), Text(safe(said, 800)))
    return Stacked(Text(f"\n{title}", style="bold"), table)


def _headline(report: Report) -> RenderableType:
    run = report.run
    model = run.model
    lines = Text()
    lines.append("qprec", style="bold")
    revision = f" @ {safe(model.revision[:12])}" if model.revision else ""
    size = f"{model.parameters / 1e9:.1f}B" if model.parameters >= 1e8 else f"{model.parameters / 1e6:.1f}M"
    lines.append(
        f"  {safe(model.source)}{revision}\n"
        f"{safe(model.architecture)}, {model.layers} layers, {size} parameters in {safe(model.source_dtype)}; "
        f"{_what_was_done(report)}\n"
    )
    for choice in run.choices:
        lines.append(f"{safe(choice.what)} {safe(choice.value)} ({safe(choice.reason)})\n", style="dim")
    took = time_words(run)
    lines.append(f"time {safe(took)}\n" if took else "", style="dim")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("dtype", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("why")
    for dtype, verdict in report.verdict.items():
        table.add_row(
            Text(dtype, "bold"), Text(verdict.upper(), VERDICT[verdict]), Text(safe(verdict_words(report, dtype), 300))
        )
    return Stacked(lines, table)


def _what_was_done(report: Report) -> str:
    run = report.run
    if run.generation is not None:
        return summary(run, run.generation)
    return f"{count(in_all(report), 'prompt')}, {count(len(run.sites), 'operation')} watched"


def _findings(report: Report, groups: list[Group]) -> Iterator[RenderableType]:
    shown, given = groups[:_GROUPS], dict[str, int]()
    for position, group in enumerate(shown, 1):
        advice = group.first.cause.advice
        first = given.setdefault(advice, position)
        yield _group(report, position, group, advice if first == position else f"as for {first}")
    if len(groups) > len(shown):
        rest = sum(len(group.findings) for group in groups[_GROUPS:])
        yield Text(f"… and {rest} more findings of {len(groups) - len(shown)} other operations.", style="dim")


def _group(report: Report, position: int, group: Group, advice: str) -> RenderableType:
    style = {"error": "bold red", "warning": "yellow"}.get(group.first.severity, "dim")
    title = Text(f"{position}. ")
    title.append(group.first.kind, style)
    title.append(f"  {safe(group.where)}", "bold")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("key", no_wrap=True, style="dim")
    table.add_column("value", overflow="fold")
    for key, line in facts(report, group):
        table.add_row(key, Text(safe(line, 500)))
    if advice:
        table.add_row("do", Text(safe(advice, 500)))
    return Stacked(title, Padding(table, (0, 0, 0, 3)))


def _headroom(report: Report, dtype: str) -> RenderableType:
    """The tightest operation of each layer, smallest first."""
    rows = report.tightest(dtype)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", no_wrap=True, justify="right")
    table.add_column("operation", overflow="fold")
    table.add_column("largest", no_wrap=True, justify="right")
    table.add_column("headroom", no_wrap=True, justify="right")
    table.add_column("", no_wrap=True)
    for row in rows[:_ROWS]:
        site = report.run.sites[row.site]
        table.add_row(
            Text("-" if site.layer is None else str(site.layer)),
            Text(safe(name_of(site.module, site.op, site.call))),
            Text(number(row.abs_max)),
            Text(room(row.headroom)),
            Text(_bar(row.headroom), room_style(row.headroom)),
        )
    title = Text(
        f"\nHeadroom in {dtype}, tightest operation of each layer (full bar: the limit; log scale)", style="bold"
    )
    rest = len(rows) - _ROWS
    more = [Text(f"… and {rest} more layers with more headroom.", style="dim")] if rest > 0 else []
    return Stacked(title, table, *more)


def _weights(report: Report) -> Iterator[RenderableType]:
    parts = []
    for total in report.run.weight_totals:
        if total.dtype in report.verdict and total.elements:
            rounded = f"{total.inexact:,} of {total.elements:,} rounded, {total.underflow:,} of them to zero"
            exact = rounded if total.inexact else "all exact"
            parts.append(f"{total.dtype} {exact}" + (f", {total.overflow:,} overflow" if total.overflow else ""))
    if parts:
        yield Text("\nWeights: " + "; ".join(parts) + ".", style="dim")


def _bar(headroom: float) -> str:
    """Longer is nearer the limit, on a logarithmic scale of 2^10."""
    used = 1.0 if headroom <= 1 else max(0.0, 1 - math.log2(headroom) / 10) if math.isfinite(headroom) else 0.0
    return "█" * max(1, round(used * _BAR))
