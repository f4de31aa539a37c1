"""Several runs, or all checkpoints of a folder, in a table: a row each."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.dtypes import DTYPES, narrowest
from qwen_precision.judge import Report
from qwen_precision.render.console import VERDICT, room_style
from qwen_precision.render.text import room, safe
from qwen_precision.render.words.corpus import failing, in_all


def side_by_side(reports: tuple[Report, ...]) -> RenderableType:
    """A row a run, a column a dtype."""
    dtypes = [name for name in DTYPES if any(name in report.verdict for report in reports)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold")
    for name in dtypes:
        table.add_column(name, no_wrap=True)
    merged = any(report.corpus is not None for report in reports)
    for name in ("least room", "prompts fail") if merged else ():
        table.add_column(name, no_wrap=True, justify="right")
    for report in reports:
        words = [report.verdict.get(name) for name in dtypes]
        verb = f" ({report.run.verb})" if report.corpus is None else ""
        table.add_row(
            Text(f"{safe(report.name)}{verb}"),
            *(Text(word.upper(), VERDICT[word]) if word else Text("-") for word in words),
            *([_narrow(report), _seen(report)] if merged else []),
        )
    return table


def _narrow(report: Report) -> Text:
    """The least headroom in the dtype with the narrowest range."""
    rows = report.headroom.get(narrowest(report.verdict) or "") or []
    return Text(room(rows[0].headroom), room_style(rows[0].headroom)) if rows else Text("-")


def _seen(report: Report) -> Text:
    """How many prompts fail in it, of how many."""
    counted = failing(report, narrowest(report.verdict) or "")
    return Text(f"{counted:,} of {in_all(report):,}" if counted is not None else "-")
