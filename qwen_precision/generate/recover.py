"""Recovery of a row of the batch: its poisoned cache dropped, computed again from its tokens, or ended.

Again means in the next dtype of the ladder, or in fp16 with weights rescaled for these rows. A lane holds the rows that
are computed together; this is the one place that knows which lane a row belongs to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.generate.repair import Step, said_of, with_row
from qwen_precision.generate.rescaler import Rescaler
from qwen_precision.generate.rows import RowState
from qwen_precision.generate.trips import Trips
from qwen_precision.model import Lane, Models
from qwen_precision.record import Kind
from qwen_precision.settings import GuardSettings
from qwen_precision.watcher import Look, look

_RESCUES = 2
"""How often the weights are rescaled anew at one step; the second time with four times the margin."""

Failed = Sequence[tuple[RowState, Look]]
"""Rows whose logits could not be repaired, each with the close look at it."""


class Recovery:
    """The guard ``recover``, and the lanes that rows are moved between.

    Args:
        guards: what may be done.
        models: where models in other dtypes come from.
        rescaler: where rescaled ones come from.
        dtype: the one asked for.
        rows: all rows of the batch.
        ids: ``[batch, prompt]``, padding included.
        mask: ``[batch, prompt]`` 1 at tokens, 0 at padding.
        trips: where it is written down.
    """

    def __init__(
        self,
        guards: GuardSettings,
        models: Models,
        rescaler: Rescaler,
        dtype: str,
        rows: Sequence[RowState],
        ids: Tensor,
        mask: Tensor,
        trips: Trips,
    ) -> None:
        self._guards, self._models, self._rescaler, self._dtype = guards, models, rescaler, dtype
        self._rows, self._mask, self._trips = rows, mask, trips
        self._how: dict[str, str] = {}
        lane = self._lane(dtype, range(len(ids)), ids)
        self.lanes: list[Lane] = [lane]
        self.owner: dict[int, Lane] = dict.fromkeys(lane.rows, lane)
        """Which lane computes a row; a row that is over keeps its last."""

    def end(self, state: RowState, seen: Look, why: str) -> None:
        """End a row after its last good token, if recover may."""
        if self._guards.recover.enabled:
            self._trips.write(
                state, "recover", "stopped", f"the row is ended after its last good token: {why}", seen.numbers()
            )
            if self._trips.act:
                state.finish = "failed"

    def recover(self, step: Step, failed: Failed) -> bool:
        """Do what may be done about rows that could not be repaired; says whether anything is different now."""
        settings = self._guards.recover
        if settings.on_failure == "stop":
            for state, seen in failed:
                self.end(state, seen, "recover is told to stop")
            return self._trips.act
        if not self._trips.act:
            for state, seen in failed:
                way = "rescaled" if settings.on_failure == "rescale" else "in the next dtype of the ladder"
                why = f"the row would be computed again {way}"
                self._trips.write(state, "recover", "recovered", why, seen.numbers())
            return False
        by_dtype: dict[str, list[tuple[RowState, Look]]] = {}
        for state, seen in failed:
            by_dtype.setdefault(state.dtype, []).append((state, seen))
        for dtype, members in by_dtype.items():
            self._climb(step, dtype, members)
        return True

    def _climb(self, step: Step, dtype: str, members: Failed) -> None:
        """Up the ladder from ``dtype`` until every row has logits that can be used, or there is no rung left.

        Told to rescale, the rungs are the same dtype with weights rescaled for these rows.
        """
        ladder, rescale = self._guards.recover.ladder, self._guards.recover.on_failure == "rescale"
        rungs = ladder[ladder.index(dtype) + 1 :] if dtype in ladder else [name for name in ladder if name != dtype]
        rungs = [dtype] * _RESCUES if rescale else rungs
        why = f"{dtype} is the last dtype of the ladder ({', '.join(ladder)})"
        tried = {self.owner[state.row].weights for state, _ in members}
        for attempt, rung in enumerate(rungs):
            self.drop_idle([state for state, _ in members])
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
            self._trips.write(
                state,
                "recover",
                "not recovered",
                f"the row is ended after its last good token: {why}",
                seen.numbers(),
                dtype=state.dtype,
            )
            state.finish = "failed"

    def _rescaled(self, dtype: str, members: Sequence[int], ids: Tensor, tried: set[str], attempt: int) -> str:
        """Name of weights rescaled for what these rows have been so far."""
        width = self._mask.shape[1]
        first = [width - int(self._mask[row].sum()) for row in members]
        name, rescaling = self._rescaler.rescale(
            [ids[row, start:].tolist() for row, start in zip(members, first, strict=True)],
            tried,
            4.0**attempt,
        )
        self._how[name] = f"{dtype} with the residual stream times 2^-{rescaling.stream}" + (
            f" and factors in {len(rescaling.layers)} layers" if rescaling.layers else ""
        )
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
            self._trips.write(
                state,
                "watch",
                seen.kind,
                said_of(seen.kind, seen),
                seen.numbers(),
                poisoned=lane.poisoned(state.row),
                dtype=lane.dtype,
            )
            return False
        way = self._how.get(lane.weights, lane.dtype)
        why = f"computed again in {way} from the clean prefix of {step.ids.shape[1]} tokens, without its cache"
        self._trips.write(state, "recover", "recovered", why, before.numbers(), seen.numbers())
        step.raw = with_row(step.raw.to(torch.float32), state.row, row)
        self.owner[state.row] = lane
        state.moved(lane.dtype, lane.weights != lane.dtype)
        return True

    def drop_idle(self, leaving: Sequence[RowState] = ()) -> None:
        """Drop lanes of which every row is over (or leaves now), and the weights that only they used."""
        gone = {state.row for state in leaving}
        live = [state.row for state in self._rows if state.finish is None and state.row not in gone]
        for lane in list(self.lanes):
            if not any(self.owner[row] is lane for row in live):
                self.lanes.remove(lane)
                keep = self._guards.recover.then == "return" and lane.weights == self._dtype
                if not keep and all(other.weights != lane.weights for other in self.lanes):
                    self._models.release(lane.weights)

    def go_back(self, ids: Tensor, due: Sequence[RowState]) -> list[tuple[Lane, Tensor]]:
        """Try the dtype asked for again, from the tokens; gives the new lane and its logits for this step."""
        lane = self._lane(self._dtype, [state.row for state in due], ids)
        logits = lane.forward(ids)
        back = []
        for state in due:
            seen = look(logits[lane.rows.index(state.row)], self._guards.watch)
            kind: Kind = "stays" if seen.kind else "returned"
            why = f"{self._dtype} is bad on this prefix too" if seen.kind else f"{self._dtype} can compute this prefix"
            self._trips.write(state, "recover", kind, why, {}, seen.numbers())
            if seen.kind:
                state.stays = True
            else:
                back.append(state)
        if not back:
            return []
        for state in back:
            self.owner[state.row] = lane
            state.moved(self._dtype)
        self.drop_idle()
        self.lanes.append(lane)
        return [(lane, logits)]
