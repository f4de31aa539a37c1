"""The rich table for a terminal: verdict, findings, then headroom by layer, smallest first.

Layer and place are columns of their own and never cut: ``model.layers.3…`` could be layer 3 or layer 31.
Only free text folds. All strings of the record are inert (``text.safe``, and ``Text`` has no markup).
"""

import io
import math
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge import Finding, Report, Token
from qwen_precision.qwen3 import name_of, placed
from qwen_precision.record import Generation, Run
from qwen_precision.render.table.generation import summary, texts, trips
from qwen_precision.render.table.precision import precision_parts
from qwen_precision.render.table.rescue import rescue_parts
from qwen_precision.render.table.why import why_parts
from qwen_precision.render.text import count, number, quoted, room, safe
from qwen_precision.render.view import View
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.notseen import not_seen
from qwen_precision.render.words.why import because, microscope

_STYLE = {"ok": "green", "risk": "yellow", "fail": "bold red", "incomplete": "yellow"}
_BAR = 18
_GROUPS = 12
"""Groups of findings shown a dtype; the rest is counted."""
_ROWS = 10
"""Layers shown in the headroom table; the rest have more room and are counted."""


def render_table(view: View) -> str:
    """All reports as terminal text; several are first summed up side by side."""
    sink = io.StringIO()
    console = Console(
        file=sink,
        width=max(view.width, 60),
        force_terminal=view.colour,
        no_color=not view.colour,
        highlight=False,
        emoji=False,
        legacy_windows=False,
        color_system="standard" if view.colour else None,
    )
    if len(view.reports) > 1:
        console.print(_side_by_side(view.reports))
    for report in view.reports:
        if len(view.reports) > 1:
            console.print(Text(f"\n== {safe(report.name)}\n", style="bold"))
        for part in _parts(report):
            console.print(part)
    if view.changes is not None:
        console.print(Text("\nAgainst the baseline", style="bold"))
        for line in change_lines(view.changes):
            console.print(Text(line))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()).rstrip() + "\n"


def _side_by_side(reports: tuple[Report, ...]) -> RenderableType:
    """A row a run, a column a dtype."""
    dtypes = [name for name in DTYPES if any(name in report.verdict for report in reports)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold")
    for name in dtypes:
        table.add_column(name, no_wrap=True)
    for report in reports:
        words = [report.verdict.get(name) for name in dtypes]
        table.add_row(
            Text(f"{safe(report.name)} ({report.run.verb})"),
            *(Text(word.upper(), _STYLE[word]) if word else Text("-") for word in words),
        )
    return table


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _headline(report)
    if report.stopped:
        yield Text(f"\nStopped early: {safe(report.stopped)}. What was not reached is not judged.", style="yellow")
    if report.run.unfinished:
        yield Text(f"\nNot finished: {safe(report.run.unfinished)}.", style="yellow")
    made = report.run.generation
    if made is not None:
        yield from texts(made)
    for dtype in report.verdict:
        mine = [finding for finding in report.findings if finding.dtype == dtype]
        if mine:
            yield Text(f"\nFindings in {dtype}", style="bold")
            yield from _findings(report, mine)
    others = [finding for finding in report.findings if finding.dtype not in report.verdict]
    if others:
        yield Text("\nFindings in the reference", style="bold")
        yield from _findings(report, others)
    if made is not None:
        yield from trips(made)
    for dtype in report.verdict:
        if DTYPES[dtype].max < 1e30 and report.headroom[dtype]:
            yield _headroom(report, dtype)
    yield from why_parts(report)
    yield from rescue_parts(report)
    yield from precision_parts(report)
    yield from _weights(report)
    for line in not_seen(report):
        yield Text(safe(line, 400), style="dim")


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
        f"{_what_was_done(run)}\n"
    )
    for choice in run.choices:
        lines.append(f"{safe(choice.what)} {safe(choice.value)} ({safe(choice.reason)})\n", style="dim")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("dtype", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("why")
    for dtype, verdict in report.verdict.items():
        table.add_row(Text(dtype, "bold"), Text(verdict.upper(), _STYLE[verdict]), Text(_why(report, dtype)))
    return Group(lines, table)


def _what_was_done(run: Run) -> str:
    if run.generation is not None:
        return summary(run, run.generation)
    return f"{count(len(run.prompts), 'prompt')}, {count(len(run.sites), 'operation')} watched"


def _why(report: Report, dtype: str) -> str:
    mine = [finding for finding in report.findings if finding.dtype == dtype and finding.severity != "info"]
    if mine:
        first = mine[0]
        step = f"step {first.place.step}, row {first.place.row}, " if first.place.step is not None else ""
        first_word = "first: " if first.severity == "error" else ""
        return f"{first_word}{step}{placed(first.place.layer, safe(first.place.name))} ({first.kind})"
    if report.verdict[dtype] == "incomplete":
        return "nothing found before it stopped"
    if report.run.generation is not None:
        return "all logits finite" if _was_watched(report.run.generation) else "not watched"
    tightest = report.headroom[dtype][0] if report.headroom[dtype] else None
    if tightest is None or not math.isfinite(tightest.headroom):
        return "every operation finite"
    site = report.run.sites[tightest.site]
    where = placed(site.layer, safe(name_of(site.module, site.op, site.call)))
    return f"every operation finite; least headroom {room(tightest.headroom)} at {where}"


def _was_watched(made: Generation) -> bool:
    return any(value is not None and value == value for row in made.rows for value in row.top1)


def _findings(report: Report, findings: list[Finding]) -> Iterator[RenderableType]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.place.name), []).append(finding)
    shown = list(groups.values())[:_GROUPS]
    for number_, group in enumerate(shown, 1):
        yield _group(report, number_, group)
    for advice in dict.fromkeys(group[0].cause.advice for group in shown):
        yield Text(f"Do: {safe(advice, 500)}")
    if len(groups) > len(shown):
        rest = sum(len(group) for group in list(groups.values())[_GROUPS:])
        yield Text(f"… and {rest} more findings of {len(groups) - len(shown)} other operations.", style="dim")


def _group(report: Report, position: int, group: list[Finding]) -> RenderableType:
    first = group[0]
    style = {"error": "bold red", "warning": "yellow"}.get(first.severity, "dim")
    title = Text(f"{position}. ")
    title.append(first.kind, style)
    title.append(f"  {_layers(group)}{safe(first.place.name)}", "bold")
    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column("key", no_wrap=True, style="dim")
    facts.add_column("value", overflow="fold")
    for key, value in (*_facts(first, group), *_why_facts(report, first)):
        facts.add_row(key, Text(value))
    return Group(title, Padding(facts, (0, 0, 0, 3)))


def _facts(first: Finding, group: list[Finding]) -> Iterator[tuple[str, str]]:
    if first.place.step is not None:
        began = f", {safe(first.place.module)}  {safe(first.place.op)}" if first.origin else ""
        yield "where", f"step {first.place.step}, row {first.place.row}{began}"
    elif first.kind != "advice":
        yield "where", f"{safe(first.place.module)}  {safe(first.place.op)}"
    if first.magnitude.reference is not None:
        left = f", headroom {room(first.magnitude.headroom)}" if first.magnitude.headroom is not None else ""
        yield "magnitude", f"{number(first.magnitude.reference)}{left}"
    place = _place(first)
    if place:
        yield "at", place
    if first.magnitude.nan or first.magnitude.inf:
        carried = f"; passed on by {count(first.spread.propagated, 'later operation')}"
        if first.place.step is not None:
            carried = f"; and at {count(first.spread.propagated, 'later step')}" if first.spread.propagated else ""
        yield "bad", f"{first.magnitude.inf:,} inf, {first.magnitude.nan:,} NaN{carried}"
    if first.spread.prompts:
        yield "prompts", ", ".join(quoted(name) for name in first.spread.prompts)
    if len(group) > 1:
        tail = ", ".join(_also(finding) for finding in group[1:4])
        yield "also", tail + (f" and {len(group) - 4} more" if len(group) > 4 else "")
    if first.severity == "error" or first.place.step is not None or first.kind == "advice":
        yield "cause", safe(first.cause.sentence, 500)


def _why_facts(report: Report, first: Finding) -> Iterator[tuple[str, str]]:
    """The cause by name, what shows it, and the close look."""
    if first.cause.kind is not None:
        yield "because", safe(because(first))
        for line in first.cause.evidence:
            yield "", safe(line, 300)
    for key, line in microscope(report, first):
        yield key, safe(line, 300)


def _place(finding: Finding) -> str:
    parts = []
    if finding.place.token is not None:
        parts.append(("query at " if finding.place.key is not None else "") + _token(finding.place.token))
    if finding.place.key is not None:
        parts.append(f"key of {_token(finding.place.key)}")
    if finding.place.head is not None:
        parts.append(f"head {finding.place.head}")
    if finding.place.channel is not None:
        parts.append(f"channel {finding.place.channel}")
    if finding.place.expert is not None:
        parts.append(f"expert {finding.place.expert}")
    return ", ".join(parts)


def _token(token: Token) -> str:
    text = "padding" if token.padding else f"id {token.id} {quoted(str(token.text))}"
    row = f" of row {token.row}" if token.row else ""
    return f"token {token.position}{row} ({text})"


def _also(finding: Finding) -> str:
    if finding.place.step is not None:
        return f"step {finding.place.step} of row {finding.place.row}"
    layer = f"layer {finding.place.layer}" if finding.place.layer is not None else safe(finding.place.module)
    return f"{layer} ({number(finding.magnitude.reference)})" if finding.magnitude.reference is not None else layer


def _layers(group: list[Finding]) -> str:
    layers = sorted({finding.place.layer for finding in group if finding.place.layer is not None})
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}: "
    return f"layers {layers[0]} to {layers[-1]} ({len(layers)}): "


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
            Text(_bar(row.headroom), _colour(row.headroom)),
        )
    title = Text(f"\nHeadroom in {dtype}, tightest operation of each layer (full bar: the limit)", style="bold")
    rest = len(rows) - _ROWS
    more = [Text(f"… and {rest} more layers with more headroom.", style="dim")] if rest > 0 else []
    return Group(title, table, *more)


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


def _colour(headroom: float) -> str:
    return "red" if headroom < 1 else "yellow" if headroom < 2 else "green"
