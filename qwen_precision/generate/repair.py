"""Repair of one row of logits that could not be used as it was: look closely, clamp, keep the likeliest.

In the order of ``GUARDS``: ``watch`` says what it saw, ``clamp`` repairs a partly bad row, ``epsilon`` keeps the
likeliest token where the filters left none. What they cannot repair is for ``recover.py``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwen_precision.generate.draw import Drawn
from qwen_precision.generate.rows import RowState
from qwen_precision.generate.trips import Trips
from qwen_precision.record import FILTERED, BadKind, Poison
from qwen_precision.settings import GuardSettings
from qwen_precision.watcher import Look, bound, clamped, look, may_repair


@dataclass
class Step:
    """One step as it was drawn, and what the guards made of it."""

    ids: Tensor
    """``[batch, tokens]``, what the logits were computed from: all of it is clean."""
    raw: Tensor
    """``[batch, vocabulary]``; replaced, never written into, when a row is repaired."""
    drawn: list[Drawn]
    settled: set[int]
    """Rows that nothing more can be done about in this step."""
    forced: dict[int, int]
    """Tokens for rows that are not to be drawn."""


class Repair:
    """The guards that stay within one row of logits.

    Args:
        guards: what may be done.
        config: transformers' generation config.
        trips: where it is written down.
    """

    def __init__(self, guards: GuardSettings, config: Any, trips: Trips) -> None:
        self._guards, self._config, self._trips = guards, config, trips

    def look(self, step: Step, state: RowState, poison: Callable[[], Poison | None]) -> tuple[Look, BadKind | None]:
        """The close look at a row, and what is wrong with it, if anything is; written down where it is watched."""
        seen = look(step.raw[state.row], self._guards.watch)
        kind = seen.kind or _filtered(step.drawn[state.row])
        if kind is not None and self._guards.watch.enabled:
            self._trips.write(state, "watch", kind, said_of(kind, seen), seen.numbers(), poisoned=poison())
        return seen, kind

    def repair(self, step: Step, state: RowState, seen: Look, kind: BadKind) -> bool:
        """Whether the row could be repaired (or would have been, where guards only report)."""
        return self._clamp(step, state, seen) or self._keep(step, state, kind)

    def _clamp(self, step: Step, state: RowState, seen: Look) -> bool:
        settings = self._guards.clamp
        if not settings.enabled or not may_repair(seen, settings, state.repairs):
            return False
        temperature = float(self._config.temperature or 1.0) if self._config.do_sample else 1.0
        limit = bound(settings, step.raw.dtype, temperature, float(self._config.repetition_penalty or 1.0))
        why = f"NaN is out of the choice, +inf is {limit:.6g}"
        mended = clamped(step.raw[state.row], limit)
        after = {**look(mended, self._guards.watch).numbers(), "bound": limit}
        self._trips.write(state, "clamp", "repaired", why, seen.numbers(), after)
        if self._trips.act:
            step.raw = with_row(step.raw, state.row, mended)
            state.repairs += 1
        return True

    def _keep(self, step: Step, state: RowState, kind: str) -> bool:
        if kind not in FILTERED or not self._guards.epsilon.enabled:
            return False
        token = int(step.raw[state.row].argmax())
        left = step.drawn[state.row].left
        self._trips.write(
            state,
            "epsilon",
            "likeliest kept",
            f"id {token} was the likeliest before the processors",
            {"largest score": left},
            {"largest score": float(step.raw[state.row, token])},
        )
        if self._trips.act:
            step.forced[state.row] = token
        return True


def with_row(raw: Tensor, row: int, new: Tensor) -> Tensor:
    """A copy with one row replaced; the others keep their bits."""
    copy = raw.clone()
    copy[row] = new.to(raw.dtype)
    return copy


def _filtered(drawn: Drawn) -> BadKind | None:
    """What the processors made of a healthy row, if nothing can be drawn from it."""
    if drawn.drawable:
        return None
    return "all filtered" if drawn.left == -math.inf else "overflowed"


def said_of(kind: str, seen: Look) -> str:
    """What is wrong with a row."""
    if kind == "wholly bad":
        return f"none of the {seen.elements:,} logits is finite"
    if kind == "partly bad":
        return f"{seen.nan:,} NaN and {seen.inf:,} +inf among {seen.elements:,} logits"
    if kind == "flat":
        return f"all {seen.finite:,} finite logits are equal"
    if kind == "overflowed":
        return "the logits are finite, but temperature or penalty took the scores out of range"
    return "the logits are finite, but the filters left no token"
