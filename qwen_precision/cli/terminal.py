"""What reaches a person: results on stdout; notes, errors and progress on stderr, quiet where it is no terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rich import progress as bars
from rich.console import Console

from qwen_precision.errors import QprecError
from qwen_precision.progress import Progress
from qwen_precision.render import FORMATS, View, safe


class _State:
    """Of one call of the program."""

    quiet = False
    bar: bars.Progress | None = None
    """While there is one, notes are printed above it."""


def be_quiet(quiet: bool) -> None:
    """From here on nothing but errors is said (or, again, everything)."""
    _State.quiet = quiet


def quiet() -> bool:
    """Whether only errors are said."""
    return _State.quiet


_NARROWEST, _WIDEST = 20, 500
"""COLUMNS may be any number, and tables are filled up to it."""


def render(view: View, name: str, plain: bool = False) -> str | bytes:
    """Reports in one of the formats, as wide as the terminal; ``plain`` for what goes into a file."""
    terminal = _is_terminal() and not plain
    return FORMATS[name].render(replace(view, width=_width(terminal), colour=_colour(terminal) and not plain))


def labelled(rows: Iterable[tuple[str, str]], column: int) -> str:
    """Sentences behind their names, as wide as the terminal.

    Args:
        rows: names, and strings that strangers may have written.
        column: where the sentences begin.
    """
    width, indent = _width(_is_terminal()), " " * column
    fill = partial(textwrap.fill, width=width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "".join(f"{fill(f'{name:{column}}{safe(said, 400)}')}\n" for name, said in rows)


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _width(terminal: bool) -> int:
    width = shutil.get_terminal_size((80, 24)).columns if terminal or "COLUMNS" in os.environ else 80
    return min(max(width, _NARROWEST), _WIDEST)


def _colour(terminal: bool) -> bool:
    """https://no-color.org and https://force-color.org: the first wins."""
    wanted = terminal or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


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
        nobody_reads()
    except OSError as error:
        raise QprecError(f"stdout: cannot be written ({error.strerror}).") from error


def nobody_reads() -> None:
    """The reader of a pipe (head, a pager) went away: that is its right, and the exit code stays that of the run."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def note(text: str) -> None:
    """A line on stderr that says what happened or what is done now."""
    if _State.quiet:
        return
    _say(_State.bar.console if _State.bar is not None else _stderr(), safe(text, 10_000), "dim")


def _say(console: Console, text: str, style: str | None = None) -> None:
    """A line on stderr. Where that is closed, or on a full disk, nobody can be told, and the exit code still counts."""
    with suppress(OSError, ValueError):
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True, style=style)


OnToken = Callable[[Any, int, int], None]


@contextmanager
def progress() -> Iterator[tuple[Progress, OnToken]]:
    """A bar on stderr; nothing at all where stderr is not a terminal. Tokens are not shown."""
    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=24),
        bars.TextColumn("{task.fields[counted]}", markup=False),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    off = not console.is_terminal or _State.quiet
    with bars.Progress(*columns, console=console, transient=True, disable=off) as bar:
        task = bar.add_task("loading torch and transformers", total=None, counted="")
        _State.bar = None if off else bar

        def show(done: int, total: int, what: str) -> None:
            counted = f"{done:,} of {total:,}" if total else ""
            bar.update(task, completed=done, total=total or None, description=what, counted=counted)

        try:
            yield show, lambda tokenizer, row, token: None
        finally:
            _State.bar = None


class _Stream:
    """Text of growing id lists, printed piece by piece; a stdout that went away ends the printing, not the run."""

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._printed: dict[int, int] = {}
        self._row, self._told, self._dead = -1, "", False

    def show(self, done: int, total: int, what: str) -> None:
        """Only what takes long is told."""
        if not total and what != self._told:
            note(what)
        self._told = what

    def on_token(self, tokenizer: Any, row: int, token: int) -> None:
        """Print what is new and whole: the end of a character may come with the next token."""
        held = self._held.setdefault(row, [])
        held.append(token)
        text = str(tokenizer.decode(held, skip_special_tokens=True))
        whole = text.rstrip("\ufffd")
        new = whole[self._printed.get(row, 0) :]
        self._printed[row] = max(len(whole), self._printed.get(row, 0))
        if new:
            self._write(row, new)
        if len(held) > 64 and whole == text:  # decode no more than is needed to place a space or join a character
            self._held[row] = held[-16:]
            self._printed[row] = len(tokenizer.decode(self._held[row], skip_special_tokens=True))

    def end(self) -> None:
        """Set off what follows."""
        if self._row != -1:
            self._write(self._row, "\n\n")

    def _write(self, row: int, text: str) -> None:
        if self._dead:
            return
        head = f"\n[row {row}] " if row != self._row and (self._row != -1 or row) else ""
        self._row = row
        try:
            result(head + "".join(char if char in "\n\t" else safe(char) for char in text))
        except (OSError, QprecError):
            self._dead = True


@contextmanager
def streaming() -> Iterator[tuple[Progress, OnToken]]:
    """Tokens on stdout as they come, as text; no bar beside them."""
    stream = _Stream()
    try:
        yield stream.show, stream.on_token
    finally:
        stream.end()


def error(text: str) -> None:
    """The one sentence of a failure, on stderr."""
    _say(_stderr(), f"qprec: {safe(text, 10_000)}")


def help_text(text: str) -> None:
    """The help, on stderr, where it was not asked for."""
    _say(_stderr(), text)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
