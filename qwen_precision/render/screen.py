"""One screen that answers: at most 22 lines at 80 columns. All that it leaves out is in the table."""

from collections.abc import Iterator
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.judge import Report
from qwen_precision.record import Continuation
from qwen_precision.render.console import VERDICT, Pasted, printed, room_style
from qwen_precision.render.table.beside import side_by_side
from qwen_precision.render.text import count, quoted, room, safe
from qwen_precision.render.view import View
from qwen_precision.render.words.answer import Answer, Fact, answer
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.continuation import ended_by_itself, went
from qwen_precision.render.words.steps import Step

MOST_LINES = 22
"""Of a screen: a terminal of 24 lines has room for the command above it and the prompt below."""

_LABEL = 10
"""Columns of the labels on the left."""
_SCREENS = 3
"""Checkpoints of a folder that have a screen each."""
_CHANGED = 8
"""Lines of what differs from a baseline."""
_ROWS = 2
"""Texts of a generation that are shown."""
_ALWAYS = 100


class _Block(NamedTuple):
    """Lines that are shown together, or left out together."""

    text: str
    worth: int = _ALWAYS
    """What is worth least is left out first."""


_WORTH = {"Starts": 90, "Where": 90, "Why": 80, "Also": 60, "Done": 55, "Tried": 45, "Not it": 35, "More": 65, "or": 25}
_WORTH |= {
    "Prompts": 72,
    "Spread": 58,
    "Share": 30,
    "Rescued": 85,
    "Note": 46,
    "Rescue": 85,
    "No rescue": 57,
    "Go on": 50,
    "Engine": 88,
    "Engines": 48,
    "Logits": 20,
}
"""Of a fact or a step, by its label; 75 for any other. What hangs below one is worth as much."""
_ROOM = 40


def render_screen(view: View) -> str:
    """What is new against a baseline; a screen a report; of the checkpoints of a folder a table before it, and a screen
    of the first that are not well."""
    lines = list(change_lines(view))
    more = len(lines) - _CHANGED
    shown = [*lines[:_CHANGED], *([f"… and {more} more lines: see the table."] if more > 0 else [])]
    changed = [printed([Text(line) for line in shown], view)] if shown else []
    if len(view.reports) == 1 or any(report.corpus is None for report in view.reports):
        room = MOST_LINES - sum(part.count("\n") + 1 for part in changed)
        return "\n".join([*changed, *(_screen(report, view, room) for report in view.reports)])
    ill = [report for report in view.reports if set(report.verdict.values()) - {"ok"}]
    rest = f"… and {len(ill) - _SCREENS} more that are not OK: see the table.\n" if len(ill) > _SCREENS else ""
    parts = [printed([side_by_side(view.reports)], view), *changed]
    parts += [_screen(report, view, MOST_LINES) for report in ill[:_SCREENS]]
    return "\n".join([*parts, *([rest] if rest else [])])


def _screen(report: Report, view: View, most: int) -> str:
    told = answer(report, view.record if len(view.reports) == 1 else "")
    parts = [
        list(part) for part in (_head(told, report, view), _facts(told, view), _rooms(told, view), _steps(told, view))
    ]
    while _lines(parts) > most:
        blocks = [block for part in parts for block in part if block.worth < _ALWAYS]
        if not blocks:
            break
        least = min(block.worth for block in blocks)
        parts = [[block for block in part if block.worth != least] for part in parts]
    return "\n".join("".join(block.text for block in part) for part in parts if part)


def _lines(parts: list[list[_Block]]) -> int:
    """With a blank line between parts."""
    shown = [part for part in parts if part]
    return sum(block.text.count("\n") for part in shown for block in part) + len(shown) - 1


# -- the parts ----------------------------------------------------------------------------------------------------


def _head(told: Answer, report: Report, view: View) -> Iterator[_Block]:
    title, ran = safe(told.title), safe(told.ran)
    between = "   " if cell_len(title) + cell_len(ran) + 3 <= view.width else "\n"
    both = _cut(Text(title, "bold"), 1, view.width), between, _cut(Text(ran), 1, view.width)
    first: list[RenderableType] = [Text.assemble(*both), Text()]
    for each in told.verdicts:
        verdict = Text(f"{each.verdict.upper():6}", VERDICT[each.verdict]).append(
            f" {safe(each.said)}", "default not bold"
        )
        first.append(_labelled(each.dtype, verdict, 2, view.width))
    yield _Block(printed(first, view))
    made = report.run.generation
    if made is not None and made.rows:
        yield _Block("\n" + printed(_texts(made.rows, view.width), view), 70)


def _texts(rows: list[Continuation], width: int) -> Iterator[RenderableType]:
    for row in rows[:_ROWS]:
        yield _labelled(f"row {row.row}", Text(quoted(row.input, 200)), 1, width)
        yield _labelled("  gives", Text(quoted(row.text, 400)), 2, width)
        if not row.text or not ended_by_itself(row):
            yield _labelled("", Text(went(row)), 1, width)
    if len(rows) > _ROWS:
        yield _labelled("", Text(f"and {count(len(rows) - _ROWS, 'more row')}"), 1, width)


def _facts(told: Answer, view: View) -> Iterator[_Block]:
    worth = 0
    for fact in told.facts:
        worth = _WORTH.get(fact.label, 75) if fact.label else worth
        yield _Block(printed([_fact(fact, view.width)], view), worth)


def _fact(fact: Fact, width: int) -> RenderableType:
    lines = {"Stopped": 4, "Not seen": 4, "Not done": 4, "See it": 4, "Why": 3, "Not it": 1}.get(fact.label, 2)
    return _labelled(fact.label, Text(safe(fact.text, 600)), lines, width)


def _rooms(told: Answer, view: View) -> Iterator[_Block]:
    """The least headroom of each layer, from the first to the last."""
    if not told.rooms:
        return
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column("label", width=_LABEL - 1, no_wrap=True, style="bold")
    for _ in told.rooms:
        table.add_column(justify="right", no_wrap=True, min_width=6)
    table.add_row("Layer", *(Text(each.layers, "dim") for each in told.rooms))
    table.add_row(f"{told.dtype} room", *(Text(room(each.headroom), room_style(each.headroom)) for each in told.rooms))
    yield _Block(printed([table], view), _ROOM)


def _steps(told: Answer, view: View) -> Iterator[_Block]:
    for step in told.steps:
        yield _Block(printed(_step(step, view.width), view), _WORTH.get(step.label, 75))


def _step(step: Step, width: int) -> Iterator[RenderableType]:
    """A command alone on its line; what it is for below it."""
    label = step.label
    if step.command:
        yield Pasted(f"{set_cell_size(label, _LABEL)}{step.command}")
        label = ""
    if step.said:
        yield _labelled(label, Text(safe(step.said, 400)), 3, width)


# -- laying out ---------------------------------------------------------------------------------------------------


def _labelled(label: str, text: Text, lines: int, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 0))
    table.add_column("label", width=_LABEL, no_wrap=True, style="bold")
    table.add_column("text", overflow="fold")
    table.add_row(label, _cut(text, lines, width - _LABEL))
    return table


def _cut(text: Text, lines: int, width: int) -> Text:
    """The first so many lines of a text, with a sign where more followed."""
    wrapped = text.wrap(Console(width=width), width)
    if len(wrapped) <= lines:
        return text
    kept = wrapped[:lines]
    kept[-1].truncate(width - 1, overflow="crop")
    kept[-1].append("…")
    return Text("\n").join(kept)
