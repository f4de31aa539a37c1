"""Watches the model of one worker from start to stop, and makes a Run of what was measured."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen_precision.model import Checkpoint, environment, model_part
from qwen_precision.probe import Collector
from qwen_precision.record import Choice, Prompt, Row, Run
from qwen_precision.settings import ProbeSettings, as_text, text_of
from qwen_precision.version import __version__
from qwen_precision.vllm.batch import FlatInspector, Request, Spoilt, batch_of
from qwen_precision.vllm.names import PROCESS
from qwen_precision.vllm.seam import Seam
from qwen_precision.watcher import Located, Reading, Watcher, attached, storages

MOST_BATCHES = 256
"""So many different batches of requests are kept; of a longer watch the first."""


@dataclass(frozen=True)
class Worker:
    """What a record says of the worker that was watched."""

    checkpoint: Checkpoint
    source: str
    """As vLLM was given it."""
    dtype: str
    rank: int
    ranks: int
    replica: int = 0
    """Which of the engine's data parallel copies it belongs to."""


class _Guest(Watcher):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """The watcher in somebody else's engine: an operation runs once and gives what it gives, whatever befalls us."""

    def __init__(self, seam: Seam) -> None:
        super().__init__()
        self._seam = seam
        self._given: list[Any] = []
        self._theirs: BaseException | None = None

    # vLLM compiles a few functions even in its eager mode, and Dynamo would compile the watcher with them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._seam.stopped:
            return self.run(func, args, kwargs)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Exception as error:
            if error is self._theirs:
                raise
            self._seam.end(error)
            return self._given[0] if self._given else self.run(func, args, kwargs)
        finally:
            self._given, self._theirs = [], None

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            self._given = [super().run(func, args, kwargs)]
        except Exception as error:  # the engine's own
            self._theirs = error
            raise
        return self._given[0]


class Live:
    """The watch over one model.

    Every outermost call (the model, then its logits) is a forward of the batch that the runner has put together.
    Forwards of the same requests are one prompt: of several readings the largest stays, of several origins the first.

    Args:
        runner: vLLM's model runner.
        model: its model.
        worker: what the record says of it.
    """

    def __init__(self, runner: Any, model: nn.Module, worker: Worker) -> None:
        self._runner, self._model, self._worker = runner, model, worker
        self._seam = Seam()
        self._watcher, self._collector = _Guest(self._seam), Collector()
        self._near = ProbeSettings().near_overflow
        self._weights = storages(model)
        self._requests: list[Request] = []
        self._inspector: FlatInspector | None = None
        self._outermost: nn.Module | None = None
        self._spoilt: Spoilt = set()
        self._ids: dict[str, list[int]] = {}
        self._prompts: dict[tuple[str, ...], list[Request]] = {}
        self._left_out = 0
        with ExitStack() as hooks:  # where one of them cannot be put on, none stays
            self._attach(hooks)
            self._hooks = hooks.pop_all()

    def _attach(self, hooks: ExitStack) -> None:
        # Whatever thread runs the model: the watcher is on from the outermost module's first hook to its last.
        modules = list(self._model.modules())
        given, enter = self._guarded(self._given), self._guarded(self._enter)
        hooks.callback(self._model.register_forward_pre_hook(given, with_kwargs=True).remove)
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.enter_context(attached(self._model, self._watcher, self._guarded))
        leave = partial(self._seam.call, self._leave, always=True)  # the watcher must not stay on
        for module in modules:
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        return partial(self._seam.call, hook)

    def _given(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._outermost is not None:
            self._off()  # Ctrl-C broke the forward before this one off, and no hook ran
        tokens = kwargs.get("input_ids", args[0] if args else None)
        self._requests = batch_of(self._runner, tokens if isinstance(tokens, Tensor) else None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._outermost is not None:
            return
        rows = list(enumerate(self._requests))
        last = [(row, len(each.ids) - 1) for row, each in rows]
        every = [(row, position) for row, each in rows for position in range(each.start, len(each.ids))]
        places = every if module is self._model else last
        device = next((each.device for each in self._model.parameters()), torch.device("cpu"))
        valid = torch.ones((1, len(places)), dtype=torch.bool, device=device)
        names = [each.id for each in self._requests]
        self._inspector = FlatInspector(
            valid, self._near, self._weights, places=places, requests=names, spoilt=self._spoilt
        )
        self._watcher.inspect = self._inspector
        self._watcher.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._outermost = module

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if module is not self._outermost:
            return
        readings, found = self._off()
        if not self._seam.stopped:  # what was read of a forward up to a fault may be wrong
            self._keep(readings, found)
            self._seam.step += module is self._model

    def _off(self) -> tuple[list[Reading], list[Located]]:
        """Take the watcher off this thread; what it read."""
        self._outermost = None
        self._watcher.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        readings = self._watcher.take()
        found = self._inspector.found if self._inspector is not None else []
        self._watcher.inspect = self._inspector = None
        return readings, found

    def _keep(self, readings: list[Reading], found: list[Located]) -> None:
        if not self._requests:
            return  # a run of nobody's tokens: warming up
        names = tuple(each.id for each in self._requests)
        if names not in self._prompts and len(self._prompts) >= MOST_BATCHES:
            self._left_out += 1
            return
        number = list(self._prompts).index(names) if names in self._prompts else len(self._prompts)
        renamed = fused_norms(readings)
        self._collector.add(self._worker.dtype, number, [_as(each, renamed) for each in readings])
        self._collector.add_located(self._worker.dtype, number, [_at(each, renamed) for each in found])
        for each in self._requests:  # what was run is known; the runner's own list may hold placeholders before it
            known = self._ids.get(each.id, [])
            self._ids[each.id] = [*known[: each.start], *each.ids[len(known[: each.start]) :]]
        self._prompts[names] = self._requests

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def run(self) -> Run:
        """What was measured so far, as a record that `qprec report` shows like a probe's."""
        worker, device = self._worker, next(self._model.parameters()).device
        layers = int(getattr(worker.checkpoint.text_config, "num_hidden_layers", 0))
        settings = ProbeSettings(dtypes=[worker.dtype], reference=False)
        return Run(
            tool=f"qprec {__version__}",
            verb="probe",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            stopped=self._seam.stopped or None,
            unfinished=None,
            model=model_part(worker.checkpoint, worker.source, type(self._model).__name__, layers),
            environment={**environment(device), **of_engine()},
            settings=settings.model_dump(),
            choices=self._choices(),
            prompts=[self._prompt(number, each) for number, each in enumerate(self._prompts.values())],
            redacted=False,
            dtypes=[worker.dtype],
            reference=False,
            sites=self._collector.site_parts(),
            wider=self._collector.wider,
            casts=self._collector.casts,
            not_run=[],
            passes=self._collector.passes(),
            weights=[],
            weight_totals=[],
            scale_faults=[],
            seconds={},
            logits=None,
            generation=None,
            rescue=None,
            explanation=None,
            sweep=None,
        )

    def _choices(self) -> list[Choice]:
        rank = f"rank {self._worker.rank} of {self._worker.ranks}"
        choices = [Choice(what="engine", value=f"vLLM {engine_version()}", reason=f"watched in its worker, {rank}")]
        if self._worker.replica:
            copy = f"rank {self._worker.replica}"
            choices.append(Choice(what="data parallel", value=copy, reason="as vLLM started it"))
        if self._left_out:
            reason = f"only the first {MOST_BATCHES} different batches of requests are kept"
            choices.append(Choice(what="forwards left out", value=str(self._left_out), reason=reason))
        return [*choices, *self._worker.checkpoint.notes]

    def _prompt(self, number: int, requests: Sequence[Request]) -> Prompt:
        name = f"request {requests[0].id}" if len(requests) == 1 else f"batch {number} of {len(requests)} requests"
        tokenizer = self._worker.checkpoint.tokenizer
        rows = [row_of_ids(self._ids[each.id][: len(each.ids)], tokenizer) for each in requests]
        return Prompt(name=name, rows=rows, failed=None)


def row_of_ids(ids: list[int], tokenizer: Any) -> Row:
    """A request's tokens as a row of a prompt."""
    return Row(text=text_of(ids, tokenizer), ids=ids, tokens=[as_text(each, tokenizer) for each in ids], padding=0)


def of_engine() -> dict[str, str]:
    """What an environment says of the engine."""
    return {"vllm": engine_version(), PROCESS: str(os.getpid())}


def engine_version() -> str:
    """Of the vLLM that runs this process; empty where none does."""
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


_FUSED = {("add", 0): ("residual_add", 0), ("add", 1): ("add", 0)}
_FUSED |= {("cast", 2): ("residual_cast", 0), ("cast", 3): ("cast", 2)}


def fused_norms(readings: Sequence[Reading]) -> set[str]:
    """Paths of norms that add to the residual stream first, in PyTorch's own operations: they add twice."""
    return {each.module for each in readings if each.module.endswith("norm") and (each.op, each.call) == ("add", 1)}


def _as(reading: Reading, fused: set[str]) -> Reading:
    op, call = _FUSED.get((reading.op, reading.call), (reading.op, reading.call))
    return replace(reading, op=op, call=call) if reading.module in fused else reading


def _at(found: Located, fused: set[str]) -> Located:
    op, call = _FUSED.get((found.op, found.call), (found.op, found.call))
    return replace(found, op=op, call=call) if found.path in fused else found
