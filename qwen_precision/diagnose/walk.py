"""Sequences of one length through the whole model in one dtype, every operation watched: each one's largest magnitude.

The weights of a layer are read for all sequences together; the logits are computed for a slice of the vocabulary at a
time and never kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import (
    Encoded,
    LayerCall,
    Models,
    Scratch,
    decoder_layers,
    finish,
    layer_calls,
    layers_of,
    path_of,
    run_layer,
)
from qwen_precision.probe import Job, forward
from qwen_precision.qwen3 import layer_of, name_of
from qwen_precision.torch_dtypes import torch_dtype
from qwen_precision.watcher import Sequences, Watcher, attached, computing

_LOGITS = 1 << 25
"""So many logits are computed at once."""


@dataclass
class Peaks:
    """The largest magnitude of every sequence: ``[sequences]`` each; infinite where anything was not finite."""

    value: Tensor
    channel: Tensor
    layer: list[int | None]
    """None outside the layers."""
    name: list[str]
    """Of the operation."""

    @classmethod
    def of(cls, seen: Sequences) -> "Peaks":
        """What was seen, on the host."""
        sites = [seen.sites[place] for place in seen.site.tolist()]
        return cls(
            seen.value.cpu(), seen.channel.cpu(), [layer_of(each[0]) for each in sites], [name_of(*e) for e in sites]
        )

    def and_then(self, more: "Peaks") -> "Peaks":
        """These sequences and others behind them."""
        value, channel = (torch.cat(pair) for pair in ((self.value, more.value), (self.channel, more.channel)))
        return Peaks(value, channel, self.layer + more.layer, self.name + more.name)


def walker(job: Job, dtype: str) -> "Walker":
    """What runs sequences through a job's model; ``dtype`` is the one whose range is asked about."""
    return (WholeWalker if job.whole else LayerWalker)(job, dtype)


class Walker(ABC):
    """Runs sequences through the model, without a prompt or a record.

    Args:
        job: whose checkpoint, device and memory mode are used; it was measured in the dtypes asked for here.
        dtype: whose range is asked about.
    """

    def __init__(self, job: Job, dtype: str) -> None:
        self._device, self._watcher = job.device, Watcher()
        self._computing = computing(job.settings.arithmetic)
        self.depth = len(layers_of(job.model)[1])
        """All layers of the model."""
        # What the dtype's own model computes in a wider format (the insides of norms) may be as large as it likes.
        sites = list(job.collector.sites)
        self._wider = {sites[place] for place in job.collector.wider.get(dtype, {})}
        self._limit = torch.finfo(torch_dtype(dtype)).max

    def peaks(self, ids: Tensor, dtype: str = REFERENCE) -> Peaks:
        """Run these sequences.

        Args:
            ids: ``[sequences, tokens]``, all of one length.
            dtype: to run in.
        """
        seen = Sequences(len(ids), ids.shape[1], self._device, lambda site: site not in self._wider)
        try:
            self._watcher.inspect = seen
            with torch.inference_mode(), self._computing:
                self._run(ids.to(self._device), dtype, seen)
        finally:
            self._watcher.inspect = None
            self._watcher.take()
        if float(seen.mixed) <= self._limit or len(ids) == 1:
            return Peaks.of(seen)
        # Something was too large and it cannot be told whose it is: fewer are looked at.
        half = len(ids) // 2
        return self.peaks(ids[:half], dtype).and_then(self.peaks(ids[half:], dtype))

    @abstractmethod
    def _run(self, ids: Tensor, dtype: str, seen: Sequences) -> None:
        """Run ``[sequences, tokens]`` in a dtype, every operation shown to ``seen``."""


class WholeWalker(Walker):
    """For a model that transformers loads as a whole."""

    def __init__(self, job: Job, dtype: str) -> None:
        super().__init__(job, dtype)
        self._models = Models(job.checkpoint, job.device, job.settings.attention, headless=True)
        self._held = ""

    def _run(self, ids: Tensor, dtype: str, seen: Sequences) -> None:
        if self._held != dtype:
            self._models.release(self._held)
            self._held = dtype
        model = self._models.get(dtype)
        self._watcher.forget()
        seen.enter()
        with attached(model, self._watcher), self._watcher:
            forward(self._models.called(dtype), Encoded(ids, torch.ones_like(ids)))


class LayerWalker(Walker):
    """For a model whose layers hold weights one at a time."""

    def __init__(self, job: Job, dtype: str) -> None:
        super().__init__(job, dtype)
        assert job.store is not None
        self.model, self._store = job.model, job.store.checked_before()
        self._path, self._layers = decoder_layers(self.model)
        self._scratch = Scratch()

    def _run(self, ids: Tensor, dtype: str, seen: Sequences) -> None:
        try:
            with attached(self.model, self._watcher):
                self._through(ids, torch_dtype(dtype), seen)
        finally:
            self._scratch.clear()

    def _through(self, ids: Tensor, dtype: torch.dtype, seen: Sequences) -> None:
        hidden = embedded = self._embedded(ids, dtype, seen)
        mask = torch.ones_like(ids)
        calls = layer_calls(self.model, embedded, mask)
        for index, layer in enumerate(self._layers):
            path = f"{self._path}.{index}"
            self._scratch.place(layer, self._store.module(layer, path), dtype)
            hidden = self._watched(seen, partial(run_layer, layer, hidden, calls[index]), path, calls[index])
            self._scratch.release()
        base: nn.Module = self.model.base_model  # type: ignore[assignment]
        for child, part in base.named_children():
            if child not in {"layers", "embed_tokens"}:
                path = f"{self.model.base_model_prefix}.{child}"
                self._scratch.place(part, self._store.module(part, path), dtype)
        hidden = self._watched(seen, partial(finish, self.model, embedded, mask, hidden))
        self._head(hidden, dtype, seen)

    def _embedded(self, ids: Tensor, dtype: torch.dtype, seen: Sequences) -> Tensor:
        embed: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        name = f"{path_of(self.model, embed)}.weight"
        used, places = torch.unique(ids, return_inverse=True)
        embed.padding_idx = None  # it only matters to gradients, and would point outside the few rows
        self._scratch.place(embed, {"weight": self._store.rows(name, used)}, dtype)
        hidden = self._watched(seen, partial(embed, places))
        self._scratch.clear()  # no other lot has as many rows
        return hidden

    def _head(self, hidden: Tensor, dtype: torch.dtype, seen: Sequences) -> None:
        """The logits, where the checkpoint has an lm_head."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        name = f"{path_of(self.model, head)}.weight"
        rows = max(1, _LOGITS // (hidden.shape[0] * hidden.shape[1]))
        for start, weight in self._store.row_chunks(name, rows) if self._store.parts(name) else ():
            self._scratch.place(head, {"weight": weight}, dtype)
            seen.shift = start
            self._watched(seen, partial(head, hidden))
            self._scratch.release()

    def _watched(
        self, seen: Sequences, forward: Callable[[], Tensor], path: str = "", call: LayerCall | None = None
    ) -> Tensor:
        self._watcher.forget()
        seen.enter()
        if call is not None:
            self._watcher.enter_call(path, call.kwargs)
        with self._watcher:
            out = forward()
        self._watcher.take()
        return out
