"""Shadow execution: the fp32 reference and the other dtypes go through the layers together.

For each layer its weights are read once. The reference runs it, then every other dtype runs it on *its own*
hidden states with weights cast to that dtype: what comes out is bit-identical to that dtype's own model, and
the dtypes can be compared while it runs. All prompts go along, so a streamed checkpoint is read once.

A dtype whose hidden states are no longer finite is re-seeded from the reference at the next layer (clamped
into its range where the reference itself is out of it) and marked so: what overflows by itself in a later
layer is then found too, not only the first place.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.model import (
    Encoded,
    LayerCall,
    Scratch,
    WeightStore,
    decoder_layers,
    finish,
    layer_calls,
    path_of,
    run_layer,
)
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.foretold import foretell
from qwen_precision.probe.head import Head
from qwen_precision.probe.hidden import MASSIVE, as_error, distance, massive, massive_numbers
from qwen_precision.probe.task import FinalHook, Task
from qwen_precision.probe.watched import Section, WatchedRun
from qwen_precision.progress import Announce, Progress, silent, untold
from qwen_precision.record import Reseed
from qwen_precision.torch_dtypes import torch_dtype, widened
from qwen_precision.watcher import Reading, Watcher, attached, computing


@dataclass
class _Stream:
    """One dtype on one prompt between two layers."""

    embedded: Tensor
    hidden: Tensor
    calls: list[LayerCall]
    given: Tensor = field(default_factory=lambda: torch.empty(0))
    """What went into the layer that ran last."""
    reseeded_rows: set[int] = field(default_factory=set)


class Shadow:
    """One shadow run over all prompts and dtypes.

    Args:
        model: from ``skeleton.build``, with weights on the meta device.
        store: where its weights come from.
        prompts: what to run.
        task: which dtypes, and how.
        collector: takes the readings; holds what was measured also when the run dies.
        progress: called with (steps done, steps in all, what is being done).
        on_final: see ``task.FinalHook``.
        announce: called with how long it will take, where the prompts are many.
    """

    def __init__(
        self,
        model: nn.Module,
        store: WeightStore,
        prompts: list[Encoded],
        task: Task,
        collector: Collector,
        progress: Progress = silent,
        on_final: FinalHook | None = None,
        announce: Announce = untold,
    ) -> None:
        self.model, self.store, self.prompts, self.task = model, store, prompts, task
        self.collector, self.progress, self.on_final, self.announce = collector, progress, on_final, announce
        self.watcher = Watcher()
        self.measure = WatchedRun(self.watcher, collector, task)
        self.scratch = Scratch()
        self.seconds: dict[str, float] = {"read and cast": 0.0, **dict.fromkeys(task.dtypes, 0.0)}
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._path, self._layers = decoder_layers(model)
        # One reader ahead: maps, pages in and checks the next layer's weights while this one computes.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qprec-reader")
        self._ahead: Future[dict[str, Tensor]] | None = None

    def run(self) -> None:
        """Run everything; on an exception the model has its meta weights and no hooks again."""
        steps = len(self._layers) + 2
        try:
            with torch.inference_mode(), attached(self.model, self.watcher):
                self.progress(0, steps, "embedding")
                self._embed()
                for index in range(len(self._layers)):
                    self.progress(index + 1, steps, f"layer {index}")
                    self._layer(index)
                self.progress(steps - 1, steps, "final norm and lm_head")
                self._end()
            self.progress(steps, steps, "done")
        finally:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self.seconds |= self.store.seconds
            self._ahead = None
            self.scratch.clear()
            self._streams.clear()

    # -- the parts ----------------------------------------------------------------------------------------

    def _embed(self) -> None:
        """Token embeddings, from only the rows that the prompts use."""
        embed: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        path = path_of(self.model, embed)
        used, places = torch.unique(torch.cat([prompt.ids.flatten() for prompt in self.prompts]), return_inverse=True)
        gathered = self._gather(f"{path}.weight", used)
        compact = [
            part.view_as(prompt.ids)
            for part, prompt in zip(
                places.split([prompt.ids.numel() for prompt in self.prompts]), self.prompts, strict=True
            )
        ]
        embed.padding_idx = None  # it only matters to gradients, and would point outside the few rows
        for name in self.task.dtypes:
            self.scratch.place(embed, {"weight": gathered}, torch_dtype(name))
            rows = self._watched(name, embed, [partial(embed, ids) for ids in compact])
            for index, (prompt, hidden) in enumerate(zip(self.prompts, rows, strict=True)):
                calls = layer_calls(self.model, hidden, prompt.mask)
                self._streams[name, index] = _Stream(hidden, hidden, calls)
        self.scratch.release()

    def _gather(self, name: str, used: Tensor) -> Tensor:
        """Rows of the embedding, in the order of ``used`` (sorted)."""
        start_time = time.perf_counter()
        found = self.store.rows(name, used)
        self.seconds["read and cast"] += time.perf_counter() - start_time
        return found

    def _layer(self, index: int) -> None:
        layer, sources = self._layers[index], self._read(index)
        ran: dict[tuple[str, int], list[Reading]] = {}
        ends: dict[tuple[str, int], list[float]] = {}
        for name in self.task.dtypes:
            started = time.perf_counter()
            self.scratch.place(layer, sources, torch_dtype(name))
            placed = time.perf_counter()
            if index == 0 and name == self.task.dtypes[0]:
                foretell(self.prompts, self.task.dtypes, len(self._layers) + 2, partial(self._try, name), self.announce)
            readings, numbers = self._run_prompts(name, index)
            for prompt, (error, *bounds) in enumerate(numbers):
                ran[name, prompt], ends[name, prompt] = readings[prompt], bounds
                self._compare(name, prompt, error)
                self._massive(name, prompt, index, bounds)
                self._local(name, prompt, layer, self._streams[name, prompt].calls[index])
            self.seconds["read and cast"] += placed - started
            self.seconds[name] += time.perf_counter() - placed
        self._look_closely(index, sources, ran)
        # Only then: whoever stops it in between leaves no stream that was replaced for a reason nobody looked at.
        for (name, prompt), bounds in ends.items():
            self._reseed(name, prompt, index, bounds)
        self.scratch.release()

    def _try(self, name: str, prompt: int) -> None:
        """The first layer on a prompt, for the time it takes: nothing of it is kept."""
        stream = self._streams[name, prompt]
        stream.given = stream.hidden
        self.measure.rehearse(self._section(name, prompt, 0))

    def _run_prompts(self, name: str, index: int) -> tuple[list[list[Reading]], list[list[float]]]:
        """One layer on every prompt; then all that is to be known of them, in one transfer.

        Returns:
            By prompt: the readings; and how far the stream is from the reference's, its least and its largest number.
        """
        numbers = range(len(self.prompts))
        streams = [self._streams[name, prompt] for prompt in numbers]
        for stream in streams:
            stream.given = stream.hidden
        outs, started = self.measure.start_all([self._section(name, prompt, index) for prompt in numbers])
        for stream, out in zip(streams, outs, strict=True):
            stream.hidden = out
        return self.measure.finish(started, [self._numbers(name, prompt) for prompt in numbers])

    def _numbers(self, name: str, prompt: int) -> Tensor:
        """What ``_run_prompts`` tells of a stream, on the device: over the real tokens of rows that are its own."""
        reference, stream = self._streams.get((REFERENCE, prompt)), self._streams[name, prompt]
        # One number tells of all: aminmax carries NaN and infinity through.
        bounds = [widened(each) for each in torch.aminmax(stream.hidden)]
        if reference is None or name == REFERENCE:
            return torch.stack([torch.zeros_like(bounds[0]), *bounds])
        own = self.prompts[prompt].mask.bool()
        if stream.reseeded_rows:
            own = own.clone()
            own[sorted(stream.reseeded_rows)] = False
        return torch.stack([distance(stream.hidden, reference.hidden, own), *bounds])

    def _section(self, name: str, prompt: int, index: int) -> Section:
        """One layer on what went into it; it can be run again after the next was."""
        layer, stream = self._layers[index], self._streams[name, prompt]
        call = stream.calls[index]
        forward = partial(run_layer, layer, stream.given, call)
        enter = partial(self.watcher.enter_call, f"{self._path}.{index}", call.kwargs)
        return Section((name, prompt), self.prompts[prompt].mask.bool(), layer, forward, enter)

    def _look_closely(self, index: int, sources: dict[str, Tensor], ran: dict[tuple[str, int], list[Reading]]) -> None:
        """Run the layer again where something was not finite or near a limit: the reference first, which tells more."""
        placed = self.task.dtypes[-1]
        for (name, prompt), readings in ran.items():
            wide = self.measure.wide(ran, prompt)
            if not self.measure.is_asked(name, readings, wide):
                continue
            started = time.perf_counter()
            if placed != name:
                self.scratch.place(self._layers[index], sources, torch_dtype(name))
                placed = name
            self.measure.look(self._section(name, prompt, index), readings, wide)
            self.seconds[name] += time.perf_counter() - started

    def _read(self, index: int) -> dict[str, Tensor]:
        """A layer's weights, read ahead of time; sends the reader for the next and the disk for the one after."""
        started = time.perf_counter()
        sources = self._ahead.result() if self._ahead is not None else self._fetch(index)
        self._ahead = self._reader.submit(self._fetch, index + 1) if index + 1 < len(self._layers) else None
        self.seconds["read and cast"] += time.perf_counter() - started
        return sources

    def _fetch(self, index: int) -> dict[str, Tensor]:
        if index + 1 < len(self._layers):
            self.store.prefetch(self._layers[index + 1], f"{self._path}.{index + 1}")
        return self.store.module(self._layers[index], f"{self._path}.{index}")

    def _watched(self, name: str, module: nn.Module, forwards: list[Callable[[], Tensor]]) -> list[Tensor]:
        """A part outside the layers on every prompt; looked at closely at once, the reference first."""
        masks = [prompt.mask.bool() for prompt in self.prompts]
        sections = [
            Section((name, prompt), mask, module, forward)
            for prompt, (mask, forward) in enumerate(zip(masks, forwards, strict=True))
        ]
        return self.measure.run_all(sections)

    def _compare(self, name: str, prompt: int, error: float) -> None:
        """Note how far a stream is from the reference's."""
        if (REFERENCE, prompt) in self._streams and name != REFERENCE:
            self.collector.column(name, prompt).layer_error.append(as_error(error))

    def _local(self, name: str, prompt: int, layer: nn.Module, call: LayerCall) -> None:
        """The error that this layer makes by itself: it is run on the reference's hidden states."""
        reference, stream = self._streams.get((REFERENCE, prompt)), self._streams[name, prompt]
        if not self.task.local or reference is None or name == REFERENCE:
            return
        with computing(self.task.arithmetic):
            out = run_layer(layer, reference.given.to(stream.hidden.dtype), call)
        error = float(distance(out, reference.hidden, self.prompts[prompt].mask.bool()))
        self.collector.column(name, prompt).local_error.append(as_error(error))

    def _massive(self, name: str, prompt: int, index: int, bounds: list[float]) -> None:
        """Note the reference's largest hidden state after a layer, where it dwarfs the others."""
        if name != REFERENCE or all(abs(bound) <= MASSIVE for bound in bounds):
            return
        hidden = self._streams[name, prompt].hidden
        numbers = massive_numbers(hidden, self.prompts[prompt].mask.bool()).tolist()
        self.collector.column(name, prompt).massive += massive(numbers, hidden.shape[1], index)

    def _reseed(self, name: str, prompt: int, index: int, bounds: list[float]) -> None:
        """Replace the rows of a stream that are no longer finite by the reference's, for the next layer."""
        stream = self._streams[name, prompt]
        reference = self._streams.get((REFERENCE, prompt))
        if reference is None or name == REFERENCE or index + 1 == len(self._layers):
            return
        if all(map(math.isfinite, bounds)):
            return
        bad = ~torch.isfinite(stream.hidden).flatten(1).all(dim=1)
        limit = DTYPES[name].max
        source = reference.hidden
        clamped = bool((source[bad].abs() > limit).any())
        seed = source.clamp(-limit, limit).to(stream.hidden.dtype)
        if not bool(torch.isfinite(seed).all()):
            return  # the reference is dead as well: there is nothing to go on from
        stream.hidden = torch.where(bad[:, None, None], seed, stream.hidden)
        rows = [int(row) for row in bad.nonzero()]
        stream.reseeded_rows.update(rows)
        column = self.collector.column(name, prompt)
        column.reseeded.append(Reseed(layer=index + 1, rows=rows, clamped=clamped))

    def _end(self) -> None:
        """Final norm for every stream, then lm_head."""
        base: nn.Module = self.model.base_model  # type: ignore[assignment]
        norms = [(name, part) for name, part in base.named_children() if name not in {"layers", "embed_tokens"}]
        hidden: dict[tuple[str, int], Tensor] = {}
        for name in self.task.dtypes:
            started = time.perf_counter()
            for child, part in norms:
                path = f"{self.model.base_model_prefix}.{child}"
                self.scratch.place(part, self.store.module(part, path), torch_dtype(name))
            streams = [self._streams[name, prompt] for prompt in range(len(self.prompts))]
            ends: list[Callable[[], Tensor]] = [
                partial(finish, self.model, stream.embedded, prompt.mask, stream.hidden)
                for stream, prompt in zip(streams, self.prompts, strict=True)
            ]
            hidden |= {(name, prompt): states for prompt, states in enumerate(self._watched(name, base, ends))}
            self.seconds[name] += time.perf_counter() - started
        self.scratch.clear()  # the layers' buffers are not needed any more; lm_head wants room
        head = Head(self.model, self.store, self.scratch, self.measure)
        head.run(hidden, self.prompts, self.task, self.seconds, self.on_final)
        for (name, prompt), stream in self._streams.items():
            column = self.collector.column(name, prompt)
            for row in stream.reseeded_rows & set(range(len(column.top1))):
                column.top1[row] = None  # what follows a re-seeded stream is not what this dtype would print
                for measured in (column.kl, column.logprob_error, column.upcast):
                    if row < len(measured):
                        measured[row] = None
