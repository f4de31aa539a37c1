"""The table's part on engines: a line each, then what avoids it in those that fail or are at risk."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.judge import Report
from qwen_precision.render.console import VERDICT
from qwen_precision.render.text import room, safe
from qwen_precision.render.words import engines as words


def engine_parts(report: Report) -> Iterator[RenderableType]:
    """Nothing where no engine was asked about."""
    if not report.engines:
        return
    yield Text("\nEngines, by what passes through fp16 in each", style="bold")
    table = _table("engine", "verdict", "headroom", "first that fails, else the tightest")
    for each in report.engines:
        verdict = Text(each.verdict.upper(), VERDICT[each.verdict])
        said = "; ".join(part for part in (words.shortly(each), words.lacks(each)) if part)
        table.add_row(Text(safe(each.engine.name, 40)), verdict, room(each.headroom), Text(safe(said, 500)))
    yield table
    avoided = [(each.engine.name, words.avoids(report, each)) for each in report.engines]
    table = _table("engine", "avoided by")
    for name, option in avoided:
        if option:
            table.add_row(Text(safe(name, 40)), Text(safe(option, 500)))
    if table.row_count:
        yield Text()
        yield table
    for each in report.engines:
        if each.engine.note:
            yield Text(f"\n{safe(each.engine.name, 40)}: {safe(each.engine.note, 500)}", style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True, justify="right" if name == "headroom" else "left")
    table.add_column(columns[-1], overflow="fold")
    return table
