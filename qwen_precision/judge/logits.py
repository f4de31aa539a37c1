"""What float32 logits buy, as a run measured it: over all prompts, or all steps. Pure; no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.record import Continuation, Count, Generation, Number, Run, Upcast


@dataclass(frozen=True)
class Bought:
    """One dtype: what a softmax of the very same logits in it is off from one in float32."""

    rows: Count
    """Next tokens: positions (in a generation, steps) whose whole distribution was looked at."""
    changed: Count
    """Of these, those whose likeliest token is another."""
    ranks: Count
    """Of the ten likeliest tokens of each, those that change rank."""
    mass_lost: Number | None
    """1 less the sum of the probabilities, of all rows the farthest from zero."""
    tokens: Count
    """Tokens whose log-probability was compared."""
    logprob_max: Number | None
    """Largest error of one, in nats."""
    logprob_rms: Number | None
    """Root mean square of them."""
    prompt: str | None
    """Whose loss the dtype changes most; null where there is none, and in a generation. A stranger's words."""
    row: int | None
    """Its row there, where it has several; in a generation that of ``step``."""
    loss: Number | None
    """Cross-entropy of that row, in nats a token."""
    loss_in_dtype: Number | None
    """The same in the dtype; infinite where a token's log-probability is."""
    bad: Count
    """Tokens whose log-probability is infinite in the dtype alone."""
    zero: Count
    """Tokens whose probability is zero in the dtype alone."""
    by_hand: Number | None
    """``mass_lost`` where every step of the softmax is rounded; null in a generation."""
    by_hand_bad: Count
    """Rows in which that gives NaN or infinities."""
    unshifted_bad: Count
    """Rows in which exp overflows unless the largest logit is taken off first."""
    left_out: Count = 0
    """Rows of prompts (in a generation, steps) that were not compared: they have no finite logits of their own."""
    step: Count | None = None
    """Of a generation: where a log-probability is farthest off."""
    loss_error: Number | None = None
    """How far the loss is off, in nats a token."""


_NOTHING = Bought(
    rows=0,
    changed=0,
    ranks=0,
    mass_lost=None,
    tokens=0,
    logprob_max=None,
    logprob_rms=None,
    prompt=None,
    row=None,
    loss=None,
    loss_in_dtype=None,
    bad=0,
    zero=0,
    by_hand=None,
    by_hand_bad=0,
    unshifted_bad=0,
)


def together(found: Sequence[Bought]) -> Bought:
    """Of the rows of all of them, one at least: counts add up, and of equally bad losses the first is told."""
    worst = max(found, key=_off)
    known = [(each.logprob_rms, max(0, each.tokens - each.bad)) for each in found if each.logprob_rms is not None]
    return Bought(
        rows=sum(each.rows for each in found),
        changed=sum(each.changed for each in found),
        ranks=sum(each.ranks for each in found),
        mass_lost=_farthest([each.mass_lost for each in found]),
        tokens=sum(each.tokens for each in found),
        logprob_max=_farthest([each.logprob_max for each in found]),
        logprob_rms=_root([rms * rms for rms, _ in known], [count for _, count in known]),
        prompt=worst.prompt if worst.loss is not None else None,
        row=worst.row if worst.loss is not None else None,
        loss=worst.loss,
        loss_in_dtype=worst.loss_in_dtype,
        loss_error=worst.loss_error,
        bad=sum(each.bad for each in found),
        zero=sum(each.zero for each in found),
        by_hand=_farthest([each.by_hand for each in found]),
        by_hand_bad=sum(each.by_hand_bad for each in found),
        unshifted_bad=sum(each.unshifted_bad for each in found),
        left_out=sum(each.left_out for each in found),
    )


def _off(each: Bought) -> float:
    """How far its loss is off; less than nothing where it has none."""
    off = each.loss_error
    return off if off is not None and off == off else -1.0


def bought(run: Run) -> dict[str, Bought]:
    """By dtype, in the run's order; one with ``rows`` 0 was looked at in vain, as all of it is left out."""
    found = {}
    for dtype in run.dtypes:
        if dtype == REFERENCE:
            continue
        made = _of_a_text(run.generation, dtype) if run.generation is not None else _of_prompts(run, dtype)
        if made is not None:
            found[dtype] = made
    return found


_BY_HAND = 0.01
"""From 1, that what is called probabilities may sum to: as ``Limits.mass`` for the least error of a dtype."""


def lost_by_hand(each: Bought) -> bool:
    """Whether a softmax of which every step is rounded to the dtype gives something else than probabilities."""
    return bool(each.by_hand_bad) or abs(each.by_hand or 0.0) > _BY_HAND


# -- over prompts -------------------------------------------------------------------------------------------------


def bought_by_row(run: Run, dtype: str) -> list[Bought]:
    """Of each row of each prompt of a probe; of one that has no finite logits of its own it is only ``left_out``."""
    return [
        _of_a_row(row, run.prompts[each.prompt].name, number if len(each.upcast) > 1 else None)
        for each in run.passes
        if each.dtype == dtype
        for number, row in enumerate(each.upcast)
    ]


def _of_prompts(run: Run, dtype: str) -> Bought | None:
    found = bought_by_row(run, dtype)
    return together(found) if found else None


def _of_a_row(row: Upcast | None, prompt: str, number: int | None) -> Bought:
    if row is None:
        return replace(_NOTHING, prompt=prompt, row=number, left_out=1)
    told = row.model_dump()
    if told["loss_error"] is None and row.loss is not None and row.loss_in_dtype is not None:
        told["loss_error"] = abs(row.loss_in_dtype - row.loss)  # an older record keeps the two alone
    return Bought(**told, prompt=prompt, row=number, left_out=int(not row.rows))


# -- over steps ---------------------------------------------------------------------------------------------------


class SoftmaxStep(NamedTuple):
    """A step of a row whose distribution was looked at, in the dtype that computed it."""

    row: int
    step: int
    dtype: str
    token: str
    """As text; its id where that is not known."""
    logprob: float | None
    error: float | None
    """Of the log-probability; None where it is infinite in the dtype."""
    mass_lost: float | None
    ranks: int
    changed: bool


def softmax_steps(made: Generation) -> list[SoftmaxStep]:
    """All of them, row by row; none that was computed in float32."""
    return [
        SoftmaxStep(
            row.row,
            step,
            dtype,
            row.tokens[step] or f"id {row.ids[step]}",
            row.logprob[step],
            row.logprob_error[step],
            row.mass_lost[step],
            row.ranks[step] or 0,
            bool(row.changed[step]),
        )
        for row in made.rows
        for step, dtype in _computed(row)
        if row.changed[step] is not None
    ]


def _of_a_text(made: Generation, dtype: str) -> Bought | None:
    every = sum(computed == dtype for row in made.rows for _, computed in _computed(row))
    mine = [each for each in softmax_steps(made) if each.dtype == dtype]
    known = [each for each in mine if each.logprob is not None]
    errors = {each: each.error for each in known if each.error is not None and each.error == each.error}
    worst = max(errors, key=lambda each: abs(errors[each]), default=None)
    told = replace(
        _NOTHING,
        rows=len(mine),
        changed=sum(each.changed for each in mine),
        ranks=sum(each.ranks for each in mine),
        mass_lost=_farthest([each.mass_lost for each in mine]),
        tokens=len(known),
        logprob_max=abs(errors[worst]) if worst is not None else None,
        logprob_rms=_root([value * value for value in errors.values()], [1] * len(errors)),
        row=worst.row if worst is not None else None,
        step=worst.step if worst is not None else None,
        bad=len(known) - len(errors),
        left_out=every - len(mine),
    )
    return told if every else None


def _computed(row: Continuation) -> Iterator[tuple[int, str]]:
    """Steps of a row, and the dtype that computed each."""
    for place, stretch in enumerate(row.stretches):
        stop = row.stretches[place + 1].start if place + 1 < len(row.stretches) else len(row.ids)
        yield from ((step, stretch.dtype) for step in range(stretch.start, min(stop, len(row.ids))))


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
