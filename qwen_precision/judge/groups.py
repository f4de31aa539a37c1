"""Findings that say the same of several layers, as one: what every format shows in one place. Pure; no torch."""

from collections.abc import Iterable
from typing import NamedTuple

from qwen_precision.judge.findings import Finding
from qwen_precision.qwen3 import placed

_RUNS = 4
"""Stretches of layers named one by one; of more, only the ends and how many layers there are."""


class Group(NamedTuple):
    """Findings of one severity, kind, dtype and operation; never empty."""

    findings: tuple[Finding, ...]
    """In the order they were judged: the first stands for all."""

    @property
    def first(self) -> Finding:
        """The one to show."""
        return self.findings[0]

    @property
    def layers(self) -> list[int]:
        """Every layer it happens in, upward; empty outside the layers."""
        return sorted({each.place.layer for each in self.findings if each.place.layer is not None})

    @property
    def where(self) -> str:
        """Layers and operation: ``layers 3 to 5, down_proj output``. A stranger's words are still in it."""
        layers, name = self.layers, self.first.place.name
        if len(layers) < 2:
            return placed(layers[0] if layers else None, name)
        return f"layers {_stretches(layers)}, {name}"


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """Findings by severity, kind, dtype and the operation's name; groups and members keep the order they came in."""
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.severity, each.kind, each.dtype, each.place.name), []).append(each)
    return [Group(tuple(members)) for members in groups.values()]


def _stretches(layers: list[int]) -> str:
    """Layers (two or more, upward) in words: ``3 to 5``, ``0 and 31``, ``0, 2 and 5 to 7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words: list[str] = []
    for run in runs:
        words += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    if len(runs) > _RUNS:
        return f"{layers[0]} to {layers[-1]} ({len(layers)} of them)"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
