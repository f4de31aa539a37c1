"""Strings from strangers, made inert: tokens, prompts, names and paths go through here before a terminal.

A control character could move the cursor or recolour the screen, a right-to-left mark could reorder a line.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence

_HIDDEN = {"Cc", "Cf", "Cn", "Cs", "Co", "Zl", "Zp"}


def safe(text: str, longest: int = 200) -> str:
    """``text`` with every control, format and surrogate character spelled out, cut to ``longest``."""
    cut = text[: longest + 1]
    shown = "".join(_spelled(char) for char in cut[:longest])
    return shown + ("…" if len(cut) > longest else "")


def _spelled(char: str) -> str:
    if char == "\n":
        return "\\n"
    if char == "\t":
        return "\\t"
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def quoted(text: str, longest: int = 40) -> str:
    """A token or a prompt in quotes."""
    return f'"{safe(text, longest)}"'


def number(value: float | None) -> str:
    """A magnitude as a person reads it: 75,100, 0.0125, 1.35e+08."""
    if value is None:
        return "-"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.2e}"


def count(how_many: int, thing: str) -> str:
    """A number and its noun: 1 prompt, 1,818 operations."""
    return f"{how_many:,} {thing}" + ("" if how_many == 1 else "s")


_AMPLE = 10_000.0
"""More headroom than this is a number that nobody needs."""


def room(headroom: float | None) -> str:
    """A headroom as a person reads it: 0.483x, 1,200x, ample; none, all, or - where there is none to tell.

    Below 1 it overflows: what is nearly 1 has digits enough to tell on which side it is.
    """
    if headroom is None:
        return "-"
    if headroom == 0:
        return "none"
    if not math.isfinite(headroom):
        return "all"
    if headroom >= _AMPLE:
        return "ample"
    digits = next((digits for digits in range(3, 8) if float(f"{headroom:.{digits}g}") != 1), 3)
    return f"{headroom:.{digits}g}x" if headroom < 1000 else f"{headroom:,.0f}x"


_BLOCKS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float | None], width: int = 32) -> str:
    """A line of blocks, one a value (or the largest of a few neighbours), on a logarithmic scale; a dot is unknown."""
    size = math.ceil(len(values) / width) if values else 1
    known_values = [value if value and math.isfinite(value) else None for value in values]
    groups = [[value for value in known_values[at : at + size] if value] for at in range(0, len(values), size)]
    peaks = [math.log(max(group)) if group else None for group in groups]
    known = [peak for peak in peaks if peak is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return "".join("·" if peak is None else _BLOCKS[round((peak - low) / span * 7)] for peak in peaks)


def ranges(numbers: Iterable[int], most: int = 8) -> str:
    """Numbers in order, neighbours together: ``3``, ``0 to 5, 7``; beyond so many stretches a sign for the rest."""
    parts: list[list[int]] = []
    for each in sorted(numbers):
        if parts and parts[-1][-1] == each - 1:
            parts[-1] = [parts[-1][0], each]
        else:
            parts.append([each])
    return ", ".join(" to ".join(str(end) for end in part) for part in parts[:most]) + (
        " …" if len(parts) > most else ""
    )
