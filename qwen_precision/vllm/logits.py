"""The logits processor, in both of vLLM's interfaces: vLLM loads this file, by name or as installed, and nothing else.

As an installed entry point it is loaded by every vLLM of its environment: it imports nothing that vLLM has not loaded
itself, and what it cannot do ends in a warning, because the engine serves others too.
"""

import logging
import os
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qwen_precision.vllm.asked import ASK, GUARD, WATCH, Asked, asked, wish_of
from qwen_precision.vllm.seam import Seam

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ImportError:  # a vLLM that has only the second interface

    class LogitsProcessor:  # type: ignore[no-redef]
        """In place of the first."""


try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotsProcessor
except ImportError:  # a vLLM that has only the first interface

    class SlotsProcessor:  # type: ignore[no-redef]
        """In place of the second."""


OTHER = "another one acts"
"""Why one is idle that is not to say so."""


class WatchLogits(LogitsProcessor, SlotsProcessor):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Looks at the logits of requests that ask for it; a row that is wholly NaN stays so, for all to see.

    V1 tells who comes, goes and changes places (``update_state``), and gives a row a request. V2 gives every request a
    slot (``add_request``), and with each step which slot a row is of.
    """

    _acting: ClassVar[Any] = None
    """Weak: the one that acts; where it is installed and named, an engine has two."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what it does not know. Raises a ValueError, which a server answers with 400."""
        wish = wish_of(sampling_params)
        if wish is not None and wish not in (WATCH, GUARD):
            raise ValueError(f"{ASK}: is {wish!r}; expected {WATCH!r} or {GUARD!r}.")

    def __init__(self, vllm_config: Any, states: Any, is_pin_memory: bool = False) -> None:
        """In V1 the second argument is the device, in V2 what is known of the slots."""
        self._config, self._states = vllm_config, states
        self._asked: dict[int, Asked] = {}
        self._trips: Any = None
        self._warned = False
        self._idle, self._seam = OTHER, Seam(self._end)
        self._idle = self._seam.call(self._why_idle, instead=OTHER)
        if not self._idle:
            WatchLogits._acting = weakref.ref(self)

    def _why_idle(self) -> str:
        """Who runs the server decides whether a file is written, never who sends a request."""
        other = WatchLogits._acting() if WatchLogits._acting is not None else None
        if other is not None and other._config is self._config:
            return OTHER
        named = [str(each) for each in self._config.model_config.logits_processors or ()]
        if os.environ.get("QPREC_TRIPS") or any(type(self).__name__ in each for each in named):
            return ""
        return "set QPREC_TRIPS to a file, or name the processor with --logits-processors"

    def is_argmax_invariant(self) -> bool:
        """False: else vLLM leaves it out where a whole batch is greedy, and greedy is where `!!!!` comes from."""
        return False

    # -- V1 --------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        """Requests come, go and change places."""
        if batch_update is not None:
            self._seam.call(self._update, batch_update)

    def _update(self, batch_update: Any) -> None:
        for row in batch_update.removed:
            self._asked.pop(row, None)
        for row, params, prompt, made in batch_update.added:
            self._begin(row, asked(params, prompt, made))
        for first, second, way in batch_update.moved:
            one, other = self._asked.pop(first, None), self._asked.pop(second, None)
            self._begin(second, one)
            if way.name == "SWAP":
                self._begin(first, other)

    def _begin(self, place: int, request: Asked | None) -> None:
        self._asked.pop(place, None)
        if request is None:
            return
        if not self._idle:
            self._asked[place] = request
        elif self._idle != OTHER:
            self._warn(f"a request asks to be watched, and is not: {self._idle}")

    # -- V2 --------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether the request in this slot asks for anything; its ids are read once they are needed."""
        return bool(self._seam.call(self._add, req_idx, sampling_params, instead=False))

    def _add(self, slot: int, params: Any) -> bool:
        self._begin(slot, asked(params, [], []))
        return slot in self._asked

    def _rows(self, context: Any) -> dict[int, Asked]:
        """Rows of this step that are of a request that asks; of drafted tokens, which may yet be refused, the first."""
        if self._asked.keys().isdisjoint(context.idx_mapping_np.tolist()):
            return {}  # told on the host, without waiting for the device
        found = {}
        slots, drafts = context.expanded_idx_mapping.tolist(), context.expanded_local_pos.tolist()
        for row, (slot, draft, last) in enumerate(zip(slots, drafts, context.pos.tolist(), strict=True)):
            if slot in self._asked and not draft and last + 1 >= int(self._states.prefill_len.np[slot]):
                self._ids(slot, last + 1)
                found[row] = self._asked[slot]
        return found

    def _ids(self, slot: int, known: int) -> None:
        prompt = int(self._states.prompt_len.np[slot])
        ids = self._states.all_token_ids.gpu[slot, :known].tolist()
        self._asked[slot].prompt, self._asked[slot].made = ids[:prompt], ids[prompt:]

    # -- both ------------------------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Look.

        Args:
            logits: ``[rows, vocabulary]``; given back as they are, but for a partly bad row of who asked for the guard.
            ctx: V2's: whose rows they are.
        """
        if self._asked:
            self._seam.call(self._apply, logits, ctx)
        return logits

    def _apply(self, logits: Tensor, context: Any) -> None:
        rows = self._asked if context is None else self._rows(context)
        numbers = sorted(rows)
        if numbers:
            largest = logits[numbers].amax(dim=-1)  # NaN and +inf carry; -inf is left where nothing can be drawn
            bad = (~torch.isfinite(largest)).tolist()
            self._look({row: rows[row] for row, is_bad in zip(numbers, bad, strict=True) if is_bad}, logits)
        self._seam.step += 1

    def _look(self, rows: Mapping[int, Asked], logits: Tensor) -> None:
        for row, request in rows.items():
            mended = self._file().meet(request, logits[row])
            if mended is not None:
                logits[row] = mended

    def _end(self) -> None:
        """After a fault of ours, whoever asked: what was met is kept, and the file says that it is not all."""
        self._asked.clear()
        if not self._idle:
            self._file().end(self._seam.stopped)

    def _warn(self, what: str) -> None:
        """Once: who sends requests shall not fill a log."""
        if not self._warned:
            logging.getLogger(__name__).warning("qprec: %s.", what)
        self._warned = True

    def _file(self) -> Any:
        if self._trips is None:
            from qwen_precision.vllm.trips import trips_of  # heavy, and needed by who fails alone

            self._trips = trips_of(self._config)
        return self._trips
