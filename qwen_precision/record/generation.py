"""What a generation leaves in the record: tokens, what the logits were like at each step, and every intervention.

Columns only, as everywhere in the record. Steps count generated tokens from 0; rows index the one prompt of the
run. A column (``top1``, ``margin``, ``entropy``, …) has one number a step, null where nothing was watched.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

from qwen_precision.record.logits import LogitsCost
from qwen_precision.record.parts import Count, Many, Number, Part

BadKind = Literal["wholly bad", "partly bad", "flat", "all filtered", "overflowed"]
"""Why a row could not be used as it was; the last two are what the processors made of healthy logits."""

BAD_LOGITS = get_args(BadKind)

FILTERED = ("all filtered", "overflowed")
"""Those of them in which the logits themselves were healthy."""

NOT_FINITE = ("wholly bad", "partly bad")
"""Those of them in which the logits held NaN or infinities."""

Kind = (
    BadKind
    | Literal["repaired", "likeliest kept", "recovered", "not recovered", "stopped", "returned", "stays"]
    | Literal["run", "descending", "cycle"]
)
"""What a trip is about: what was seen, what was done about it, what the text looks like."""

MENDED = ("repaired", "likeliest kept", "recovered")
"""Kinds that say a row could be used after all."""

Finish = Literal["eos", "length", "criterion", "failed", "error", "degenerate", "interrupted"]
"""Why a row ended: its end token, the limit, another stopping criterion, logits that nothing could mend, the
sampling error of torch, degenerate text, or the whole run was stopped."""


class Poison(Part):
    """Where a row's KV cache is first not finite: what the layers before it wrote is clean."""

    layer: Count
    part: Literal["keys", "values"]
    position: Count
    """Token position in the padded row."""
    in_padding: bool
    """Whether only pad positions are bad, in this layer."""


class Trip(Part):
    """A guard that fired."""

    step: Count
    row: Count
    guard: str
    kind: Kind
    dtype: str
    """The dtype the row was computed in when it fired."""
    why: str
    acted: bool
    """Whether something was changed; false where the guard only looks, or was told to only report."""
    before: dict[str, Number]
    after: dict[str, Number]
    poisoned: Poison | None = None


def bad_trips(trips: Iterable[Trip], row: int) -> list[Trip]:
    """Trips that say a row could not be used as it was."""
    return [trip for trip in trips if trip.row == row and trip.kind in BAD_LOGITS]


def failing_step(made: "Generation", row: int) -> int | None:
    """The first step at which a row went wrong, or None if it never did.

    Logits that could not be used tell it, else that nothing was left to draw from; where nobody watched, the step from
    which on the text says nothing.
    """
    bad = bad_trips(made.trips, row)
    steps = [trip.step for trip in bad if trip.kind not in FILTERED] or [trip.step for trip in bad]
    if not steps and made.error is not None and row in made.error.rows:
        steps = [made.error.step]
    if not steps and made.unwatched:
        said = [trip.before.get("start") for trip in made.trips if trip.row == row and trip.guard == "degenerate"]
        steps = [int(start) for start in said if start is not None and math.isfinite(start) and start >= 0]
    lengths = [len(each.ids) for each in made.rows if each.row == row]
    return min([*steps, *lengths]) if steps else None  # a record from elsewhere may name any step


def mended_steps(trips: Iterable[Trip], row: int) -> set[int]:
    """Steps of a row at which a guard did make it usable."""
    return {trip.step for trip in trips if trip.acted and trip.kind in MENDED and trip.row == row}


class Stretch(Part):
    """From this step on the row was computed in this dtype."""

    start: Count
    dtype: str
    rescaled: bool
    """Whether with weights rescaled to stay inside it."""

    @property
    def way(self) -> str:
        """Both, in words."""
        return f"{self.dtype} rescaled" if self.rescaled else self.dtype


class Continuation(Part):
    """What was generated for one row."""

    row: Count
    input: str
    """The text that was tokenised: the prompt, or the chat template around it."""
    ids: Many[int]
    tokens: Many[str]
    """Each id as text."""
    text: str
    """All of it, without special tokens."""
    clean_text: str | None
    """What had been generated before the first bad logits; null where there were none."""
    stretches: Many[Stretch]
    top1: Many[Number | None]
    """Probability of the likeliest token, before any filter."""
    margin: Many[Number | None]
    """Logit of the likeliest token minus that of the second: the natural logarithm of their odds."""
    entropy: Many[Number | None]
    """In nats, before any filter."""
    logprob: Many[Number | None]
    """Log-probability of the token that was chosen, in nats, before any filter and by a softmax in float32."""
    logprob_error: Many[Number | None]
    """What it is more than that, rounded to the dtype of the step; this and what follows is null in float32."""
    mass_lost: Many[Number | None]
    """1 less the sum of all probabilities, each rounded to the dtype of the step."""
    ranks: Many[int | None]
    """Of the ten likeliest tokens, those that have then another number of strictly likelier ones."""
    changed: Many[int | None]
    """1 where the likeliest token (of equal ones the lowest id) is then another, else 0."""
    finish: Finish


class SamplingError(Part):
    """The error with which torch refused to draw a token."""

    step: Count
    rows: Many[int]
    message: str


class ProbeSummary(Part):
    """What an earlier probe of the same checkpoint said of the dtype asked for (``--probe-run``)."""

    file: str
    verdict: str
    headroom: Number | None
    """The least of all operations, null where it is not known."""
    where: str
    """That operation."""


class Generation(Part):
    """One run of ``qprec generate``."""

    options: dict[str, Any]
    """As transformers' generation took them: do_sample, temperature, max_new_tokens, …"""
    guards: dict[str, Any]
    """Settings of every guard."""
    chat: bool
    base_model: str | None
    """Why the checkpoint looks like a base model, or null."""
    rows: Many[Continuation]
    trips: Many[Trip]
    error: SamplingError | None
    logits: LogitsCost | None
    probe: ProbeSummary | None

    @property
    def unwatched(self) -> bool:
        """Whether nobody looked at the logits."""
        watch = self.guards.get("watch")
        return isinstance(watch, dict) and watch.get("enabled") is False
