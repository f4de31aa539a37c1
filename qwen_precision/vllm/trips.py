"""The trip file: requests whose logits were not finite, as a generation's record that `report` and `probe` take."""

import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from qwen_precision.model import Checkpoint, environment, model_part
from qwen_precision.record import Choice, Continuation, Generation, Prompt, Run, Stretch, Trip, save
from qwen_precision.settings import GuardSettings, as_text
from qwen_precision.version import __version__
from qwen_precision.vllm.live import engine_version, row_of_ids

MOST_REQUESTS = 64
"""So many failing requests are kept, the first …"""
MOST_STEPS = 16
"""… and of each so many steps: what follows is printed from NaN, and tells nothing new."""
_WATCHES = {"act": False, "float32_logits": False, "clamp": False, "epsilon": False, "recover": False}


def trip_file() -> Path:
    """Where it is written: the environment variable ``QPREC_TRIPS``, else ``qprec-trips.json`` where vLLM runs.

    Never what a request says: whoever sends one is a stranger.
    """
    return Path(os.environ.get("QPREC_TRIPS") or "qprec-trips.json")


@dataclass
class Asked:
    """A request that asked to be watched."""

    prompt: list[int]
    made: list[int]
    """The engine's own list of what it generated: it grows."""
    trips: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Step, and what the row of logits held."""

    @property
    def step(self) -> int:
        """The token that is about to be drawn, from 0."""
        return len(self.made)


class Trips:
    """Writes the file anew with every trip.

    Args:
        checkpoint, source: of the model.
        dtype: that vLLM runs it in.
        path: of the file.
    """

    def __init__(self, checkpoint: Checkpoint, source: str, dtype: str, path: Path) -> None:
        self._checkpoint, self._source, self._dtype, self._path = checkpoint, source, dtype, path
        self._failed: list[Asked] = []

    def add(self, request: Asked, held: dict[str, float]) -> None:
        """Keep a row of logits that was not finite.

        Args:
            request: whose it is.
            held: how many of its elements are NaN, +inf (``inf``) and -inf, and how many there are (``elements``).
        """
        if not any(each is request for each in self._failed):
            if len(self._failed) >= MOST_REQUESTS:
                return
            self._failed.append(request)
        if len(request.trips) < MOST_STEPS:
            request.trips.append((request.step, held))
            save(self.run(), self._path)

    def run(self) -> Run:
        """The record."""
        checkpoint, name = self._checkpoint, type(self._checkpoint.config).__name__
        architectures = checkpoint.config.architectures or [name]
        layers = int(getattr(checkpoint.text_config, "num_hidden_layers", 0))
        rows = [row_of_ids(each.prompt, checkpoint.tokenizer) for each in self._failed]
        return Run(
            tool=f"qprec {__version__}",
            verb="generate",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            stopped=None,
            unfinished=None,
            model=model_part(checkpoint, self._source, str(architectures[0]), layers),
            environment={**environment(torch.device("cpu")), "vllm": engine_version()},
            settings={"dtype": self._dtype},
            choices=[Choice(what="engine", value=f"vLLM {engine_version()}", reason="logits watched as it served")],
            prompts=[Prompt(name="requests", rows=rows, failed=None)],
            redacted=False,
            dtypes=[self._dtype],
            reference=False,
            sites=[],
            wider={},
            casts={},
            not_run=[],
            passes=[],
            weights=[],
            weight_totals=[],
            scale_faults=[],
            seconds={},
            logits=None,
            generation=self._generation(),
            rescue=None,
            explanation=None,
            sweep=None,
        )

    def _generation(self) -> Generation:
        return Generation(
            options={"engine": "vllm"},
            guards=GuardSettings.model_validate(_WATCHES).model_dump(),
            chat=False,
            base_model=None,
            rows=[self._continuation(row, each) for row, each in enumerate(self._failed)],
            trips=[trip for row, each in enumerate(self._failed) for trip in self._trips(row, each)],
            error=None,
            logits=None,
            probe=None,
        )

    def _continuation(self, row: int, request: Asked) -> Continuation:
        tokenizer = self._checkpoint.tokenizer
        ids = [max(0, each) for each in request.made]  # scheduled ahead, the newest is a placeholder
        unknown: list[float | None] = [None] * len(ids)
        return Continuation(
            row=row,
            input=str(tokenizer.decode(request.prompt)),
            ids=ids,
            tokens=[as_text(each, tokenizer) for each in ids],
            text=str(tokenizer.decode(ids, skip_special_tokens=True)),
            clean_text=str(tokenizer.decode(ids[: request.trips[0][0]])),
            stretches=[Stretch(start=0, dtype=self._dtype, rescaled=False)],
            top1=unknown,
            margin=unknown,
            entropy=unknown,
            logprob=unknown,
            logprob_error=unknown,
            mass_lost=unknown,
            ranks=[None] * len(ids),
            changed=[None] * len(ids),
            finish="interrupted",  # it went on, and nothing more of it was kept
        )

    def _trips(self, row: int, request: Asked) -> list[Trip]:
        return [
            Trip(
                step=step,
                row=row,
                guard="watch",
                kind="partly bad" if held["nan"] + held["inf"] + held["-inf"] < held["elements"] else "wholly bad",
                dtype=self._dtype,
                why=f"{held['nan']:,.0f} NaN and {held['inf']:,.0f} +inf among {held['elements']:,.0f} logits",
                acted=False,
                before=held,
                after={},
            )
            for step, held in request.trips
        ]
