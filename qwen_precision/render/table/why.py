"""The table's part on why something failed: controls, massive activations, triggers."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from qwen_precision.judge import Report
from qwen_precision.render.text import safe
from qwen_precision.render.words import why as words


def why_parts(report: Report) -> Iterator[RenderableType]:
    """A section each; nothing where there is nothing to tell."""
    sections = {
        "Controls": list(words.controls(report)),
        "Massive activations in fp32": list(words.massive(report)),
        "Sweep": list(words.triggers(report.run)),
    }
    for title, lines in sections.items():
        if lines:
            yield Text(f"\n{title}", style="bold")
            yield from (Text(safe(line, 300)) for line in lines)
