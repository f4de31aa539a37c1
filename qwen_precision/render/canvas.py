"""What every picture is drawn on: axes with words that do not collide, an SVG whose points tell their value, a PNG.

In a page the background is the page's and words are of a grey that is read on light and dark; alone, a picture brings
its own white background and a title. Strings are drawn as they are: no mathematics, no sign that the font lacks.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from qwen_precision.judge import Report
from qwen_precision.render.text import safe
from qwen_precision.render.view import model_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#888888"
RED = "#d1495b"
QUIET = "#5b7f9e"
DTYPES_IN = {"fp16": RED, "bf16": "#2e86ab", "fp32": "#66a182"}
ROWS_IN = (QUIET, "#66a182", "#a06c9e")
_INK = "#333333"
_POINTS = 72
"""Units of an SVG that are an inch."""
_MOST_LABELS = 16
"""Along the lower edge; so many numbers of two digits stand beside each other."""


@dataclass(frozen=True)
class Spot:
    """A place that tells its value to who points at it; in the data's own units."""

    axes: Any
    left: float
    right: float
    low: float
    high: float
    says: str
    grow: float = 0.0
    """Points that are added on every side: a dot alone is hard to hit."""


@dataclass
class Canvas:
    """A picture on its way."""

    figure: Figure
    axes: list[Any]
    spots: list[Spot] = field(default_factory=list)

    def point(self, axes: Any, x: float, y: float, says: str) -> None:
        """Let a point tell its value."""
        self.spots.append(Spot(axes, x, x, y, y, says, grow=5.0))


def canvas(rows: int = 1, height: float = 3.2) -> Canvas:
    """An empty picture, ``height`` inches high, of so many axes one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    made = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)
    return Canvas(figure, [row[0] for row in made])


def below(drawn: Canvas, height: float) -> Any:
    """Axes of their own under a picture, which grows by so many inches."""
    figure = drawn.figure
    before = figure.get_figheight()
    figure.set_figheight(before + height)
    each = before / len(drawn.axes)
    grid = figure.add_gridspec(len(drawn.axes) + 1, 1, height_ratios=[*[each] * len(drawn.axes), height])
    for number, axes in enumerate(drawn.axes):
        axes.set_subplotspec(grid[number])
    drawn.axes.append(figure.add_subplot(grid[len(drawn.axes)]))
    return drawn.axes[-1]


def label(axes: Any, across: str, up: str) -> None:
    """Names of the axes; everything but the data is grey."""
    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=GREY, which="both")
    for side in axes.spines.values():
        side.set_color(GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def count_across(axes: Any) -> None:
    """Whole numbers along the lower edge: there is no layer 2.5."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def every(count: int) -> int:
    """Of so many numbers beside each other, each how-manieth can be written without touching the next."""
    steps = (base * 10**power for power in range(6) for base in (1, 2, 5))
    return next((step for step in steps if math.ceil(count / step) <= _MOST_LABELS), count)


def drawable(text: str, longest: int = 60) -> str:
    """A stranger's text, inert, with a box for each sign that the font of the pictures lacks."""
    return "".join(char if _has(char) else "▯" for char in safe(text, longest))


def plain(made: Any) -> Any:
    """A drawn text in which a dollar is a dollar, and starts no formula."""
    made.set_parse_math(False)
    return made


@cache
def _has(char: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return bool(get_font(findfont("DejaVu Sans")).get_char_index(ord(char)))


def titled(drawn: Canvas, report: Report) -> Canvas:
    """The picture as it goes about alone: a background of its own, words in ink, the model and what was decided."""
    from matplotlib.colors import same_color
    from matplotlib.text import Text

    figure = drawn.figure
    figure.patch.set_alpha(1.0)
    figure.patch.set_facecolor("white")
    for text in figure.findobj(Text):
        if same_color(text.get_color(), GREY):
            text.set_color(_INK)
    for axes in figure.axes:
        axes.tick_params(labelcolor=_INK, which="both")
    verdicts = ", ".join(f"{dtype} {verdict.upper()}" for dtype, verdict in report.verdict.items())
    title = f"{drawable(model_named(report))}\n{drawable(verdicts)}"
    plain(figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK))
    return drawn


def as_png(drawn: Canvas) -> bytes:
    """PNG; the same picture gives the same bytes."""
    sink = io.BytesIO()
    drawn.figure.savefig(sink, format="png", dpi=120, metadata={"Software": "qprec"})
    return sink.getvalue()


def as_svg(drawn: Canvas) -> str:
    """SVG, from its XML declaration on; pointing at a spot shows what it says, without a script."""
    import matplotlib

    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "qprec", "svg.fonttype": "path"}):
        drawn.figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": "qprec"})
    text = sink.getvalue()
    at = text.rindex("</svg>")
    return text[:at] + _hover(drawn) + text[at:]


def _hover(drawn: Canvas) -> str:
    """Unseen rectangles over the spots, each with its title; where they lie is known once the picture is drawn."""
    if not drawn.spots:
        return ""
    height = drawn.figure.get_figheight() * _POINTS
    inches = drawn.figure.dpi_scale_trans.inverted()
    lines = []
    for spot in drawn.spots:
        corners = inches.transform(spot.axes.transData.transform([(spot.left, spot.low), (spot.right, spot.high)]))
        (left, bottom), (right, top) = corners * _POINTS
        left, right = min(left, right) - spot.grow, max(left, right) + spot.grow
        bottom, top = min(bottom, top) - spot.grow, max(bottom, top) + spot.grow
        box = f'x="{left:.1f}" y="{height - top:.1f}" width="{right - left:.1f}" height="{top - bottom:.1f}"'
        lines.append(f"<rect {box}><title>{escape(safe(spot.says))}</title></rect>")
    return '<g fill="none" stroke="none" pointer-events="all">\n' + "\n".join(lines) + "\n</g>\n"
