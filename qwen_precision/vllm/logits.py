"""The logits processor, in vLLM's V1 interface: vLLM loads this file, by name, and nothing else imports it."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from qwen_precision.model import locate, open_checkpoint
from qwen_precision.torch_dtypes import short_name
from qwen_precision.vllm.trips import Asked, Trips, trip_file

ASK = "qprec"
"""What a request names in ``extra_args`` (served: ``vllm_xargs``) …"""
WATCH = "watch"
"""… and what it asks for."""


class WatchLogits(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Looks at the logits of requests that ask for it, and changes none: a row of NaN stays one, for all to see."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what it does not know. Raises a ValueError, which a server answers with 400."""
        asked = (sampling_params.extra_args or {}).get(ASK, WATCH)
        if asked != WATCH:
            raise ValueError(f"{ASK}: is {asked!r}; expected {WATCH!r}.")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._config = vllm_config
        self._asked: dict[int, Asked] = {}
        self._trips: Trips | None = None

    def is_argmax_invariant(self) -> bool:
        """False: else vLLM leaves it out where a whole batch is greedy, and greedy is where `!!!!` comes from."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Requests come, go and change places."""
        process_dict_updates(self._asked, batch_update, _asked)

    def apply(self, logits: Tensor) -> Tensor:
        """Look.

        Args:
            logits: ``[requests, vocabulary]``; given back as they are.
        """
        if self._asked:
            rows = sorted(self._asked)
            largest = logits[rows].amax(dim=-1)  # NaN and +inf carry; -inf is left where nothing can be drawn
            bad = (~torch.isfinite(largest)).tolist()
            for row in (row for row, is_bad in zip(rows, bad, strict=True) if is_bad):
                self._keep(self._asked[row], logits[row])
        return logits

    def _keep(self, request: Asked, row: Tensor) -> None:
        if self._config.parallel_config.rank:
            return  # the first worker's logits are everybody's
        if self._trips is None:
            model = self._config.model_config
            folder, commit = locate(str(model.model), model.revision)
            checkpoint = open_checkpoint(folder, str(model.model), commit)
            self._trips = Trips(checkpoint, str(model.model), short_name(model.dtype), trip_file())
        held = {"nan": torch.isnan(row), "inf": torch.isposinf(row), "-inf": torch.isneginf(row)}
        counts = {name: float(each.sum()) for name, each in held.items()}
        self._trips.add(request, {**counts, "elements": float(row.numel())})


def _asked(params: Any, prompt: list[int] | None, made: list[int]) -> Asked | None:
    wants = ASK in (params.extra_args or {}) and prompt is not None  # embeddings have no ids to run again
    return Asked(list(prompt or []), made) if wants else None
