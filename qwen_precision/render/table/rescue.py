"""The rescue's part of the terminal table: factors, headroom before and after, costs, proof."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.judge import Report, headroom_gains
from qwen_precision.render.text import room, safe
from qwen_precision.render.words import rescue as words

_ROWS = 6
"""Operations shown; the rest have more headroom, before and after."""


def rescue_parts(report: Report) -> Iterator[RenderableType]:
    """Nothing where no rescue was planned."""
    plan = report.run.rescue
    if plan is None:
        return
    yield Text("\nRescue", style="bold")
    yield Text(safe(words.headline(plan), 600))
    for line in words.factors(plan):
        yield Text(f"  {safe(line, 300)}")
    if not plan.rescaling.changes_nothing:
        if report.run.sites:
            yield _headroom(report)
        yield Text(safe(words.costs(report, plan), 400), style="dim")
    if plan.stuck:
        yield Text("What no factor moves:")
        for line in words.stuck(plan):
            yield Text(f"  {safe(line, 300)}")
    if plan.exported is not None:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column("key", no_wrap=True, style="dim")
        table.add_column("value", overflow="fold")
        for key, value in words.proof(report, plan.exported):
            table.add_row(key, Text(safe(value, 400)))
        yield table


def _headroom(report: Report) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("operation", overflow="fold")
    for name in ("layer", "before", "after"):
        table.add_column(name, no_wrap=True, justify="right")
    for row in headroom_gains(report.run)[:_ROWS]:
        layer = "-" if row.layer is None else str(row.layer)
        table.add_row(Text(safe(row.name)), layer, room(row.before), room(row.after))
    return table
