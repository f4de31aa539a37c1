"""The picture of a probe: how large each layer's tightest operation gets, against what the dtype can hold.

It says by itself what the verdict says: the dtype's limit is drawn and named, what lies beyond is shaded, and the first
failure (of a healthy model, the least headroom) is pointed at by operation, number and token.
"""

from __future__ import annotations

import math
from typing import Any

from qwen_precision.dtypes import DTYPES, largest
from qwen_precision.judge import Finding, Headroom, Report, Token
from qwen_precision.qwen3 import name_of, placed
from qwen_precision.render import canvas as on
from qwen_precision.render.canvas import Canvas
from qwen_precision.render.text import number, room

_ABOVE = 0.45
"""Of the height below the highest of limit and data, as much again above it: there the words stand."""

_ROOM = 0.45
"""Share of the height up to which a point has room for words between it and the limit."""

Lines = dict[str, dict[int, Headroom]]
"""By dtype and layer, the operation with the least headroom."""


def headroom(report: Report, wide: bool = False) -> Canvas | None:
    """The largest magnitude of each layer, a line a dtype: those whose range is as narrow as fp16's, or the others."""
    lines: Lines = {}
    for dtype in report.headroom:
        for row in report.tightest(dtype) if (DTYPES[dtype].max > 1e30) == wide else ():
            layer = report.run.sites[row.site].layer
            if layer is not None and row.headroom < math.inf:
                lines.setdefault(dtype, {})[layer] = row
    if not lines:
        return None
    drawn = on.canvas(height=3.8)
    (axes,) = drawn.axes
    limit = min(largest(dtype) for dtype in lines)
    axes.set_yscale("log")
    for dtype, rows in lines.items():
        _line(drawn, report, dtype, rows, on.DTYPES_IN[dtype] if len(lines) > 1 else on.QUIET)
    _limit(axes, lines, limit)
    _message(axes, report, lines)
    on.count_across(axes)
    on.label(axes, "layer", "largest magnitude (log scale)")
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=on.GREY, loc="center right")
    return drawn


def _line(drawn: Canvas, report: Report, dtype: str, rows: dict[int, Headroom], colour: str) -> None:
    (axes,) = drawn.axes
    layers, limit = sorted(rows), largest(dtype)
    sizes = [_drawn(rows[layer], limit) for layer in layers]
    axes.plot(layers, sizes, marker="o", ms=3.5, linewidth=1.2, color=colour, label=dtype)
    beyond = [(layer, size) for layer, size in zip(layers, sizes, strict=True) if size > limit]
    axes.plot([x for x, _ in beyond], [y for _, y in beyond], "o", ms=6, color=on.RED, zorder=3)
    for layer, size in zip(layers, sizes, strict=True):
        row = rows[layer]
        site = report.run.sites[row.site]
        where = placed(layer, name_of(site.module, site.op, site.call))
        drawn.point(axes, layer, size, f"{where}: {number(row.abs_max)}, headroom {room(row.headroom)} in {dtype}")


def _drawn(row: Headroom, limit: float) -> float:
    """Where a magnitude is drawn: what is not finite well beyond the limit, nothing below what a log scale can show."""
    size = row.abs_max if math.isfinite(row.abs_max) else limit * 8
    return min(max(size, 1e-9), 1e45)


def _limit(axes: Any, lines: Lines, limit: float) -> None:
    """The limit by name, and the quiet shade of what lies beyond it."""
    layers = sorted({layer for rows in lines.values() for layer in rows})
    sizes = {layer: max(_drawn(rows[layer], limit) for rows in lines.values() if layer in rows) for layer in layers}
    least = min(_drawn(row, limit) for rows in lines.values() for row in rows.values())
    low, high = math.log10(least) - 0.3, math.log10(max(limit, *sizes.values()))
    top = 10 ** (high + _ABOVE * (high - low))
    axes.set_ylim(10**low, top)
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.axhspan(limit, top, color=on.RED, alpha=0.08, linewidth=0)
    axes.axhline(limit, color=on.RED, linewidth=1.2)
    names = " and ".join(f"{dtype}'s" for dtype in lines)
    # At the end where the data is lower, below the line there, or above it where that is free.
    quarter = max(1, len(layers) // 4)
    first, last = (max(sizes[layer] for layer in part) for part in (layers[:quarter], layers[-quarter:]))
    left = first <= last
    axes.annotate(
        f"{names} largest number, {number(limit)}",
        (0.01 if left else 0.99, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 if min(first, last) <= limit else -3),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom" if min(first, last) <= limit else "top",
        fontsize=9,
        color=on.RED,
    )


def _message(axes: Any, report: Report, lines: Lines) -> None:
    """What the picture is about: the first failure, else the least headroom."""
    first = next((each for each in report.findings if each.dtype in lines and each.severity == "error"), None)
    if first is None:
        dtype = min(lines, key=lambda name: min(row.headroom for row in lines[name].values()))
        layer, row = min(lines[dtype].items(), key=lambda item: item[1].headroom)
        site = report.run.sites[row.site]
        where = on.drawable(placed(layer, name_of(site.module, site.op, site.call)))
        _point_at(axes, f"least headroom {room(row.headroom)}: {where}", on.GREY, layer, _drawn(row, largest(dtype)))
        return
    found = lines[first.dtype].get(first.place.layer) if first.place.layer is not None else None
    if found is None or first.place.layer is None:  # it lies in no layer: there is nothing to point at
        on.plain(axes.text(0.5, 0.97, _failure(first), color=on.RED, fontsize=9, ha="center", va="top", **_in(axes)))
        return
    size = first.magnitude.reference
    if size is None or not 0 < size < math.inf:
        size = _drawn(found, largest(first.dtype))
    layer = first.place.layer
    _point_at(axes, _failure(first), on.RED, layer, size)
    axes.axvspan(layer - 0.5, layer + 0.5, color=on.RED, alpha=0.08, linewidth=0)
    # Off the line where another operation of the layer is larger still.
    axes.plot([layer], [size], "o", ms=5, color=on.RED, zorder=4)
    axes.plot([layer], [size], "o", ms=11, fillstyle="none", color=on.RED, markeredgewidth=1.6, zorder=4)


def _in(axes: Any) -> dict[str, Any]:
    """Shares of the axes as coordinates."""
    return {"transform": axes.transAxes}


def _point_at(axes: Any, text: str, colour: str, layer: int, size: float) -> None:
    """Words above all data, with a line to the point; quiet ones right above it, where the healthy region has room."""
    across, up = axes.transAxes.inverted().transform(axes.transData.transform((layer, size)))
    free = colour == on.GREY and up < _ROOM
    end = "left" if across < 0.3 else "right" if across > 0.7 else "center"
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 5}
    made = axes.annotate(
        text,
        (layer, size),
        xytext=(0, 10) if free else (across, 0.97),
        textcoords="offset points" if free else "axes fraction",
        ha=end,
        va="bottom" if free else "top",
        fontsize=9,
        color=colour,
        # From the end of the words that is over the point, so that it stands upright.
        arrowprops=None if free else {**line, "relpos": ({"left": 0.0, "right": 1.0}.get(end, 0.5), 0.0)},
    )
    on.plain(made)


def _failure(first: Finding) -> str:
    """A failure in two lines: what and where, how large and at which token."""
    where = on.drawable(placed(first.place.layer, first.place.name))
    size = number(first.magnitude.reference) if first.magnitude.reference is not None else ""
    token = _token(first.place.token) if first.place.token is not None else ""
    return f"{first.kind}: {where}\n{' at '.join(part for part in (size, token) if part)}".rstrip()


def _token(token: Token) -> str:
    if token.padding:
        return f"token {token.position} (padding)"
    text = on.drawable(token.text or "", 20)
    told = f'"{text}"' if text.strip() and "▯" not in text else f"id {token.id}"
    return f"token {token.position} ({told})"
