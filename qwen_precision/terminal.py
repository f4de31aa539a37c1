"""What reaches a person: results on stdout; notes, errors and progress on stderr, quiet where it is no terminal."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qwen_precision.errors import QprecError
from qwen_precision.findings import Report
from qwen_precision.render import RENDERERS
from qwen_precision.render.text import safe


def render(judged: Report, name: str, fail_on: str, plain: bool = False) -> str:
    """A report in one of the formats, as wide as the terminal; ``plain`` for what goes into a file."""
    if name != "table":
        return RENDERERS[name](judged, fail_on)
    terminal = sys.stdout is not None and sys.stdout.isatty() and not plain
    width = shutil.get_terminal_size((80, 24)).columns if terminal or "COLUMNS" in os.environ else 80
    return RENDERERS[name](judged, fail_on, width=width, colour=_colour(terminal))


def _colour(terminal: bool) -> bool:
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def result(text: str) -> None:
    """Write to stdout, and notice here if that cannot be done."""
    if sys.stdout is None:
        raise QprecError("stdout is closed; give -o FILE to write to a file.")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets ? instead of nothing
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise QprecError(f"stdout: cannot be written ({error.strerror}).") from error


def note(text: str) -> None:
    """A line on stderr that says what happened or what to do next."""
    _stderr().print(text, markup=False, style="dim")


Show = Callable[[int, int, str], None]
OnToken = Callable[[Any, int, int], None]


@contextmanager
def progress() -> Iterator[tuple[Show, OnToken]]:
    """A bar on stderr; nothing at all where stderr is not a terminal. Tokens are not shown."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the checkpoint", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        yield show, lambda tokenizer, row, token: None


@contextmanager
def streaming() -> Iterator[tuple[Show, OnToken]]:
    """Tokens on stdout as they come, as text; no bar beside them, only what takes long is told."""
    rows: dict[int, list[int]] = {}
    state = {"row": -1, "told": ""}

    def show(done: int, total: int, what: str) -> None:
        if not total and what != state["told"]:
            note(what)
        state["told"] = what

    def on_token(tokenizer: Any, row: int, token: int) -> None:
        held = rows.setdefault(row, [])
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # a part of a character: wait for the rest
            return
        before = tokenizer.decode(held[:-1], skip_special_tokens=True).rstrip("\ufffd")
        rows[row] = held[-16:]  # enough to place a space or join a character, and no more to decode again
        if row != state["row"] and (state["row"] != -1 or row):
            result(f"\n[row {row}] ")
        state["row"] = row
        result("".join(char if char in "\n\t" else safe(char) for char in text[len(before) :]))

    try:
        yield show, on_token
    finally:
        if rows:
            result("\n\n")


def error(text: str) -> None:
    """The one sentence of a failure, on stderr."""
    _stderr().print(f"qprec: {text}", markup=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
