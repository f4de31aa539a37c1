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
    rows, lengths = words.rows(report), words.lengths(report)
    if rows:
        yield Text("\nWhat float32 logits buy (a softmax in the dtype, against one in float32)", style="bold")
        for line in words.saved(report):
            yield Text(safe(line, 400))
        yield _table(words.columns(report), rows)
    if lengths:
        yield Text("\nWhat they cost", style="bold")
        yield _table(("logits of", "float32", words.narrow(report), "(log scale)"), lengths)
    for line in words.notes(report):
        yield Text(safe(line, 600), style="dim")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(each)) for each in row))
    return table
