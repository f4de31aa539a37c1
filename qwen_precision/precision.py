"""How far a dtype is from fp32 where nothing overflowed: error by layer, agreement, divergence. Pure; no torch."""

import math
from dataclasses import dataclass

from qwen_precision.dtypes import REFERENCE
from qwen_precision.record import Pass, Run


@dataclass(frozen=True)
class Precision:
    """One dtype against the reference, over all prompts."""

    layers: list[float | None]
    """Root mean square over the prompts of the relative error after each layer, null where none kept its own stream."""
    agree: int
    """Rows whose likeliest next token is the reference's."""
    rows: int
    """Rows that could be compared."""
    kl: float | None
    """Largest Kullback-Leibler divergence of the next token's distribution from the reference's, in nats."""


def precision(run: Run) -> dict[str, Precision]:
    """By dtype; empty without a reference."""
    reference = {each.prompt: each for each in run.passes if each.dtype == REFERENCE}
    found = {}
    for dtype in run.dtypes:
        mine = [each for each in run.passes if each.dtype == dtype]
        if dtype == REFERENCE or not any(each.layer_error or each.kl for each in mine):
            continue
        pairs = [pair for each in mine if each.prompt in reference for pair in _pairs(each, reference[each.prompt])]
        kl = [value for each in mine for value in each.kl if value is not None and math.isfinite(value)]
        found[dtype] = Precision(
            layers=_layers(mine), agree=sum(ours == theirs for ours, theirs in pairs), rows=len(pairs),
            kl=max(kl, default=None),
        )  # fmt: skip
    return found


def _pairs(each: Pass, reference: Pass) -> list[tuple[int, int]]:
    both = zip(each.top1, reference.top1, strict=False)
    return [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]


def _layers(passes: list[Pass]) -> list[float | None]:
    layers: list[float | None] = []
    for index in range(max((len(each.layer_error) for each in passes), default=0)):
        values = [each.layer_error[index] for each in passes if index < len(each.layer_error)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        layers.append(math.sqrt(sum(value * value for value in known) / len(known)) if known else None)
    return layers
