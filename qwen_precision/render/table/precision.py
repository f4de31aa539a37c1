"""The table's part on precision: how far each dtype is from fp32, where it kept its own stream."""

from collections.abc import Iterator
from itertools import pairwise

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qwen_precision.judge import Report
from qwen_precision.render.text import number, spark
from qwen_precision.render.words.why import nearer


def precision_parts(report: Report) -> Iterator[RenderableType]:
    """How far each dtype is from fp32, where it kept its own stream."""
    found = report.precision
    if not found:
        return
    yield Text("\nError against fp32 (own stream, all prompts)", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("dtype", "last layer", "grows most in", "same top-1", "KL at most", "log-probability"):
        table.add_column(name)
    for dtype, each in found.items():
        table.add_row(
            dtype,
            number(each.layers[-1]) if each.layers and each.layers[-1] is not None else "-",
            _steepest(each.layers),
            f"{each.agree} of {each.rows}" if each.rows else "-",
            number(each.kl),
            number(each.logprob),
        )
    yield table
    for dtype, each in found.items():
        known = [value for value in each.layers if value]
        if len(known) > 1:
            yield Text(f"{dtype}  {spark(each.layers)}  by layer, {number(min(known))} to {number(max(known))}", "dim")
    for dtype, each in found.items():
        worst = max(((value, layer) for layer, value in enumerate(each.local) if value), default=None)
        if worst is not None:
            text = f"{dtype}  {spark(each.local)}  each layer by itself, most in layer {worst[1]} ({number(worst[0])})"
            yield Text(text, "dim")
    closer = nearer(report)
    if closer is not None:
        yield Text(closer)


def _steepest(layers: list[float | None]) -> str:
    """The layer in which the error grows by the largest factor."""
    pairs = [(now / before, layer) for layer, (before, now) in enumerate(pairwise(layers), 1) if before and now]
    factor, layer = max(pairs, default=(0.0, 0))
    return f"layer {layer} ({factor:.3g}x)" if factor > 1 else "-"
