"""Pictures of a report: largest magnitude by layer, and by operation, error by layer, entropy and margin by step,
bytes of logits by length.

SVG for the HTML page (its text takes the page's colour), SVG and PNG by themselves. Matplotlib is imported when a
picture is drawn, so that a table costs nothing. The same report gives the same bytes.
"""

from __future__ import annotations

import math
from textwrap import wrap
from typing import Any

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.judge import Cost, Report, cost, sized
from qwen_precision.qwen3 import name_of
from qwen_precision.record import Generation
from qwen_precision.render import canvas as on
from qwen_precision.render.canvas import Canvas
from qwen_precision.render.headroom import headroom
from qwen_precision.render.text import number as written
from qwen_precision.render.text import safe
from qwen_precision.render.view import View
from qwen_precision.render.words import logits

_OPERATIONS = 24
"""Rows of the heat map; the operations that are largest anywhere."""
_BELOW = 2.6
"""Inches of the picture of logits where it stands below another."""
_ABOVE = 50
"""Times the largest number, as much room there is above it for words."""
_SHORTEST = 1
"""Tokens with which its lines begin."""
_WORDS = 94
"""Signs of a line above it."""
_LEAST = -4
"""log2 of the magnitude at which the heat map's colours begin."""


def render_svg(view: View) -> str:
    """The headroom picture (the steps, of a generation) of one report, above what its logits cost, as SVG: of several,
    the first that fails."""
    return on.as_svg(_alone(view.shown))


def render_png(view: View) -> bytes:
    """The same as a PNG file."""
    return on.as_png(_alone(view.shown))


def pictures(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of everything there is to draw."""
    drawn = [
        (
            "Largest magnitude of the tightest operation of each layer. What reaches the shaded region, beyond the "
            "dtype's largest number, overflows.",
            headroom(report),
        ),
        ("The same for the dtypes with a wide range.", headroom(report, wide=True)),
        (
            "Largest magnitude by layer and operation. The scale ends at fp16's largest number; a cross is beyond it.",
            heat_map(report),
        ),
        (
            "Relative error against fp32 after each layer, while a row is finite.",
            error_growth(report),
        ),
        ("Entropy and margin by step; a cross above marks logits that could not be used.", steps(report)),
        (
            "Bytes of logits by length of the prompt: of all its positions, as a forward gives them unasked, and of "
            "the last alone.",
            logits_by_length(report),
        ),
    ]
    texts = [(caption, on.as_svg(made)) for caption, made in drawn if made is not None]
    return [(caption, text[text.index("<svg") :]) for caption, text in texts]


def _alone(report: Report) -> Canvas:
    """The picture that says most, and below it what float32 logits buy and cost, where that was measured."""
    main = steps(report) or headroom(report) or headroom(report, wide=True)
    drawn = logits_by_length(report, main) or main or _empty()
    if cost(report.run) is not None:
        words = "\n".join(part for line in logits.saved(report) for part in wrap(line, _WORDS))
        drawn.axes[-1].set_title(words, loc="left", fontsize=9, color=on.GREY)
    return on.titled(drawn, report)


def heat_map(report: Report) -> Canvas | None:
    """log2 of the largest magnitude in the reference (or the first dtype), over layers and operations."""
    cells = _cells(report)
    if not cells:
        return None
    names = sorted(cells, key=lambda name: -max(cells[name].values()))[:_OPERATIONS]
    layers = sorted({layer for name in names for layer in cells[name]})
    grid = [[math.log2(cells[name][layer]) if layer in cells[name] else math.nan for layer in layers] for name in names]
    drawn = on.canvas(height=max(2.4, 1.2 + 0.24 * len(names)))
    (axes,) = drawn.axes
    limit = math.log2(DTYPES["fp16"].max)
    image = axes.imshow(grid, aspect="auto", vmin=_LEAST, vmax=limit, cmap="viridis", interpolation="nearest")
    over = [(x, y) for y, row in enumerate(grid) for x, value in enumerate(row) if value > limit]
    if over:
        axes.scatter([x for x, _ in over], [y for _, y in over], marker="x", color=on.RED, s=30)
    axes.set_yticks(range(len(names)), [on.drawable(name) for name in names], fontsize=8)
    for each in axes.get_yticklabels():
        on.plain(each)
    step = on.every(len(layers))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    on.label(axes, "layer", "")
    _scale(drawn, image, limit)
    for y, name in enumerate(names):
        for x, layer in enumerate(layers):
            if layer in cells[name]:
                says = f"layer {layer}, {name}: {written(cells[name][layer])}"
                drawn.spots.append(on.Spot(axes, x - 0.5, x + 0.5, y - 0.5, y + 0.5, says))
    return drawn


def _cells(report: Report) -> dict[str, dict[int, float]]:
    """Largest magnitude by operation and layer."""
    run = report.run
    # What a norm computes in fp32 may be as large as it likes: it is not the dtype's to hold.
    wider = run.wider.get("fp16") or run.wider.get(run.dtypes[0] if run.dtypes else "", {})
    passes = [p for p in run.passes if p.dtype == "fp32"] or [p for p in run.passes if p.dtype == run.dtypes[0]]
    cells: dict[str, dict[int, float]] = {}
    for each in passes:
        for number, (site, value) in enumerate(zip(run.sites, each.abs_max, strict=True)):
            if number not in wider and site.layer is not None and value is not None and value > 0:
                row = cells.setdefault(safe(name_of(site.module, site.op, site.call), 40), {})
                row[site.layer] = max(row.get(site.layer, 0.0), min(value, 1e38))
    return cells


def _scale(drawn: Canvas, image: Any, limit: float) -> None:
    """The bar beside the heat map, in magnitudes."""
    ticks = [_LEAST, 0, 4, 8, 12, limit]
    bar = drawn.figure.colorbar(image, ax=drawn.axes[0], ticks=ticks)
    bar.ax.set_yticklabels([written(2.0**tick) for tick in ticks])
    bar.set_label("largest magnitude\n(log scale)", color=on.GREY)
    bar.ax.tick_params(colors=on.GREY)


def error_growth(report: Report) -> Canvas | None:
    """Relative error by layer, a line a dtype."""
    found = {dtype: each.layers for dtype, each in report.precision.items() if any(each.layers)}
    if not found:
        return None
    drawn = on.canvas()
    (axes,) = drawn.axes
    for dtype, layers in found.items():
        values = [math.nan if value is None else max(value, 1e-9) for value in layers]
        axes.plot(range(len(values)), values, marker="o", ms=4, color=on.DTYPES_IN[dtype], label=dtype)
        for layer, value in enumerate(values):
            if math.isfinite(value):
                drawn.point(axes, layer, value, f"layer {layer}, {dtype}: {written(value)}")
    axes.set_yscale("log")
    on.count_across(axes)
    on.label(axes, "layer", "relative error (log scale)")
    axes.legend(frameon=False, labelcolor=on.GREY)
    return drawn


def steps(report: Report) -> Canvas | None:
    """Entropy and margin by step of the first rows of a generation."""
    made = report.run.generation
    if made is None or not any(row.ids for row in made.rows):
        return None
    drawn = on.canvas(rows=2, height=4.6)
    top, bottom = drawn.axes
    for row, colour in zip(made.rows, on.ROWS_IN, strict=False):
        for axes, column, what in ((top, row.entropy, "entropy"), (bottom, row.margin, "margin")):
            values = [math.nan if value is None else value for value in column]
            axes.plot(range(len(values)), values, marker=".", color=colour, label=f"row {row.row}")
            for step, value in enumerate(values):
                if math.isfinite(value):
                    drawn.point(axes, step, value, f"step {step}, row {row.row}: {what} {written(value)}")
    for axes in drawn.axes:
        axes.set_ylim(bottom=0.0)  # only now: it would end the scaling to what is drawn later
        on.count_across(axes)
        _unusable(drawn, axes, made)
    on.label(top, "", "entropy (nats)")
    on.label(bottom, "step", "margin (logits)")
    top.legend(frameon=False, labelcolor=on.GREY)
    return drawn


def _unusable(drawn: Canvas, axes: Any, made: Generation) -> None:
    """A cross at the upper edge for each step without a value: lower down it would be read as one."""
    rows = made.rows[: len(on.ROWS_IN)]
    bad = [(step, row.row) for row in rows for step, value in enumerate(row.margin) if not _is_number(value)]
    top = axes.get_ylim()[1]
    axes.scatter([step for step, _ in bad], [top] * len(bad), marker="x", color=on.RED, clip_on=False, zorder=3)
    for step, row in bad:
        drawn.point(axes, step, top, f"step {step}, row {row}: cannot be told")
    if not any(_is_number(value) for row in rows for value in row.margin):
        axes.set_yticks([])


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def logits_by_length(report: Report, main: Canvas | None = None) -> Canvas | None:
    """Bytes of logits over tokens, in float32, in the narrowest dtype, and of the last position alone.

    Args:
        report: of one run.
        main: a picture that it stands below; None where it stands alone.
    """
    taken = cost(report.run)
    if taken is None:
        return None
    drawn = main or on.canvas()
    axes = on.below(drawn, _BELOW) if main is not None else drawn.axes[0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    last = taken.longer[0].float32 // taken.longer[0].tokens
    tokens = [each.tokens for each in taken.longer]
    ends = [_SHORTEST, tokens[-1]]
    lines = [("float32", on.DTYPES_IN["fp32"], last)]
    if taken.dtype != REFERENCE:
        lines.append((taken.dtype, on.DTYPES_IN[taken.dtype], taken.longer[0].narrow // tokens[0]))
    for name, colour, each in lines:
        axes.plot(ends, [each * end for end in ends], color=colour, label=f"whole prompt, {name}")
        axes.plot(tokens, [each * end for end in tokens], "o", ms=4, color=colour)
        for end in tokens:
            drawn.point(axes, end, each * end, f"{end:,} tokens: {sized(each * end)} in {name}")
    for end in tokens:
        above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "right", "fontsize": 9}
        axes.annotate(sized(last * end), (end, last * end), color=on.DTYPES_IN["fp32"], **above)
    axes.plot(ends, [last] * 2, color=on.QUIET, linestyle="--", label="last position alone, float32")
    axes.annotate(sized(last), (tokens[0], last), color=on.QUIET, **above)
    _our_own(drawn, axes, taken)
    _length_axes(axes, [_SHORTEST, *tokens])
    return drawn


def _length_axes(axes: Any, tokens: list[int]) -> None:
    """Numbers along the edges: a few lengths, a few powers of ten, and room above for what is written there."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * _ABOVE)
    axes.set_yticks([10.0**power for power in range(0, 16, 2) if low <= 10.0**power <= high])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: sized(int(value)))
    axes.set_xticks(tokens)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    on.label(axes, "tokens of all rows (log scale)", "bytes of its logits\n(log scale)")
    axes.legend(frameon=False, labelcolor=on.GREY, fontsize=9, loc="upper left")


def _our_own(drawn: Canvas, axes: Any, taken: Cost) -> None:
    """Where the run's own prompt is, with all rows of its batch, and what was held of it."""
    whole = taken.whole
    tokens = whole.rows * whole.tokens
    said = f"this prompt, {tokens:,} tokens: {sized(whole.float32)} in float32"
    marks = [(whole.float32, "o", 9, on.DTYPES_IN["fp32"], "this run", said)]
    if taken.held is not None:
        held = f"the largest tensor of logits here: {sized(taken.held)}"
        marks.append((taken.held, "s", 6, on.QUIET, "largest tensor here", held))
    for size, marker, points, color, label, said in marks:
        axes.plot([tokens], [size], marker=marker, ms=points, mfc="none", color=color, linestyle="", label=label)
        drawn.point(axes, tokens, size, said)


def _empty() -> Canvas:
    drawn = on.canvas()
    (axes,) = drawn.axes
    on.label(axes, "", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "nothing was measured", ha="center", color=on.GREY, transform=axes.transAxes)
    return drawn
