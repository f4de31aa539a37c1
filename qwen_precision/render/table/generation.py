"""The part of the terminal table that only a generation has: the texts, how each went, and what the guards did."""

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwen_precision.record import Continuation, Generation, Run, Trip
from qwen_precision.render.text import count, number, quoted, safe
from qwen_precision.render.words.continuation import went

_ROWS = 8
"""Texts shown; the rest is counted."""
_TRIPS = 12
"""Trips shown; the rest is counted by guard."""
_TEXT = 1200
"""Characters of a text that are shown; all of it is in the record."""


def summary(run: Run, made: Generation) -> str:
    """For the headline: 2 rows, sampled with temperature 0.7, 64 new tokens at most."""
    options = made.options
    how = "greedy"
    if options.get("do_sample"):
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        told = [f"{name.replace('_', '-')} {options[name]}" for name in names if options.get(name) is not None]
        how = safe("sampled: " + ", ".join(told))
    rows = len(run.prompts[0].rows) if run.prompts else 0
    return f"{count(rows, 'row')} of {safe(str(run.settings.get('dtype')))}, {how}"


def texts(made: Generation) -> Iterator[RenderableType]:
    """Each row: what went in, what came out, and how."""
    yield Text("\nText", style="bold")
    for row in made.rows[:_ROWS]:
        facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        facts.add_column("key", no_wrap=True, style="dim")
        facts.add_column("value", overflow="fold")
        facts.add_row("input", Text(quoted(row.input, 200)))
        facts.add_row("output", Text(quoted(row.text, _TEXT), "bold"))
        facts.add_row("how", Text(_how(row)))
        yield Group(Text(f"row {row.row}"), Padding(facts, (0, 0, 0, 3)))
    if len(made.rows) > _ROWS:
        yield Text(f"… and {count(len(made.rows) - _ROWS, 'more row')}, in the record.", style="dim")


def _how(row: Continuation) -> str:
    parts = [went(row)]
    margins = [(value, step) for step, value in enumerate(row.margin) if value is not None and math.isfinite(value)]
    if margins:
        least, step = min(margins)
        top1 = row.top1[step]
        parts.append(f"least margin {number(least)} at step {step} (top-1 probability {number(top1)})")
    return "; ".join(part for part in parts if part)


def trips(made: Generation) -> Iterator[RenderableType]:
    """What the guards saw and did, in order."""
    if made.trips:
        yield Text("\nTrips", style="bold")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("step", "row"):
            table.add_column(name, no_wrap=True, justify="right")
        for name in ("dtype", "guard", "what"):
            table.add_column(name, no_wrap=True)
        table.add_column("why", overflow="fold")
        shown = _worth_showing(made.trips)
        for trip in shown[:_TRIPS]:
            only = "" if trip.acted or trip.guard == "watch" else " (only reported)"
            table.add_row(
                str(trip.step),
                str(trip.row),
                trip.dtype,
                Text(safe(trip.guard)),
                Text(trip.kind + only),
                Text(safe(trip.why, 300)),
            )
        yield table
        rest = len(made.trips) - min(len(shown), _TRIPS)
        if rest > 0:
            yield Text(f"… and {count(rest, 'more trip')}: {_by_guard(made.trips)} in all.", style="dim")


def _worth_showing(all_of_them: list[Trip]) -> list[Trip]:
    """Of trips that repeat the one before (same row, guard and kind) only the first."""
    shown: list[Trip] = []
    last: dict[tuple[int, str], str] = {}
    for trip in all_of_them:
        key = (trip.row, trip.guard)
        if last.get(key) != trip.kind or trip.acted:
            shown.append(trip)
        last[key] = trip.kind
    return shown


def _by_guard(all_of_them: list[Trip]) -> str:
    counts: dict[str, int] = {}
    for trip in all_of_them:
        counts[trip.guard] = counts.get(trip.guard, 0) + 1
    return ", ".join(f"{safe(name)} {number_:,}" for name, number_ in counts.items())
