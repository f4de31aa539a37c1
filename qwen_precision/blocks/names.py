"""What the checkpoints of a folder are called in a report: as short as tells them apart."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qwen_precision.blocks.plan import in_short


def once(sources: Iterable[str]) -> tuple[str, ...]:
    """Each once, whatever its spelling: ``A``, ``./A`` and ``A/`` are one; the first is kept."""
    found: dict[str, str] = {}
    for source in sources:
        found.setdefault(os.path.normpath(source), source)
    return tuple(found.values())


class Called(NamedTuple):
    """What a report is about."""

    source: str
    """As it was typed."""
    weights: str
    """Empty where they are not known."""
    settings: Mapping[str, Any]
    tool: str


def names_of(reports: Sequence[Called]) -> list[str]:
    """A name for each: the last parts of its path, and where that is there twice, in what they differ."""
    short = dict(zip(sources := list(dict.fromkeys(each.source for each in reports)), _short(sources), strict=True))
    named = []
    for each in reports:
        alike = [other for other in reports if other.source == each.source]
        keys = sorted({key for other in alike for key in other.settings})
        differ = [key for key in keys if any(other.settings.get(key) != each.settings.get(key) for other in alike)]
        told = [f"{key} {in_short(each.settings.get(key))}" for key in differ]
        told += [each.tool] if any(other.tool != each.tool for other in alike) else []
        others = any(other.weights != each.weights for other in alike)
        told += [f"weights {each.weights[:8]}"] if each.weights and others else []
        named.append(f"{short[each.source]} ({', '.join(told)})" if told else short[each.source])
    return named


def _short(sources: Sequence[str]) -> list[str]:
    """Of a path so many of its last parts that no other ends so; anything else as it is."""
    parts = [_parts(source) for source in sources]
    made = []
    for place, mine in enumerate(parts):
        others = [each for at, each in enumerate(parts) if at != place]
        sizes = (n for n in range(1, len(mine) + 1) if all(each[-n:] != mine[-n:] for each in others))
        size = next(sizes, 0)
        made.append("/".join(mine[-size:]) if size else sources[place])
    return made


def _parts(source: str) -> list[str]:
    """A hub id is one part."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return [source]
    return [part for part in re.split(r"[\\/]+", source) if part not in ("", ".")] or [source]
