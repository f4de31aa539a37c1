"""How far a dtype is from fp32 where nothing overflowed: error by layer, agreement, divergence. Pure; no torch."""

import math
from dataclasses import dataclass
from itertools import zip_longest

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


@dataclass(frozen=True)
class Sums:
    """What ``Precision`` is made of: sums of squares and how many, so that those of several records can be added."""

    layers: list[tuple[float, int]]
    local: list[tuple[float, int]]
    agree: int
    rows: int
    logprob: tuple[float, int]
    kl: float | None
    failed: bool
    """Whether something was not finite."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            layers=_each_added(self.layers, other.layers),
            local=_each_added(self.local, other.local),
            agree=self.agree + other.agree,
            rows=self.rows + other.rows,
            logprob=_added(self.logprob, other.logprob),
            kl=max((each for each in (self.kl, other.kl) if each is not None), default=None),
            failed=self.failed or other.failed,
        )

    @property
    def precision(self) -> Precision:
        """What it comes to."""
        return Precision(
            layers=[_mean(each) for each in self.layers],
            local=[_mean(each) for each in self.local],
            agree=self.agree,
            rows=self.rows,
            logprob=_mean(self.logprob),
            kl=self.kl,
        )


def sums(run: Run) -> dict[str, Sums]:
    """By dtype; empty without a reference."""
    reference = {each.prompt: each for each in run.passes if each.dtype == REFERENCE}
    found = {}
    for dtype in run.dtypes:
        mine = [each for each in run.passes if each.dtype == dtype]
        if dtype == REFERENCE or not any(each.layer_error or each.kl for each in mine):
            continue
        pairs = [pair for each in mine if each.prompt in reference for pair in _pairs(each, reference[each.prompt])]
        kl = [value for each in mine for value in each.kl if value is not None and math.isfinite(value)]
        found[dtype] = Sums(
            layers=_layers([each.layer_error for each in mine]),
            local=_layers([each.local_error for each in mine]),
            agree=sum(ours == theirs for ours, theirs in pairs),
            rows=len(pairs),
            logprob=_squares([value for each in mine for value in each.logprob_error]),
            kl=max(kl, default=None),
            failed=any(each.failed for each in mine),
        )
    return found


def precision(run: Run) -> dict[str, Precision]:
    """By dtype; empty without a reference."""
    return {dtype: each.precision for dtype, each in sums(run).items()}


def _pairs(each: Pass, reference: Pass) -> list[tuple[int, int]]:
    both = zip(each.top1, reference.top1, strict=False)
    return [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]


def _layers(columns: list[list[float | None]]) -> list[tuple[float, int]]:
    longest = max(map(len, columns), default=0)
    return [_squares([column[index] for column in columns if index < len(column)]) for index in range(longest)]


def _squares(values: list[float | None]) -> tuple[float, int]:
    """Sum of the squares of those that are known, and how many are."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(value * value for value in known), len(known)


def _mean(total: tuple[float, int]) -> float | None:
    """Root mean square."""
    return math.sqrt(total[0] / total[1]) if total[1] > 0 and total[0] >= 0 else None


def _added(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
    return one[0] + other[0], one[1] + other[1]


def _each_added(ours: list[tuple[float, int]], theirs: list[tuple[float, int]]) -> list[tuple[float, int]]:
    both = zip_longest(ours, theirs, fillvalue=(0.0, 0))
    return [_added(one, other) for one, other in both]
