"""The decoding loop: transformers prepares everything, the guards stand around each step.

It is handed to ``model.generate`` as its decoding method (``custom_generate``), so that the generation config,
processors, warpers and stopping criteria are transformers' own. With no guard firing, each step does what
transformers' own loop does, and the tokens are the same.

A step: every lane gives its rows' logits; one token a row is drawn; one copy to the host says how it went. If a
row's logits were bad, the random state is put back, the row is repaired (``repair.py``) or recovered (``recover.py``),
and the step is drawn again: the other rows come out as before, bit for bit.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_precision.generate.draw import Chooser, Drawn, sampling_error
from qwen_precision.generate.recover import Recovery
from qwen_precision.generate.repair import Repair, Step
from qwen_precision.generate.rescaler import Rescaler
from qwen_precision.generate.rows import RowState
from qwen_precision.generate.trips import Trips
from qwen_precision.judge import at_the_end
from qwen_precision.model import Lane, Models, Stopwatch, decoding
from qwen_precision.progress import Progress
from qwen_precision.record import FILTERED, LogitsCost, SamplingError, bad_trips, mended_steps
from qwen_precision.settings import GuardSettings
from qwen_precision.watcher import Look, nearly_uniform

OnToken = Callable[[int, int], None]
"""Called with row and id of each accepted token."""


class Decoder:
    """The decoding method that ``model.generate`` calls; what was decoded so far can be read at any time.

    Args:
        models: where models in other dtypes come from.
        rescaler: where rescaled ones come from.
        dtype: the first dtype.
        guards: what may intervene.
        progress: called with (step, steps at most, what is being done).
        on_token: called with each token.
    """

    def __init__(
        self,
        models: Models,
        rescaler: Rescaler,
        dtype: str,
        guards: GuardSettings,
        progress: Progress,
        on_token: OnToken,
    ) -> None:
        self.models, self.rescaler, self.dtype, self.guards = models, rescaler, dtype, guards
        self.progress, self.on_token = progress, on_token
        self.session: Session | None = None
        """What is being decoded; None until transformers has prepared everything."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The decoding method: ids in, ids with the continuation out; called by ``model.generate``."""
        # Not an argument of its own: transformers would take it out of what it prepares.
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        self.session = Session(self, input_ids, mask, logits_processor, stopping_criteria, generation_config)
        return self.session.run(model)


class Session:
    """One guarded generation.

    Args:
        given: the decoder, with everything that does not depend on the prompt.
        ids: ``[batch, prompt]``, padding included.
        mask: ``[batch, prompt]`` 1 at tokens, 0 at padding.
        processors: transformers' prepared logits processors, warpers included.
        criteria: transformers' prepared stopping criteria.
        config: the generation config as transformers prepared it, its own defaults filled in.
    """

    def __init__(self, given: Decoder, ids: Tensor, mask: Tensor, processors: Any, criteria: Any, config: Any) -> None:
        self._dtype, self._guards = given.dtype, given.guards
        self._progress, self._on_token = given.progress, given.on_token
        self._prompt, self.config = ids, config
        self.rows = [RowState(row) for row in range(len(ids))]
        for state in self.rows:
            state.moved(self._dtype)
        self.trips = Trips(self._guards.act)
        self.error: SamplingError | None = None
        self._first: tuple[int, int, int] | None = None
        self._held = 0
        self._were_going: list[bool] = []
        self._eos = set(_listed(config.eos_token_id))
        self._watch = Stopwatch(ids.device)
        pad = next(iter(_listed(config.pad_token_id)), 0)
        self._choose = Chooser(processors, criteria, bool(config.do_sample), pad, self._guards.watch.enabled)
        self._repair = Repair(self._guards, config, self.trips)
        self._recovery = Recovery(
            self._guards, given.models, given.rescaler, self._dtype, self.rows, ids, mask, self.trips
        )

    def run(self, model: Any) -> Tensor:
        """Decode until every row is over; gives the ids with the continuation."""
        ids = self._step(self._prompt)
        with decoding(model) if self._unfinished() else nullcontext():
            while self._unfinished():
                ids = self._step(ids)
        return ids

    @property
    def cost(self) -> LogitsCost | None:
        """What the logits took so far; None before the first step. On a GPU this waits for it."""
        if self._first is None:
            return None
        size, vocabulary, chunks = self._first
        return LogitsCost(
            upcast=self._guards.float32_logits.enabled,
            upcast_seconds=round(self._watch.seconds, 6),
            bytes=size,
            whole_prompt_bytes=size * self._prompt.shape[1],
            chunks=chunks,
            steps=max(state.step for state in self.rows),
            vocabulary=vocabulary,
            held=self._held,
        )

    # -- one step ----------------------------------------------------------------------------------------------

    def _step(self, ids: Tensor) -> Tensor:
        number, limit = ids.shape[1] - self._prompt.shape[1], self.config.max_length - self._prompt.shape[1]
        self._progress(number, limit, f"token {number + 1} of at most {limit}")
        raw = self._logits(ids)
        dice = _dice(ids.device) if self.config.do_sample else None
        longer, drawn = self._choose(ids, raw, self._going(ids), self._dtypes())
        step = Step(ids, raw, drawn, set(), {})
        while bad := [state for state in self._unfinished() if self._is_bad(step, state)]:
            if not self._mend(step, bad):
                break
            if dice is not None:
                _roll_back(dice, ids.device)
            longer, step.drawn = self._choose(ids, step.raw, self._going(ids), self._dtypes(), step.forced)
        if self.config.do_sample and self._refused(step):
            return longer
        for state in self._unfinished():
            self._accept(state, step.drawn[state.row])
        if len(self._recovery.lanes) > 1 and self._unfinished():
            self._recovery.drop_idle()
        return longer

    def _mend(self, step: Step, bad: Sequence[RowState]) -> bool:
        """What the guards may do about the bad rows: repair each, recover the rest; is anything different now?"""
        failed: list[tuple[RowState, Look]] = []
        changed = False
        for state in bad:
            lane = self._recovery.owner[state.row]
            seen, kind = self._repair.look(step, state, partial(lane.poisoned, state.row))
            if kind is None:
                step.settled.add(state.row)  # a closer look cleared it
            elif self._repair.repair(step, state, seen, kind):
                changed = self._guards.act or changed
            elif kind in FILTERED:
                self._recovery.end(state, seen, "another dtype would change nothing about what the processors did")
                changed = state.finish is not None or changed
            else:
                failed.append((state, seen))
        if failed and self._guards.recover.enabled:
            changed = self._recovery.recover(step, failed) or changed
        # What was not mended now will not be in this step; what was only reported is not looked at again.
        step.settled.update(state.row for state in bad if not self._guards.act)
        step.settled.update(state.row for state, _ in failed)
        return changed

    def _unfinished(self) -> list[RowState]:
        return [state for state in self.rows if state.finish is None]

    def _dtypes(self) -> list[str]:
        """Of each row, the dtype that it is computed in now."""
        return [state.dtype for state in self.rows]

    def _going(self, ids: Tensor) -> Tensor:
        """``[batch]`` bool, rows that are not over; copied to the device only when that changes."""
        now = [state.finish is None for state in self.rows]
        if now != self._were_going:
            self._were_going, self._mask_going = now, torch.tensor(now, device=ids.device)
        return self._mask_going

    def _is_bad(self, step: Step, state: RowState) -> bool:
        """From the step's cheap numbers, whether a row wants a closer look."""
        drawn, watch = step.drawn[state.row], self._guards.watch
        if state.row in step.settled or state.row in step.forced:
            return False
        if not drawn.drawable or (watch.enabled and not drawn.usable):
            return True
        return watch.enabled and drawn.margin == 0 and nearly_uniform(drawn.entropy, drawn.top1, watch)

    def _logits(self, ids: Tensor) -> Tensor:
        """``[batch, vocabulary]`` raw logits of this step; zeros for rows that no lane computes any more."""
        fresh = self._go_back(ids)
        parts = fresh + [
            (lane, lane.forward(ids)) for lane in self._recovery.lanes if lane not in [f[0] for f in fresh]
        ]
        dtypes = frozenset(lane.dtype for lane, _ in parts)
        upcast = self._guards.float32_logits.enabled or len(dtypes) > 1
        ready = self._watch.timed(
            dtypes, lambda: [(lane, logits.to(torch.float32) if upcast else logits) for lane, logits in parts]
        )
        if self._first is None:
            first = ready[0][1]
            self._first = first.numel() * first.element_size(), first.shape[-1], parts[0][0].chunks
        self._held = max(self._held, *(lane.held for lane, _ in parts))
        if len(ready) == 1 and len(ready[0][0].rows) == len(self.rows):
            return ready[0][1]
        raw = ready[0][1].new_zeros((len(self.rows), ready[0][1].shape[-1]))
        for lane, logits in ready:
            for number, row in enumerate(lane.rows):
                if self._recovery.owner[row] is lane:
                    raw[row] = logits[number]
        return raw

    def _go_back(self, ids: Tensor) -> list[tuple[Lane, Tensor]]:
        settings = self._guards.recover
        if settings.then == "stay" or not settings.enabled:
            return []
        due = [
            s
            for s in self._unfinished()
            if s.dtype != self._dtype and not s.stays and s.since() >= settings.return_after
        ]
        return self._recovery.go_back(ids, due) if due else []

    def _refused(self, step: Step) -> bool:
        """Whether torch would refuse to draw: then everything ends here, as it does in transformers."""
        going = self._unfinished()
        rows = [s.row for s in going if not step.drawn[s.row].drawable and s.row not in step.forced]
        if not rows:
            return False
        self.error = SamplingError(step=going[0].step, rows=rows, message=sampling_error())
        for state in going:
            state.finish = "error"
        return True

    # -- one token ---------------------------------------------------------------------------------------------

    def _accept(self, state: RowState, drawn: Drawn) -> None:
        state.accept(drawn)
        self._on_token(state.row, drawn.token)
        if drawn.done:
            ended = state.step >= self.config.max_length - self._prompt.shape[1]
            state.finish = "eos" if drawn.token in self._eos else "length" if ended else "criterion"
        elif self._guards.degenerate.enabled:
            self._notice(state)

    def _notice(self, state: RowState) -> None:
        """The guard ``degenerate``: one trip a symptom, and the end of the row where bad logits made it."""
        limits = self._guards.degenerate
        reach = max(limits.run, limits.period * limits.repeats, limits.descending + 1)
        tail = state.ids[-reach:]
        found = at_the_end(tail, limits, int(self.config.top_k or 0) if self.config.do_sample else 0)
        if found is None or any(
            t.guard == "degenerate" and t.row == state.row and t.kind == found.kind and t.step >= state.step - reach
            for t in self.trips
        ):
            return
        start = state.step - len(tail) + found.start
        mended = mended_steps(self.trips, state.row)
        made_by = [t for t in bad_trips(self.trips, state.row) if t.step >= start and t.step not in mended]
        acted = self._guards.act and (bool(made_by) or limits.stop_loops)
        cause = (
            "bad logits made it"
            if made_by
            else "the logits were healthy"
            if self._guards.watch.enabled
            else ("whether the logits were bad was not watched")
        )
        self.trips.write(
            state,
            "degenerate",
            found.kind,
            f"{found.length} tokens from step {start} on are a {found.kind}; {cause}",
            {"start": start, "length": found.length, "period": found.period},
            step=state.step - 1,
            acted=acted,
        )
        if acted:
            state.finish = "degenerate"


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _dice(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _roll_back(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
