"""The trip file: requests whose logits were not finite, as a generation's record that `report` and `probe` take."""

import logging
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.model import Checkpoint, environment, locate, model_part, open_checkpoint
from qwen_precision.record import BadKind, Choice, Continuation, Generation, Kind, Prompt, Run, Stretch, Trip, save
from qwen_precision.settings import GuardSettings, Watch, as_text
from qwen_precision.torch_dtypes import short_name
from qwen_precision.version import __version__
from qwen_precision.vllm.asked import Asked, Met
from qwen_precision.vllm.live import engine_version, of_engine, row_of_ids
from qwen_precision.vllm.names import own_file
from qwen_precision.watcher import bound, clamped, look, may_repair

MOST_REQUESTS = 64
"""So many failing requests are kept, the first …"""
MOST_STEPS = 16
"""… and of each so many steps: what follows is printed from NaN, and tells nothing new."""
_WATCHES = {"float32_logits": False, "epsilon": False, "recover": False}


def trip_file() -> Path:
    """Where it is written: the environment variable ``QPREC_TRIPS``, else ``qprec-trips.json`` where vLLM runs.

    Never what a request says: whoever sends one is a stranger.
    """
    return Path(os.environ.get("QPREC_TRIPS") or "qprec-trips.json")


def trips_of(config: Any) -> "Trips":
    """Those of the engine that is configured so; of workers that see the same logits the first writes."""
    model = config.model_config
    folder, commit = locate(str(model.model), model.revision)
    checkpoint = open_checkpoint(folder, str(model.model), commit)
    parallel = config.parallel_config
    # where each worker draws the tokens of some requests, none of them sees all
    alone = getattr(parallel, "enable_batch_sharded_sampling", None)
    path = own_file(trip_file(), parallel, parallel.rank, os.getpid()) if alone or not parallel.rank else None
    if path is not None and ".pid" in path.name:
        logging.getLogger(__name__).warning("qprec: another process writes %s, this one %s.", trip_file(), path)
    return Trips(checkpoint, str(model.model), short_name(model.dtype), path)


class Trips:
    """Looks closely at rows that are not finite, mends those that may be, and writes the file anew with every trip.

    Args:
        checkpoint, source: of the model.
        dtype: that vLLM runs it in.
        path: of the file; None to write none.
    """

    def __init__(self, checkpoint: Checkpoint, source: str, dtype: str, path: Path | None) -> None:
        self._checkpoint, self._source, self._dtype, self._path = checkpoint, source, dtype, path
        self._failed: list[Asked] = []
        self._stopped: str | None = None
        self._guards = GuardSettings().clamp

    def meet(self, request: Asked, row: Tensor) -> Tensor | None:
        """Look at a row of logits that is not finite; what to put in its place, where that was asked for and may be.

        Args:
            request: whose it is.
            row: ``[vocabulary]``; not written into.
        """
        seen = look(row, Watch())
        if not request.guard or not may_repair(seen, self._guards, request.repairs):
            self.add(request, Met(request.step, seen.numbers()))
            return None
        limit = bound(self._guards, row.dtype, request.temperature, request.penalty)
        mended = clamped(row, limit)
        self.add(request, Met(request.step, seen.numbers(), {**look(mended, Watch()).numbers(), "bound": limit}))
        return mended

    def add(self, request: Asked, met: Met) -> None:
        """Keep a row of logits that was not finite."""
        if not request.known:
            logging.getLogger(__name__).warning(
                "qprec: a request failed at step %d, and is not kept: scheduled ahead, vLLM tells what it generated "
                "only to processors that are named (--logits-processors).",
                met.step,
            )
            return
        if not any(each is request for each in self._failed):
            if len(self._failed) >= MOST_REQUESTS:
                return
            self._failed.append(request)
        again = any(each.step == met.step for each in request.trips)  # of a prompt that is read in chunks
        if not again and len(request.trips) < MOST_STEPS:
            request.trips.append(met)
            self._save()

    def end(self, why: str) -> None:
        """Say in the file, too, that nobody looks any more."""
        self._stopped = why
        self._save()

    def _save(self) -> None:
        """A disk that is full ends the writing, and not the mending: of several workers only one writes."""
        if self._path is None:
            return
        try:
            save(self.run(), self._path)
        except (OSError, QprecError) as error:
            logging.getLogger(__name__).warning("qprec: %s is not written any more: %s", self._path, error)
            self._path = None

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
            stopped=self._stopped,
            unfinished=None,
            model=model_part(checkpoint, self._source, str(architectures[0]), layers),
            environment={**environment(torch.device("cpu")), **of_engine()},
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
        guarded = any(each.guard for each in self._failed)
        return Generation(
            options={"engine": "vllm"},
            guards=GuardSettings.model_validate({**_WATCHES, "act": guarded, "clamp": guarded}).model_dump(),
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
            clean_text=str(tokenizer.decode(ids[: request.trips[0].step])),
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

    def _trips(self, row: int, request: Asked) -> Iterator[Trip]:
        for met in request.trips:
            held = met.before
            bad = held["nan"] + held["inf"] + held["-inf"]
            kind: BadKind = "partly bad" if bad < held["elements"] else "wholly bad"
            why = f"{held['nan']:,.0f} NaN and {held['inf']:,.0f} +inf among {held['elements']:,.0f} logits"
            yield self._trip(row, met, "watch", kind, why)
            if met.after:
                yield self._trip(
                    row, met, "clamp", "repaired", f"NaN is out of the choice, +inf is {met.after['bound']:.6g}"
                )

    def _trip(self, row: int, met: Met, guard: str, kind: Kind, why: str) -> Trip:
        acted = guard == "clamp"
        return Trip(
            step=met.step,
            row=row,
            guard=guard,
            kind=kind,
            dtype=self._dtype,
            why=why,
            acted=acted,
            before=met.before,
            after=met.after if acted else {},
        )
