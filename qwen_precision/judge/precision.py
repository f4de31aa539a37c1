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
    logprob: float | None
    """Root mean square over the rows of the error of a token's log-probability given those before it, in nats."""
    local: list[float | None]
    """As ``layers``, of each layer by itself, on the reference's hidden states; empty unless it was measured."""
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
            layers=_layers([each.layer_error for each in mine]),
            local=_layers([each.local_error for each in mine]),
            logprob=_mean([value for each in mine for value in each.logprob_error]),
            agree=sum(ours == theirs for ours, theirs in pairs),
            rows=len(pairs),
            kl=max(kl, default=None),
        )
    return found


def _pairs(each: Pass, reference: Pass) -> list[tuple[int, int]]:
    both = zip(each.top1, reference.top1, strict=False)
    return [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]


def _layers(columns: list[list[float | None]]) -> list[float | None]:
    longest = max(map(len, columns), default=0)
    return [_mean([column[index] for column in columns if index < len(column)]) for index in range(longest)]


def _mean(values: list[float | None]) -> float | None:
    """Root mean square of those that are known."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.sqrt(sum(value * value for value in known) / len(known)) if known else None
