"""What the guards do at a step in which a row's logits could not be used: look, repair, keep, compute again, stop.

In the order of ``GUARDS``: ``watch`` says what it saw, ``clamp`` repairs a partly bad row, ``epsilon`` keeps the
likeliest token where the filters left none, ``recover`` drops the poisoned cache and computes the row again from its
tokens, in the next dtype of the ladder, or ends it. Each leaves a trip; told to only report, it leaves the trip alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.generate.draw import Drawn
from qwen_precision.generate.lanes import Lane, Models
from qwen_precision.generate.look import Look, bound, clamped, look, may_repair
from qwen_precision.generate.rows import RowState
from qwen_precision.record.generation import FILTERED, BadKind, Kind, Poison, Trip
from qwen_precision.settings.guards import GuardSettings

_RESCUES = 2
"""How often the weights are rescaled anew at one step; the second time with four times the margin."""


@dataclass
class Step:
    """One step as the mender finds it, and what it makes of it."""

    ids: Tensor
    """``[batch, tokens]``, what the logits were computed from: all of it is clean."""
    raw: Tensor
    """``[batch, vocabulary]``; replaced, never written into, when a row is mended."""
    drawn: list[Drawn]
    settled: set[int]
    """Rows that nothing more can be done about in this step."""
    forced: dict[int, int]
    """Tokens for rows that are not to be drawn."""


class Mender:
    """The guards at work.

    Args:
        guards: what may be done.
        models: where models in other dtypes come from.
        dtype: the one asked for.
        mask: ``[batch, prompt]`` 1 at tokens, 0 at padding.
        config: transformers' generation config.
        trips: the record's list, appended to.
    """

    def __init__(
        self, guards: GuardSettings, models: Models, dtype: str, mask: Tensor, config: Any, trips: list[Trip]
    ) -> None:
        self._guards, self._models, self._dtype = guards, models, dtype
        self._mask, self._config, self._trips = mask, config, trips
        self.lanes: list[Lane] = []
        self.owner: dict[int, Lane] = {}
        """Which lane computes a row; a row that is over keeps its last."""
        self._how: dict[str, str] = {}

    def begin(self, ids: Tensor) -> None:
        """One lane of all rows, in the dtype asked for."""
        lane = self._lane(self._dtype, range(len(ids)), ids)
        self.lanes, self.owner = [lane], dict.fromkeys(lane.rows, lane)

    def mend(self, step: Step, bad: Sequence[RowState], rows: Sequence[RowState]) -> bool:
        """Do what the guards may about the bad rows; says whether anything is different now."""
        failed: list[tuple[RowState, Look]] = []
        changed = False
        for state in bad:
            seen = look(step.raw[state.row], self._guards.watch)
            kind = seen.kind or _filtered(step.drawn[state.row])
            if kind is None:
                step.settled.add(state.row)  # a closer look cleared it
                continue
            if self._guards.watch.enabled:
                self._trip(
                    state,
                    "watch",
                    kind,
                    _seen(kind, seen),
                    seen.numbers(),
                    poisoned=self.owner[state.row].poisoned(state.row),
                )
            if self._repair(step, state, seen) or self._keep(step, state, kind):
                changed = self._guards.act or changed
            elif kind in FILTERED:
                self._end(state, seen, "another dtype would change nothing about what the processors did")
                changed = state.finish is not None or changed
            else:
                failed.append((state, seen))
        if failed and self._guards.recover.enabled:
            changed = self._recover(step, failed, rows) or changed
        # What was not mended now will not be in this step; what was only reported is not looked at again.
        step.settled.update(state.row for state in bad if not self._guards.act)
        step.settled.update(state.row for state, _ in failed)
        return changed

    def _trip(
        self, state: RowState, guard: str, kind: Kind, why: str, before: dict[str, float],
        after: dict[str, float] | None = None, poisoned: Poison | None = None, dtype: str | None = None,
    ) -> None:  # fmt: skip
        acted = self._guards.act and guard != "watch"
        self._trips.append(Trip(
            step=state.step, row=state.row, guard=guard, kind=kind, dtype=dtype or state.dtype, why=why, acted=acted,
            before=before, after=after or {}, poisoned=poisoned,
        ))  # fmt: skip

    # -- clamp, epsilon ----------------------------------------------------------------------------------------

    def _repair(self, step: Step, state: RowState, seen: Look) -> bool:
        settings = self._guards.clamp
        if not settings.enabled or not may_repair(seen, settings, state.repairs):
            return False
        temperature = float(self._config.temperature or 1.0) if self._config.do_sample else 1.0
        limit = bound(settings, step.raw.dtype, temperature, float(self._config.repetition_penalty or 1.0))
        why = f"NaN is out of the choice, +inf is {limit:.6g}"
        mended = clamped(step.raw[state.row], limit)
        after = {**look(mended, self._guards.watch).numbers(), "bound": limit}
        self._trip(state, "clamp", "repaired", why, seen.numbers(), after)
        if self._guards.act:
            step.raw = _with_row(step.raw, state.row, mended)
            state.repairs += 1
        return True

    def _keep(self, step: Step, state: RowState, kind: str) -> bool:
        if kind not in FILTERED or not self._guards.epsilon.enabled:
            return False
        token = int(step.raw[state.row].argmax())
        left = step.drawn[state.row].left
        self._trip(state, "epsilon", "likeliest kept", f"id {token} was the likeliest before the processors",
                   {"largest score": left}, {"largest score": float(step.raw[state.row, token])})  # fmt: skip
        if self._guards.act:
            step.forced[state.row] = token
        return True

    # -- recover -----------------------------------------------------------------------------------------------

    def _end(self, state: RowState, seen: Look, why: str) -> None:
        """End a row after its last good token, if recover may."""
        if self._guards.recover.enabled:
            self._trip(state, "recover", "stopped", f"the row is ended after its last good token: {why}",
                       seen.numbers())  # fmt: skip
            if self._guards.act:
                state.finish = "failed"

    def _recover(self, step: Step, failed: list[tuple[RowState, Look]], rows: Sequence[RowState]) -> bool:
        settings = self._guards.recover
        if settings.on_failure == "stop":
            for state, seen in failed:
                self._end(state, seen, "recover is told to stop")
            return self._guards.act
        if not self._guards.act:
            for state, seen in failed:
                way = "rescaled" if settings.on_failure == "rescale" else "in the next dtype of the ladder"
                why = f"the row would be computed again {way}"
                self._trip(state, "recover", "recovered", why, seen.numbers())
            return False
        by_dtype: dict[str, list[tuple[RowState, Look]]] = {}
        for state, seen in failed:
            by_dtype.setdefault(state.dtype, []).append((state, seen))
        for dtype, members in by_dtype.items():
            self._climb(step, dtype, members, rows)
        return True

    def _climb(self, step: Step, dtype: str, members: list[tuple[RowState, Look]], rows: Sequence[RowState]) -> None:
        """Up the ladder from ``dtype`` until every row has logits that can be used, or there is no rung left.

        Told to rescale, the rungs are the same dtype with weights rescaled for these rows.
        """
        ladder, rescale = self._guards.recover.ladder, self._guards.recover.on_failure == "rescale"
        rungs = ladder[ladder.index(dtype) + 1 :] if dtype in ladder else [name for name in ladder if name != dtype]
        rungs = [dtype] * _RESCUES if rescale else rungs
        why = f"{dtype} is the last dtype of the ladder ({', '.join(ladder)})"
        tried = {self.owner[state.row].weights for state, _ in members}
        for attempt, rung in enumerate(rungs):
            self.drop_idle(rows, [state for state, _ in members])
            try:
                numbers = [state.row for state, _ in members]
                weights = self._rescaled(rung, numbers, step.ids, tried, attempt) if rescale else rung
                lane = self._lane(rung, numbers, step.ids, weights)
                logits = lane.forward(step.ids)
            except QprecError as error:
                why = str(error)
                break
            except (MemoryError, torch.OutOfMemoryError):
                why = f"there is no memory for {rung}"
                break
            left = [pair for pair in members if not self._settled(step, pair, lane, logits)]
            if len(left) < len(members):
                self.lanes.append(lane)
            members, why = left, f"{rung} is the last dtype of the ladder ({', '.join(ladder)})"
            if not members:
                return
            tried.add(weights)
        for state, seen in members:
            self._trip(state, "recover", "not recovered", f"the row is ended after its last good token: {why}",
                       seen.numbers(), dtype=state.dtype)  # fmt: skip
            state.finish = "failed"

    def _rescaled(self, dtype: str, members: Sequence[int], ids: Tensor, tried: set[str], attempt: int) -> str:
        """Name of weights rescaled for what these rows have been so far."""
        width = self._mask.shape[1]
        first = [width - int(self._mask[row].sum()) for row in members]
        name, rescaling = self._models.rescale(
            dtype, [ids[row, start:].tolist() for row, start in zip(members, first, strict=True)], tried,
            4.0**attempt,
        )  # fmt: skip
        self._how[name] = f"{dtype} with the residual stream times 2^-{rescaling.stream}" + (
            f" and factors in {len(rescaling.layers)} layers" if rescaling.layers else "")  # fmt: skip
        return name

    def _lane(self, dtype: str, members: Sequence[int], ids: Tensor, weights: str | None = None) -> Lane:
        grown = self._mask.new_ones((len(self._mask), ids.shape[1] - self._mask.shape[1]))
        mask = torch.cat([self._mask, grown], dim=-1)
        settings = self._guards.float32_logits
        chunk = settings.chunk if settings.enabled else 0
        return Lane(self._models.get(weights or dtype), dtype, members, ids, mask, chunk, weights)

    def _settled(self, step: Step, pair: tuple[RowState, Look], lane: Lane, logits: Tensor) -> bool:
        """Take a row's new logits if they can be used; the row then belongs to the new lane."""
        state, before = pair
        row = logits[lane.rows.index(state.row)].to(torch.float32)
        seen = look(row, self._guards.watch)
        if seen.kind is not None:
            self._trip(state, "watch", seen.kind, _seen(seen.kind, seen), seen.numbers(),
                       poisoned=lane.poisoned(state.row), dtype=lane.dtype)  # fmt: skip
            return False
        way = self._how.get(lane.weights, lane.dtype)
        why = f"computed again in {way} from the clean prefix of {step.ids.shape[1]} tokens, without its cache"
        self._trip(state, "recover", "recovered", why, before.numbers(), seen.numbers())
        step.raw = _with_row(step.raw.to(torch.float32), state.row, row)
        self.owner[state.row] = lane
        state.moved(lane.dtype, lane.weights != lane.dtype)
        return True

    def drop_idle(self, rows: Sequence[RowState], leaving: Sequence[RowState] = ()) -> None:
        """Drop lanes of which every row is over (or leaves now), and the weights that only they used."""
        gone = {state.row for state in leaving}
        live = [state.row for state in rows if state.finish is None and state.row not in gone]
        for lane in list(self.lanes):
            if not any(self.owner[row] is lane for row in live):
                self.lanes.remove(lane)
                keep = self._guards.recover.then == "return" and lane.weights == self._dtype
                if not keep and all(other.weights != lane.weights for other in self.lanes):
                    self._models.release(lane.weights)

    def go_back(self, ids: Tensor, due: Sequence[RowState], rows: Sequence[RowState]) -> list[tuple[Lane, Tensor]]:
        """Try the dtype asked for again, from the tokens; gives the new lane and its logits for this step."""
        lane = self._lane(self._dtype, [state.row for state in due], ids)
        logits = lane.forward(ids)
        back = []
        for state in due:
            seen = look(logits[lane.rows.index(state.row)], self._guards.watch)
            kind: Kind = "stays" if seen.kind else "returned"
            why = f"{self._dtype} is bad on this prefix too" if seen.kind else f"{self._dtype} can compute this prefix"
            self._trip(state, "recover", kind, why, {}, seen.numbers())
            if seen.kind:
                state.stays = True
            else:
                back.append(state)
        if not back:
            return []
        for state in back:
            self.owner[state.row] = lane
            state.moved(self._dtype)
        self.drop_idle(rows)
        self.lanes.append(lane)
        return [(lane, logits)]


def _with_row(raw: Tensor, row: int, new: Tensor) -> Tensor:
    """A copy with one row replaced; the others keep their bits."""
    copy = raw.clone()
    copy[row] = new.to(raw.dtype)
    return copy


def _filtered(drawn: Drawn) -> BadKind | None:
    """What the processors made of a healthy row, if nothing can be drawn from it."""
    if drawn.drawable:
        return None
    return "all filtered" if drawn.left == -math.inf else "overflowed"


def _seen(kind: str, seen: Look) -> str:
    if kind == "wholly bad":
        return f"none of the {seen.elements:,} logits is finite"
    if kind == "partly bad":
        return f"{seen.nan:,} NaN and {seen.inf:,} +inf among {seen.elements:,} logits"
    if kind == "flat":
        return f"all {seen.finite:,} finite logits are equal"
    if kind == "overflowed":
        return "the logits are finite, but temperature or penalty took the scores out of range"
    return "the logits are finite, but the filters left no token"
