"""A search for what triggers an overflow: every token as the first one, or the lengths of a prompt.

First tokens go through the layers as sequences of one, a few thousand at once, in fp32 and only up to the step-up: the
layer after which magnitudes grow no more. Their magnitudes decide; the worst are then confirmed in the dtype itself.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_precision.again import outcomes, run_again
from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.evidence import Sweep, Swept
from qwen_precision.files import write_atomically
from qwen_precision.parts import in_words, rounded
from qwen_precision.probe import Job
from qwen_precision.prompts import as_text
from qwen_precision.skeleton import LayerCall, build, decoder_layers, layer_calls, path_of
from qwen_precision.weightcheck import WeightCheck, torch_dtype
from qwen_precision.weights import Scratch, WeightStore

Progress = Callable[[int, int, str], None]

AT_ONCE = 2048
"""Sequences that go through a layer together."""
_WORST = 20
"""Kept of a sweep."""
_CONFIRMED = 8
"""Of those, run in the dtype itself."""
_STEP = 0.9
"""The step-up is the first layer after which this share of the largest magnitude of all layers is reached."""


@dataclass
class _State:
    """What a sweep has found so far; kept beside the output, so that it can be taken up again."""

    key: str
    done: int = 0
    layers: int | None = None
    """How many are run; None before the first chunk."""
    over: int = 0
    worst: list[Swept] = field(default_factory=list)
    seconds: float = 0.0


class Walker:
    """Runs sequences through the first layers in fp32, and tells the largest hidden state of each.

    Args:
        job: whose checkpoint, device and memory mode are used.
    """

    def __init__(self, job: Job) -> None:
        self.model = build(job.checkpoint.config, job.settings.attention)
        self._store = WeightStore(job.checkpoint, self.model, job.device, job.resident, WeightCheck([]))
        self._path, self._layers = decoder_layers(self.model)
        self._device, self._scratch = job.device, Scratch()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(job.device)

    @property
    def depth(self) -> int:
        """All layers of the model."""
        return len(self._layers)

    def peaks(self, ids: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Largest magnitude after each layer, and its channel: both ``[layers, sequences]``.

        Args:
            ids: ``[sequences, tokens]``, all of one length.
            layers: how many to run.
        """
        dtype = torch_dtype(REFERENCE)
        with torch.inference_mode():
            hidden = self._embedded(ids.to(self._device)).to(dtype)
            calls = layer_calls(self.model, hidden, torch.ones_like(ids, device=self._device))
            values, channels = [], []
            for index in range(layers):
                sources = self._store.module(self._layers[index], f"{self._path}.{index}")
                self._scratch.place(self._layers[index], sources, dtype)
                hidden = _forward(self._layers[index], hidden, calls[index])
                self._scratch.release()
                size, place = hidden.abs().flatten(1).max(dim=1)
                values.append(size)
                channels.append(place % hidden.shape[-1])
        return torch.stack(values).cpu(), torch.stack(channels).cpu()

    def _embedded(self, ids: Tensor) -> Tensor:
        embed: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        name = f"{path_of(self.model, embed)}.weight"
        used, places = torch.unique(ids, return_inverse=True)
        found = [rows[used[(used >= start) & (used < start + len(rows))] - start].clone()
                 for start, rows in self._store.row_chunks(name, 16384)]  # fmt: skip
        return torch.cat(found)[places]


def _forward(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    out = layer.forward(hidden, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def first_tokens(
    job: Job, dtype: str, limit: int | None, texts: Sequence[str], state_file: Path | None, progress: Progress,
    announce: Callable[[str], None],
) -> Sweep:  # fmt: skip
    """Every id of the vocabulary (or ``limit`` of them, evenly spread) as the first token; or these texts.

    Raises:
        KeyboardInterrupt: it was interrupted; what was done is in ``state_file`` and is taken up by the same call.
    """
    rows = _rows(job, limit, texts)
    walker = Walker(job)
    state = _taken_up(state_file, _key(job, dtype, rows), announce)
    started, before = time.perf_counter(), state.seconds
    chunks = [list(range(at, min(at + AT_ONCE, len(rows)))) for at in range(state.done, len(rows), AT_ONCE)]
    for numbers in chunks:
        progress(numbers[0], len(rows), f"sweeping first tokens: {numbers[0]:,} of {len(rows):,}")
        _chunk(walker, job, dtype, [rows[n] for n in numbers], state, bool(texts))
        state.done = numbers[-1] + 1
        state.seconds = before + time.perf_counter() - started
        if numbers[0] == 0 and len(rows) > AT_ONCE:
            left = state.seconds / len(numbers) * (len(rows) - state.done) * (state.layers or 1) / walker.depth
            announce(f"sweeping {len(rows):,} first tokens through {state.layers} layers: about {left:.0f} s more")
        if state_file is not None:
            write_atomically(state_file, json.dumps(in_words(_plain(state))))
    worst = _confirmed(job, dtype, state.worst, rows, progress)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return Sweep(
        kind="first-token", dtype=dtype, tried=state.done, total=len(rows), layers=state.layers or 0, over=state.over,
        worst=worst, prompt=None, shortest_failing=None, longest_clean=None, seconds=round(state.seconds, 3),
    )  # fmt: skip


def _rows(job: Job, limit: int | None, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of everything that is tried, shortest first so that equal lengths go together."""
    if texts:
        rows = [list(job.checkpoint.tokenizer(text)["input_ids"])[: job.settings.max_tokens] for text in texts]
        return sorted((row for row in rows if row), key=len)
    vocabulary = int(job.checkpoint.config.vocab_size)
    count = vocabulary if limit is None else min(limit, vocabulary)
    return [[number * vocabulary // count] for number in range(count)]


def _key(job: Job, dtype: str, rows: list[list[int]]) -> str:
    """What must be the same for a sweep to be taken up again."""
    files = [(name, info.file, info.start, info.size) for name, info in job.checkpoint.tensors.items()]
    stamps = [(file, (job.checkpoint.folder / file).stat().st_mtime_ns) for file in sorted({each[1] for each in files})]
    told = repr((files, stamps, dtype, job.settings.attention, len(rows), hashlib.sha256(repr(rows).encode()).digest()))
    return hashlib.sha256(told.encode()).hexdigest()


def _taken_up(path: Path | None, key: str, announce: Callable[[str], None]) -> _State:
    """The state of an earlier sweep of the same, or a new one; a file that is not one is ignored."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if data.get("key") != key:
            return _State(key)
        worst = [Swept.model_validate(each) for each in data["worst"]]
        state = _State(key, int(data["done"]), int(data["layers"]), int(data["over"]), worst, float(data["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _State(key)
    announce(f"taking up the sweep in {path}: {state.done:,} are done")
    return state


def _plain(state: _State) -> dict[str, Any]:
    return {**vars(state), "worst": [each.model_dump() for each in state.worst]}


def _chunk(walker: Walker, job: Job, dtype: str, rows: list[list[int]], state: _State, texts: bool) -> None:
    """One lot: run it by lengths, count what is beyond the dtype's range, keep the worst."""
    lots: dict[int, list[list[int]]] = {}
    for row in rows:
        lots.setdefault(len(row), []).append(row)
    for lot in lots.values():
        values, channels = walker.peaks(torch.tensor(lot), state.layers or walker.depth)
        if state.layers is None:
            top = values.max(dim=1).values
            state.layers = int((top >= _STEP * top.max()).int().argmax()) + 1
        values, channels = values[: state.layers], channels[: state.layers]
        size, layer = values.nan_to_num(nan=float("inf")).max(dim=0)
        state.over += int((size > DTYPES[dtype].max).sum())
        for place in size.topk(min(_WORST, len(lot))).indices.tolist():
            at = int(layer[place])
            ids = lot[place]
            text = job.checkpoint.tokenizer.decode(ids) if texts else as_text(ids[0], job.checkpoint.tokenizer)
            state.worst.append(Swept(
                id=ids[0], text=str(text)[:200], magnitude=rounded(float(size[place])), layer=at,
                channel=int(channels[at, place]), fails=None,
            ))  # fmt: skip
    state.worst = sorted(state.worst, key=lambda each: -float(each.magnitude))[:_WORST]


def _confirmed(job: Job, dtype: str, worst: list[Swept], rows: list[list[int]], progress: Progress) -> list[Swept]:
    """The worst few, run in the dtype itself."""
    tokenizer = job.checkpoint.tokenizer
    by_text = {str(tokenizer.decode(row))[:200]: row for row in rows} if rows and len(rows[-1]) > 1 else {}
    tried = worst[:_CONFIRMED]
    ids = [by_text.get(each.text, [each.id or 0]) for each in tried]
    clean = outcomes(run_again(job, dtype, ids, progress)) if ids else {}
    checked = [each.model_copy(update={"fails": not clean[n] if n in clean else None}) for n, each in enumerate(tried)]
    return [*checked, *worst[_CONFIRMED:]]


# -- lengths ---------------------------------------------------------------------------------------------------

_SECTIONS = 7
"""Lengths tried together: all go through the layers at once."""


def lengths(job: Job, dtype: str, prompt: str, ids: Sequence[int], progress: Progress) -> Sweep:
    """The shortest prefix of a failing row that fails, and the longest that is clean, taking failure to be monotone.

    Args:
        job, dtype: to run in.
        prompt: its name.
        ids: of the row, which fails as a whole.
        progress: as for ``probe``.
    """
    started = time.perf_counter()
    clean, failing, tried = 0, len(ids), 0
    while failing - clean > 1:
        gap = failing - clean
        steps = sorted({clean + max(1, gap * part // (_SECTIONS + 1)) for part in range(1, _SECTIONS + 1)} - {failing})
        result = outcomes(run_again(job, dtype, [ids[:length] for length in steps], progress))
        tried += len(steps)
        if not result:
            break
        failing = next((length for n, length in enumerate(steps) if not result.get(n, True)), failing)
        clean = max([clean, *(length for n, length in enumerate(steps) if result.get(n, False) and length < failing)])
    return Sweep(
        kind="length", dtype=dtype, tried=tried, total=tried, layers=0, over=0, worst=[], prompt=prompt,
        shortest_failing=failing, longest_clean=clean, seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
