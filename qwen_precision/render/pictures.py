"""Pictures of a report: headroom by layer, magnitude by layer and operation, entropy and margin by step.

SVG for the HTML page (its text takes the page's colour), SVG and PNG by themselves. Matplotlib is imported when a
picture is drawn, so that a table costs nothing. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge import Report, precision
from qwen_precision.qwen3 import name_of
from qwen_precision.render.text import safe
from qwen_precision.render.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = "#888888"
_COLOURS = {"fp16": "#d1495b", "bf16": "#2e86ab", "fp32": "#66a182"}
_OPERATIONS = 24
"""Rows of the heat map; the operations that are largest anywhere."""


def render_svg(view: View) -> str:
    """The headroom picture (the steps, of a generation) of the first report, as an SVG file."""
    return _svg(_main(view.reports[0]), alone=True)


def render_png(view: View) -> bytes:
    """The same as a PNG file."""
    figure, sink = _main(view.reports[0]), io.BytesIO()
    figure.savefig(sink, format="png", dpi=120, facecolor="white", metadata={"Software": "qprec"})
    return sink.getvalue()


def pictures(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of everything there is to draw."""
    drawn = [
        (
            "Headroom by layer: the dtype's largest number over the largest magnitude. Below the line it overflows.",
            headroom(report),
        ),
        ("The same for the dtypes with a wide range, which would flatten the line above.", headroom(report, wide=True)),
        (
            "Magnitude by layer and operation, log2. The dtype's limit is the end of the scale; a cross is beyond it.",
            heat_map(report),
        ),
        ("Relative error against fp32 after each layer, on the dtype's own stream.", error_growth(report)),
        ("Entropy and margin by step; a cross marks logits that could not be used.", steps(report)),
    ]
    return [(caption, _svg(figure)) for caption, figure in drawn if figure is not None]


def _main(report: Report) -> Figure:
    return steps(report) or headroom(report) or headroom(report, wide=True) or _empty()


def headroom(report: Report, wide: bool = False) -> Figure | None:
    """The least headroom of each layer, a line a dtype: those whose range is as narrow as fp16's, or the others."""
    lines: dict[str, dict[int, float]] = {}
    for dtype in report.headroom:
        for row in report.tightest(dtype) if (DTYPES[dtype].max > 1e30) == wide else ():
            layer = report.run.sites[row.site].layer
            if layer is not None and row.headroom < math.inf:
                lines.setdefault(dtype, {})[layer] = max(row.headroom, 1e-3)
    if not lines:
        return None
    figure, axes = _canvas()
    for dtype, points in lines.items():
        layers = sorted(points)
        axes.plot(layers, [points[layer] for layer in layers], marker="o", ms=4, color=_COLOURS[dtype], label=dtype)
    axes.axhline(1.0, color=_COLOURS["fp16"], linestyle="--", linewidth=1)
    axes.set_yscale("log")
    _labels(axes, "layer", "headroom (x)")
    axes.legend(frameon=False, labelcolor=_GREY)
    return figure


def heat_map(report: Report) -> Figure | None:
    """log2 of the largest magnitude in the reference (or the first dtype), over layers and operations."""
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
    if not cells:
        return None
    names = sorted(cells, key=lambda name: -max(cells[name].values()))[:_OPERATIONS]
    layers = sorted({layer for name in names for layer in cells[name]})
    grid = [[math.log2(cells[name][layer]) if layer in cells[name] else math.nan for layer in layers] for name in names]
    figure, axes = _canvas(height=1.2 + 0.24 * len(names))
    limit = math.log2(DTYPES["fp16"].max)
    image = axes.imshow(grid, aspect="auto", vmin=-4, vmax=limit, cmap="viridis", interpolation="nearest")
    over = [(x, y) for y, row in enumerate(grid) for x, value in enumerate(row) if value > limit]
    if over:
        axes.scatter([x for x, _ in over], [y for _, y in over], marker="x", color=_COLOURS["fp16"], s=30)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    _labels(axes, "layer", "")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("log2 of magnitude; the end is fp16's largest number", color=_GREY)
    bar.ax.tick_params(colors=_GREY)
    return figure


def error_growth(report: Report) -> Figure | None:
    """Relative error by layer, a line a dtype."""
    found = {dtype: each.layers for dtype, each in precision(report.run).items() if any(each.layers)}
    if not found:
        return None
    figure, axes = _canvas()
    for dtype, layers in found.items():
        values = [math.nan if value is None else max(value, 1e-9) for value in layers]
        axes.plot(range(len(values)), values, marker="o", ms=4, color=_COLOURS[dtype], label=dtype)
    axes.set_yscale("log")
    _labels(axes, "layer", "relative error")
    axes.legend(frameon=False, labelcolor=_GREY)
    return figure


def steps(report: Report) -> Figure | None:
    """Entropy and margin by step of the first rows of a generation."""
    made = report.run.generation
    if made is None or not any(row.ids for row in made.rows):
        return None
    figure, (top, bottom) = _canvas(rows=2, height=4.6)
    palette = list(_COLOURS.values())
    for row, colour in zip(made.rows, palette, strict=False):
        for axes, column in ((top, row.entropy), (bottom, row.margin)):
            axes.set_ylim(bottom=0.0)
            values = [math.nan if value is None else value for value in column]
            axes.plot(range(len(values)), values, marker=".", color=colour, label=f"row {row.row}")
            bad = [step for step, value in enumerate(values) if not math.isfinite(value)]
            axes.scatter(bad, [0.0] * len(bad), marker="x", color=colour)
    _labels(top, "", "entropy (nats)")
    _labels(bottom, "step", "margin (logits)")
    top.legend(frameon=False, labelcolor=_GREY)
    return figure


def _canvas(rows: int = 1, height: float = 3.2) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure, figure.subplots(rows, 1, sharex=rows > 1)


def _labels(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across, color=_GREY)
    axes.set_ylabel(up, color=_GREY)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=_GREY, which="both")
    for side in axes.spines.values():
        side.set_color(_GREY)


def _empty() -> Figure:
    figure, axes = _canvas()
    _labels(axes, "", "")
    axes.text(0.5, 0.5, "nothing was measured", ha="center", color=_GREY, transform=axes.transAxes)
    return figure


def _svg(figure: Figure, alone: bool = False) -> str:
    import matplotlib

    if alone:
        figure.patch.set_alpha(1.0)
        figure.patch.set_facecolor("white")
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "qprec", "svg.fonttype": "path"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": "qprec"})
    text = sink.getvalue()
    return text if alone else text[text.index("<svg") :]
