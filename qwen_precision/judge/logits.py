"""What float32 logits buy, and what they cost, as a run measured it: over all prompts, or all steps. Pure; no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.record import Continuation, Generation, Run, Upcast

LENGTHS = (8_000, 32_000, 128_000)
"""Tokens of prompts that the cost is told for, beside the run's own."""


@dataclass(frozen=True)
class Bought:
    """One dtype: what a softmax of the very same logits in it is off from one in float32."""

    rows: int
    """Next tokens: positions (in a generation, steps) whose whole distribution was looked at."""
    changed: int
    """Of these, those whose likeliest token is another."""
    ranks: int
    """Of the ten likeliest tokens of each, those that change rank."""
    mass_lost: float | None
    """1 less the sum of the probabilities, of all rows the farthest from zero."""
    tokens: int
    """Tokens whose log-probability was compared."""
    logprob_max: float | None
    """Largest error of one, in nats."""
    logprob_rms: float | None
    """Root mean square of them."""
    compared: int
    """Tokens that it is made of."""
    loss: float | None
    """Cross-entropy, in nats a token, of the row whose loss the dtype changes most; null in a generation."""
    loss_in_dtype: float | None
    """The same in the dtype; infinite where a token's log-probability is."""
    bad: int
    """Tokens whose log-probability is infinite in the dtype alone."""
    zero: int
    """Tokens whose probability is zero in the dtype alone."""
    by_hand: float | None
    """``mass_lost`` where every step of the softmax is rounded; null in a generation."""
    by_hand_bad: int
    """Rows in which that gives NaN or infinities."""
    unshifted_bad: int
    """Rows in which exp overflows unless the largest logit is taken off first."""

    @property
    def loss_error(self) -> float | None:
        """How far the loss is off, in nats a token."""
        if self.loss is None or self.loss_in_dtype is None:
            return None
        return abs(self.loss_in_dtype - self.loss)

    def __add__(self, other: "Bought") -> "Bought":
        worst = max(self, other, key=lambda each: each.loss_error if each.loss_error is not None else -1.0)
        rms = [(each.logprob_rms, each.compared) for each in (self, other) if each.logprob_rms is not None]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in (*_ADDED, *_OUTERMOST)}
        together: dict[str, Any] = {name: sum(pairs[name]) for name in _ADDED}
        together |= {name: _farthest(pairs[name]) for name in _OUTERMOST}
        together["logprob_rms"] = _root([value**2 for value, _ in rms], [count for _, count in rms])
        return replace(worst, **together)  # whose loss it is


_ADDED = ("rows", "changed", "ranks", "tokens", "compared", "bad", "zero", "by_hand_bad", "unshifted_bad")
_OUTERMOST = ("mass_lost", "logprob_max", "by_hand")
"""Of ``Bought``: what is added up over prompts, and of what the one farthest from zero is kept."""


class Length(NamedTuple):
    """Logits of prompts of a length, in bytes."""

    name: str
    rows: int
    tokens: int
    float32: int
    narrow: int
    """In the dtype of the run that has the fewest bytes."""


@dataclass(frozen=True)
class Cost:
    """What logits take."""

    vocabulary: int
    dtype: str
    """Whose bytes ``Length.narrow`` has: the narrowest of the run."""
    last: Length
    """The last position alone, of the run's own batch."""
    whole: Length
    """All positions of the run's largest prompt."""
    longer: tuple[Length, ...]
    """Of one row each, ``LENGTHS`` tokens long."""
    held: int | None
    """Bytes of the largest tensor of logits that there was in the run; None where nobody looked."""
    pieces: int
    """So many pieces of the prompt went through one after another."""
    weights: int
    """Bytes of the checkpoint's weights: a step of a text reads all of them at least once, unless it has experts."""
    seconds: float | None
    """That upcasting the last position took at each step; None where it was not taken."""

    @property
    def lengths(self) -> list[Length]:
        """All of them, from the last position up."""
        return [self.last, self.whole, *self.longer]


def bought(run: Run) -> dict[str, Bought]:
    """By dtype, in the run's order; empty where nothing was compared."""
    found = {}
    for dtype in run.dtypes:
        if dtype == REFERENCE:
            continue
        made = _of_a_text(run.generation, dtype) if run.generation is not None else _of_prompts(run, dtype)
        if made is not None:
            found[dtype] = made
    return found


def cost(run: Run) -> Cost | None:
    """None where no logits were computed, or a record from elsewhere does not say how many there are."""
    told = run.generation.logits if run.generation is not None else run.logits
    if told is None or not told.bytes or not told.whole_prompt_bytes or not run.dtypes:
        return None
    dtype = min(run.dtypes, key=lambda name: DTYPES[name].bytes)
    size = 4 if told.upcast else DTYPES[dtype].bytes
    vocabulary = told.vocabulary or run.model.vocabulary
    if vocabulary <= 0:
        return None
    rows, tokens = max(1, told.bytes // (vocabulary * size)), max(1, told.whole_prompt_bytes // told.bytes)
    timed = told.upcast and told.steps and math.isfinite(told.upcast_seconds) and told.upcast_seconds > 0

    def length(name: str, rows: int, tokens: int) -> Length:
        every = rows * tokens * vocabulary
        return Length(name, rows, tokens, every * DTYPES[REFERENCE].bytes, every * DTYPES[dtype].bytes)

    return Cost(
        vocabulary=vocabulary,
        dtype=dtype,
        last=length("last position", rows, 1),
        whole=length("this prompt", rows, tokens),
        longer=tuple(length(f"{each:,} tokens", 1, each) for each in LENGTHS),
        held=told.held,
        pieces=told.chunks,
        weights=run.model.weight_bytes,
        seconds=told.upcast_seconds / told.steps if timed and told.steps else None,
    )


_NEGLIGIBLE = 0.01
"""Share of the weights' bytes below which a step's logits make no difference to its time or memory."""


def a_step(taken: Cost) -> str:
    """What upcasting the last position takes, in a sentence."""
    time = f" and {taken.seconds * 1e3:.2g} ms" if taken.seconds is not None else ""
    said = f"Upcasting the last position takes {sized(taken.last.float32)}{time} a step"
    if not taken.weights:
        return f"{said}."
    share = taken.last.float32 / taken.weights
    return f"{said}: {share:.2g} of the weights' bytes{', negligible' if share < _NEGLIGIBLE else ''}."


def sized(count: int) -> str:
    """Bytes as a person reads them, in powers of ten: 608 kB, 77.8 GB."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count} bytes"


# -- over prompts -------------------------------------------------------------------------------------------------


def _of_prompts(run: Run, dtype: str) -> Bought | None:
    rows = [row for each in run.passes if each.dtype == dtype for row in each.upcast if row is not None]
    if not any(row.rows for row in rows):
        return None
    worst = max(rows, key=_off, default=None)
    squares = [(row.logprob_rms**2, row.tokens) for row in rows if row.logprob_rms is not None]
    return Bought(
        rows=sum(row.rows for row in rows),
        changed=sum(row.changed for row in rows),
        ranks=sum(row.ranks for row in rows),
        mass_lost=_farthest([row.mass_lost for row in rows]),
        tokens=sum(row.tokens for row in rows),
        logprob_max=_farthest([row.logprob_max for row in rows]),
        logprob_rms=_root([square for square, _ in squares], [count for _, count in squares]),
        compared=sum(count for _, count in squares),
        loss=worst.loss if worst is not None else None,
        loss_in_dtype=worst.loss_in_dtype if worst is not None else None,
        bad=sum(row.bad for row in rows),
        zero=sum(row.zero for row in rows),
        by_hand=_farthest([row.by_hand for row in rows]),
        by_hand_bad=sum(row.by_hand_bad for row in rows),
        unshifted_bad=sum(row.unshifted_bad for row in rows),
    )


def _off(row: Upcast) -> float:
    """How far the loss of a row is off; less than nothing where it has none."""
    if row.loss is None or row.loss_in_dtype is None:
        return -1.0
    off = abs(row.loss_in_dtype - row.loss)
    return off if off == off else -1.0


# -- over steps ---------------------------------------------------------------------------------------------------


def _of_a_text(made: Generation, dtype: str) -> Bought | None:
    steps = [(row, step) for row in made.rows for step in _steps(row, dtype)]
    if not steps:
        return None
    errors = [value for row, step in steps if (value := row.logprob_error[step]) is not None]
    return Bought(
        rows=len(steps),
        changed=sum(row.changed[step] or 0 for row, step in steps),
        ranks=sum(row.ranks[step] or 0 for row, step in steps),
        mass_lost=_farthest([row.mass_lost[step] for row, step in steps]),
        tokens=len(errors),
        logprob_max=_farthest([abs(value) for value in errors]),
        logprob_rms=_root([value * value for value in errors], [1] * len(errors)),
        compared=len(errors),
        loss=None,
        loss_in_dtype=None,
        bad=0,
        zero=0,
        by_hand=None,
        by_hand_bad=0,
        unshifted_bad=0,
    )


def _steps(row: Continuation, dtype: str) -> Iterator[int]:
    """Steps of a row that the dtype computed, and whose distribution was looked at."""
    for place, stretch in enumerate(row.stretches):
        stop = row.stretches[place + 1].start if place + 1 < len(row.stretches) else len(row.ids)
        if stretch.dtype == dtype:
            yield from (step for step in range(stretch.start, min(stop, len(row.ids))) if row.changed[step] is not None)


def _farthest(values: Sequence[float | None]) -> float | None:
    """Of those that are known the one farthest from zero."""
    return max((value for value in values if value is not None and value == value), key=abs, default=None)


def _root(squares: list[float], weights: list[int]) -> float | None:
    """Root of the mean of squares."""
    total = sum(weights)
    if not total:
        return None
    found = math.sqrt(sum(square * weight for square, weight in zip(squares, weights, strict=True)) / total)
    return found if math.isfinite(found) else None
