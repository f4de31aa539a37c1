"""Rich's console as a way to text: everything that is shown on a terminal is laid out here first."""

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType

from qwen_precision.render.view import View

VERDICT = {"ok": "green", "risk": "yellow", "fail": "bold red", "incomplete": "yellow"}
"""Style of a verdict."""


def room_style(headroom: float) -> str:
    """Style of a headroom: below 1 it overflows, below 2 it is a risk."""
    return "red" if headroom < 1 else "yellow" if headroom < 2 else "green"


class Pasted(str):
    """A command line: printed on one line however narrow the terminal is, so that it can be copied whole."""


def printed(parts: Iterable[RenderableType], view: View) -> str:
    """What a console of the view's width and colours shows, without blanks at the ends of lines."""
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
    for part in parts:
        if isinstance(part, Pasted):
            console.print(part, soft_wrap=True, markup=False, style="bold")
        else:
            console.print(part)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()).rstrip() + "\n"
