"""The table's part on float32 logits: what they buy, by dtype, and what they cost, by length."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.judge import Report
from qwen_precision.render.text import safe
from qwen_precision.render.words import logits as words


def logits_parts(report: Report) -> Iterator[RenderableType]:
    """Nothing where no logits were looked at."""
    lines = list(words.saved(report))
    for part in words.tables(report):
        yield Text(f"\n{part.title}", style="bold")
        yield from (Text(safe(line, 400)) for line in lines)
        lines = []  # below the first title
        yield _table(part.head, part.rows)
    for line in words.notes(report):
        yield Text(safe(line, 600), style="dim")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(each)) for each in row))
    return table
