"""The decoding loop: transformers prepares everything, the guards stand around each step.

It is handed to ``model.generate`` as its decoding method (``custom_generate``), so that the generation config,
processors, warpers and stopping criteria are transformers' own. With no guard firing, each step does what
transformers' own loop does, and the tokens are the same.

A step: every lane gives its rows' logits; one token a row is drawn; one copy to the host says how it went. If a
row's logits were bad, the random state is put back, the row is mended (``mend.py``), and the step is drawn again:
the other rows come out as before, bit for bit.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from qwen_precision.generate.draw import Chooser, Drawn, sampling_error
from qwen_precision.generate.lanes import Lane, Models
from qwen_precision.generate.look import nearly_uniform
from qwen_precision.generate.mend import Mender, Step
from qwen_precision.generate.rows import RowState
from qwen_precision.generate.stopwatch import Stopwatch
from qwen_precision.judge.degenerate import at_the_end
from qwen_precision.record.generation import LogitsCost, SamplingError, Trip, bad_trips, mended_steps
from qwen_precision.settings.guards import GuardSettings

Progress = Callable[[int, int, str], None]
OnToken = Callable[[int, int], None]
"""Called with row and id of each accepted token."""


class Decoder:
    """One guarded generation; what it has so far can be read at any time, also after an exception.

    Args:
        models: where models in other dtypes come from.
        dtype: the first dtype.
        guards: what may intervene.
        progress: called with (step, steps at most, what is being done).
        on_token: called with each token.
    """

    def __init__(
        self, models: Models, dtype: str, guards: GuardSettings, progress: Progress, on_token: OnToken
    ) -> None:
        self._models, self._dtype, self._guards = models, dtype, guards
        self._progress, self._on_token = progress, on_token
        self.rows: list[RowState] = []
        self.trips: list[Trip] = []
        self.error: SamplingError | None = None
        self._first: tuple[int, int] | None = None
        self.config: Any = None
        """The generation config as transformers prepared it, its own defaults filled in."""
        self._were_going: list[bool] = []

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The decoding method: ids in, ids with the continuation out; called by ``model.generate``."""
        # Not an argument of its own: transformers would take it out of what it prepares.
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        self.rows = [RowState(row) for row in range(len(input_ids))]
        for state in self.rows:
            state.moved(self._dtype)
        self._prompt, self.config = input_ids, generation_config
        self._eos = set(_listed(generation_config.eos_token_id))
        self._watch = Stopwatch(input_ids.device)
        choose = Chooser(
            logits_processor, stopping_criteria, bool(generation_config.do_sample),
            next(iter(_listed(generation_config.pad_token_id)), 0), self._guards.watch.enabled,
        )  # fmt: skip
        self._mender = Mender(self._guards, self._models, self._dtype, mask, generation_config, self.trips)
        self._mender.begin(input_ids)
        with ExitStack() as decoding:
            ids = self._step(input_ids, choose)
            # On a GPU transformers decodes the experts of a MoE layer in another way than it prefills them.
            optimised = getattr(model, "_optimize_model_for_decode", None)
            if optimised is not None and self._unfinished():
                decoding.enter_context(optimised())
            while self._unfinished():
                ids = self._step(ids, choose)
        return ids

    @property
    def cost(self) -> LogitsCost | None:
        """What the logits took so far; None before the first step. On a GPU this waits for it."""
        if self._first is None:
            return None
        size, chunks = self._first
        return LogitsCost(
            upcast=self._guards.float32_logits.enabled, upcast_seconds=round(self._watch.seconds, 6), bytes=size,
            whole_prompt_bytes=size * self._prompt.shape[1], chunks=chunks,
        )  # fmt: skip

    # -- one step ----------------------------------------------------------------------------------------------

    def _step(self, ids: Tensor, choose: Chooser) -> Tensor:
        number, limit = ids.shape[1] - self._prompt.shape[1], self.config.max_length - self._prompt.shape[1]
        self._progress(number, limit, f"token {number + 1} of at most {limit}")
        raw = self._logits(ids)
        dice = _dice(ids.device) if self.config.do_sample else None
        longer, drawn = choose(ids, raw, self._going(ids))
        step = Step(ids, raw, drawn, set(), {})
        while bad := [state for state in self._unfinished() if self._is_bad(step, state)]:
            if not self._mender.mend(step, bad, self.rows):
                break
            if dice is not None:
                _roll_back(dice, ids.device)
            longer, step.drawn = choose(ids, step.raw, self._going(ids), step.forced)
        if self.config.do_sample and self._refused(step):
            return longer
        for state in self._unfinished():
            self._accept(state, step.drawn[state.row])
        if len(self._mender.lanes) > 1 and self._unfinished():
            self._mender.drop_idle(self.rows)
        return longer

    def _unfinished(self) -> list[RowState]:
        return [state for state in self.rows if state.finish is None]

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
        parts = fresh + [(lane, lane.forward(ids)) for lane in self._mender.lanes if lane not in [f[0] for f in fresh]]
        upcast = self._guards.float32_logits.enabled or len({lane.dtype for lane, _ in parts}) > 1
        with self._watch:
            ready = [(lane, logits.to(torch.float32) if upcast else logits) for lane, logits in parts]
        if self._first is None:
            self._first = ready[0][1].numel() * ready[0][1].element_size(), parts[0][0].chunks
        if len(ready) == 1 and len(ready[0][0].rows) == len(self.rows):
            return ready[0][1]
        raw = ready[0][1].new_zeros((len(self.rows), ready[0][1].shape[-1]))
        for lane, logits in ready:
            for number, row in enumerate(lane.rows):
                if self._mender.owner[row] is lane:
                    raw[row] = logits[number]
        return raw

    def _go_back(self, ids: Tensor) -> list[tuple[Lane, Tensor]]:
        settings = self._guards.recover
        if settings.then == "stay" or not settings.enabled:
            return []
        due = [s for s in self._unfinished() if s.dtype != self._dtype and not s.stays
               and s.since() >= settings.return_after]  # fmt: skip
        return self._mender.go_back(ids, due, self.rows) if due else []

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
        if found is None or any(t.guard == "degenerate" and t.row == state.row and t.kind == found.kind
                                and t.step >= state.step - reach for t in self.trips):  # fmt: skip
            return
        start = state.step - len(tail) + found.start
        mended = mended_steps(self.trips, state.row)
        made_by = [t for t in bad_trips(self.trips, state.row) if t.step >= start and t.step not in mended]
        acted = self._guards.act and (bool(made_by) or limits.stop_loops)
        cause = "bad logits made it" if made_by else "the logits were healthy" if self._guards.watch.enabled else (
            "whether the logits were bad was not watched")  # fmt: skip
        self.trips.append(Trip(
            step=state.step - 1, row=state.row, guard="degenerate", kind=found.kind, dtype=state.dtype,
            why=f"{found.length} tokens from step {start} on are a {found.kind}; {cause}", acted=acted,
            before={"start": start, "length": found.length, "period": found.period}, after={},
        ))  # fmt: skip
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
