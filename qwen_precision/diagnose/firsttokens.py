"""A search for what triggers an overflow: every token as the first one, or the lengths of a prompt.

First tokens go through the layers as sequences of one, a few thousand at once, in fp32 and only up to the step-up: the
layer after which magnitudes grow no more. The largest magnitudes decide, of hidden states and of what goes into and
comes out of every linear layer (so of the SwiGLU product too); the worst are then confirmed in the dtype itself.
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

from qwen_precision.diagnose.again import outcomes, run_again
from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.errors import QprecError
from qwen_precision.files import write_atomically
from qwen_precision.model import (
    Scratch,
    WeightCheck,
    WeightStore,
    build,
    decoder_layers,
    layer_calls,
    move_buffers,
    path_of,
    run_layer,
)
from qwen_precision.probe import Job
from qwen_precision.progress import Progress
from qwen_precision.record import Sweep, Swept, in_words, rounded
from qwen_precision.settings import as_text
from qwen_precision.torch_dtypes import torch_dtype

AT_ONCE = 2048
"""Sequences that go through a layer together."""
_WORST = 20
"""Kept of a sweep."""
_CONFIRMED = 8
"""Of those, run in the dtype itself."""
_FIRST = 512
"""Sequences that go through all layers, to find the step-up."""
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


@dataclass
class Peaks:
    """The largest magnitude of every sequence: ``[sequences]`` each."""

    value: Tensor
    layer: Tensor
    channel: Tensor
    name: Tensor
    """Index into ``names``."""
    names: list[str]
    by_layer: Tensor
    """``[layers]``: the largest magnitude of all sequences up to each layer."""


class Walker:
    """Runs sequences through the first layers in fp32, and tells the largest magnitude of each.

    Args:
        job: whose checkpoint, device and memory mode are used.
    """

    def __init__(self, job: Job) -> None:
        self.model = build(job.checkpoint.config, job.settings.attention)
        self._store = WeightStore(job.checkpoint, self.model, job.device, job.resident, WeightCheck([]))
        self._path, self._layers = decoder_layers(self.model)
        self._device, self._scratch = job.device, Scratch()
        self._seen: list[tuple[str, Tensor]] = []
        move_buffers(self.model, job.device)
        for layer in self._layers:
            for path, part in layer.named_modules():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(self._hook(path))

    @property
    def depth(self) -> int:
        """All layers of the model."""
        return len(self._layers)

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        leaf = path.rpartition(".")[2]

        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._seen += [(f"input of {leaf}", args[0]), (f"{leaf} output", out)]

        return note

    def peaks(self, ids: Tensor, layers: int) -> Peaks:
        """Run these sequences.

        Args:
            ids: ``[sequences, tokens]``, all of one length.
            layers: how many to run.
        """
        dtype, best, names, tops = torch_dtype(REFERENCE), _nothing(len(ids), self._device), [], []
        with torch.inference_mode():
            hidden = self._embedded(ids.to(self._device)).to(dtype)
            calls = layer_calls(self.model, hidden, torch.ones_like(ids, device=self._device))
            for index in range(layers):
                sources = self._store.module(self._layers[index], f"{self._path}.{index}")
                self._scratch.place(self._layers[index], sources, dtype)
                hidden = run_layer(self._layers[index], hidden, calls[index])
                self._scratch.release()
                for name, tensor in [*self._seen, ("hidden states", hidden)]:
                    if tensor.shape[:2] == ids.shape:  # experts see rows picked from all sequences
                        names.append(name)
                        best = _larger(best, tensor, index, len(names) - 1)
                tops.append(best[0].max())
                self._seen.clear()
        value, layer, channel, which = (each.cpu() for each in best)
        return Peaks(value, layer, channel, which, names, torch.stack(tops).cpu())

    def _embedded(self, ids: Tensor) -> Tensor:
        embed: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        name = f"{path_of(self.model, embed)}.weight"
        used, places = torch.unique(ids, return_inverse=True)
        found = [
            rows[used[(used >= start) & (used < start + len(rows))] - start].clone()
            for start, rows in self._store.row_chunks(name, 16384)
        ]
        return torch.cat(found)[places]


_Best = tuple[Tensor, Tensor, Tensor, Tensor]


def _nothing(count: int, device: torch.device) -> _Best:
    zeros = torch.zeros(count, dtype=torch.long, device=device)
    return torch.zeros(count, device=device), zeros, zeros, zeros


def _larger(best: _Best, tensor: Tensor, layer: int, name: int) -> _Best:
    """The best so far, or this tensor's; what is not finite is larger than anything."""
    size, place = tensor.abs().nan_to_num(nan=float("inf")).flatten(1).max(dim=1)
    more = size > best[0]
    now = (size, torch.full_like(place, layer), place % tensor.shape[-1], torch.full_like(place, name))
    one, two, three, four = (torch.where(more, new, old) for new, old in zip(now, best, strict=True))
    return one, two, three, four


def first_tokens(
    job: Job,
    dtype: str,
    limit: int | None,
    texts: Sequence[str],
    state_file: Path | None,
    progress: Progress,
    announce: Callable[[str], None],
) -> Sweep:
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
        _chunk(walker, job, dtype, [rows[n] for n in numbers], state)
        state.done = numbers[-1] + 1
        state.seconds = before + time.perf_counter() - started
        if numbers[0] == 0 and len(rows) > AT_ONCE:
            left = state.seconds / len(numbers) * (len(rows) - state.done)
            announce(f"sweeping {len(rows):,} first tokens through {state.layers} layers: about {left:.0f} s more")
        if state_file is not None:
            write_atomically(state_file, json.dumps(in_words(_plain(state))))
    worst = _confirmed(job, dtype, state.worst, progress)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return Sweep(
        kind="first-token",
        dtype=dtype,
        tried=state.done,
        total=len(rows),
        layers=state.layers or 0,
        over=state.over,
        worst=worst,
        prompt=None,
        shortest_failing=None,
        longest_clean=None,
        seconds=round(state.seconds, 3),
    )


def _rows(job: Job, limit: int | None, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of everything that is tried, shortest first so that equal lengths go together."""
    if texts:
        context = getattr(job.checkpoint.config, "max_position_embeddings", None)
        cut = min(filter(None, (job.settings.max_tokens, context)), default=None)
        rows = [list(job.checkpoint.tokenizer(text)["input_ids"])[:cut] for text in texts]
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


def held_state(path: Path | None) -> _State | None:
    """The state of an unfinished sweep, if there is one.

    Raises:
        QprecError: the file is there and is not a sweep's state: it is not written over.
    """
    if path is None or not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        worst = [Swept.model_validate(each) for each in data["worst"]]
        return _State(
            data["key"], int(data["done"]), int(data["layers"]), int(data["over"]), worst, float(data["seconds"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QprecError(f"{path}: is not the state of a sweep, which would be kept there; remove it.") from error


def _taken_up(path: Path | None, key: str, announce: Callable[[str], None]) -> _State:
    """The state of an earlier sweep of the same, or a new one."""
    state = held_state(path)
    if state is None or state.key != key:
        return _State(key)  # of another checkpoint, or another sweep
    announce(f"taking up the sweep in {path}: {state.done:,} are done")
    return state


def _plain(state: _State) -> dict[str, Any]:
    return {**vars(state), "worst": [each.model_dump() for each in state.worst]}


def _chunk(walker: Walker, job: Job, dtype: str, rows: list[list[int]], state: _State) -> None:
    """One lot: run it by lengths, count what is beyond the dtype's range, keep the worst."""
    lots: dict[int, list[list[int]]] = {}
    for row in rows:
        lots.setdefault(len(row), []).append(row)
    for lot in lots.values():
        if state.layers is None:
            top = walker.peaks(torch.tensor(lot[:_FIRST]), walker.depth).by_layer
            state.layers = int((top >= _STEP * top[-1]).int().argmax()) + 1
        found = walker.peaks(torch.tensor(lot), state.layers)
        state.over += int((found.value > DTYPES[dtype].max).sum())
        for place in found.value.topk(min(_WORST, len(lot))).indices.tolist():
            state.worst.append(
                Swept(
                    ids=lot[place],
                    text=_text(job, lot[place]),
                    magnitude=rounded(float(found.value[place])),
                    layer=int(found.layer[place]),
                    name=found.names[int(found.name[place])],
                    channel=int(found.channel[place]),
                    fails=None,
                )
            )
    state.worst = sorted(state.worst, key=lambda each: -float(each.magnitude))[:_WORST]


def _text(job: Job, ids: list[int]) -> str:
    tokenizer = job.checkpoint.tokenizer
    return as_text(ids[0], tokenizer) if len(ids) == 1 else str(tokenizer.decode(ids))[:200]


def _confirmed(job: Job, dtype: str, worst: list[Swept], progress: Progress) -> list[Swept]:
    """The worst few, run in the dtype itself."""
    tried = worst[:_CONFIRMED]
    clean = outcomes(run_again(job, dtype, [each.ids for each in tried], progress)) if tried else {}
    checked = [each.model_copy(update={"fails": not clean[n] if n in clean else None}) for n, each in enumerate(tried)]
    return [*checked, *worst[_CONFIRMED:]]


# -- lengths ---------------------------------------------------------------------------------------------------
