"""A failing step of a generation made again, as it was and changed in one way: transformers' own model and cache.

Its rows are given the ids that the record holds, whatever the model would say now, so that each ends in the logits of
that very step. The model is resident: a generation was, and a cache is filled token by token.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.judge import Candidate
from qwen_precision.model import (
    Encoded,
    Lane,
    Models,
    decoding,
    encode,
    only_the_last,
    out_of_memory,
    positions_of,
    takes_positions,
)
from qwen_precision.probe import Job
from qwen_precision.progress import Progress
from qwen_precision.qwen3 import layer_of
from qwen_precision.record import Control, Explanation, FailedStep, Prompt, Site
from qwen_precision.watcher import Onlooker, Seen, Watcher, attached, computing


def run_replays(job: Job, wanted: Sequence[Candidate], made: Explanation, progress: Progress) -> None:
    """Make them; each is noted as it is done, and what could not be made with the reason.

    Args:
        job: whose checkpoint, device and attention are used.
        wanted: kinds of ``REPLAYS``, of prompts that a failing step was given.
        made: takes what came of them.
        progress: as for ``probe``.
    """
    models = Models(job.checkpoint, job.device, job.settings.attention)
    for dtype, group in groupby(sorted(wanted, key=lambda each: each.dtype), lambda each: each.dtype):
        members = list(group)
        for number, each in enumerate(members):
            progress(number, len(members), f"controls: {each.what} in {dtype}")
            try:
                made.controls.append(_control(job, models, each))
            except QprecError as error:
                made.left_out.append(f"{dtype}: {each.what}: {error}")
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                made.left_out.append(f"{dtype}: {each.what}: out of memory on {job.device}")
        models.release(dtype)


def _control(job: Job, models: Models, each: Candidate) -> Control:
    if not job.resident:
        raise QprecError("needs all weights in memory (--memory resident)")
    model = models.get(each.dtype)
    prompt = next(prompt for prompt in job.prompts if prompt.name == each.prompt)
    assert prompt.failed is not None
    given, onlooker = encode(prompt, job.checkpoint, job.device), None
    with torch.inference_mode(), computing(job.settings.arithmetic):
        if each.what == "without cache":
            logits = _at_once(model, given)[each.row]
        else:
            onlooker = _Beginning(each.row, len(prompt.rows)) if each.what == "as generated" else None
            logits = _step(model, prompt, prompt.failed, given, each, onlooker)
    clean = bool(torch.isfinite(logits).all())
    return Control(
        what=each.what,
        dtype=each.dtype,
        prompt=each.prompt,
        row=each.row,
        tokens=len(each.ids),
        position=None,
        clean=clean,
        detail=each.detail,
        began=onlooker.found if onlooker is not None and not clean else None,
    )


def _at_once(model: Any, given: Encoded) -> Tensor:
    """``[rows, vocabulary]`` logits of the whole batch in one forward that keeps nothing."""
    out = model(
        input_ids=given.ids,
        attention_mask=None if bool((given.mask == 1).all()) else given.mask,
        use_cache=False,
        return_dict=True,
        **({"position_ids": positions_of(given.mask)} if takes_positions(model) else {}),
        **only_the_last(model),
    )
    last: Tensor = out.logits[:, -1]
    return last


def _step(
    model: Any, prompt: Prompt, failed: FailedStep, given: Encoded, each: Candidate, onlooker: "_Beginning | None"
) -> Tensor:
    """``[vocabulary]`` logits of a row at the step, as generation comes to them; the last forward is looked at."""
    rows = [each.row] if each.what == "generated alone" else list(range(len(prompt.rows)))
    chunk = 0 if each.what == "prefilled whole" else failed.chunk
    end = given.ids.shape[1]
    start = end - failed.step
    lane = Lane(model, each.dtype, rows, given.ids, given.mask[:, :start], chunk)
    logits = _looked_at(model, lane, given.ids[:, :start], onlooker if start == end else None)
    with decoding(model):
        for stop in range(start + 1, end + 1):
            logits = _looked_at(model, lane, given.ids[:, :stop], onlooker if stop == end else None)
    return logits[rows.index(each.row)]


def _looked_at(model: Any, lane: Lane, ids: Tensor, onlooker: "_Beginning | None") -> Tensor:
    if onlooker is None:
        return lane.forward(ids)
    watcher = Watcher()
    watcher.inspect = onlooker
    chunks = model.register_forward_pre_hook(lambda module, args: watcher.forget())  # calls are counted in each anew
    try:
        with attached(model, watcher), watcher:
            return lane.forward(ids)
    finally:
        chunks.remove()
        watcher.take()


class _Beginning(Onlooker):
    """Sees which operation of a forward is the first to give something not finite in one row of its batch.

    Args:
        row: its number.
        rows: of the batch.
    """

    def __init__(self, row: int, rows: int) -> None:
        self._row, self._rows = row, rows
        self.found: Site | None = None
        self._mixtures: set[str] = set()
        """Paths of the modules whose experts were seen."""

    def __call__(self, seen: Seen) -> None:
        """Look at one operation."""
        if self.found is None and self._mine(seen):
            self.found = Site(layer=layer_of(seen.path), module=seen.path, op=seen.op, call=seen.call)

    def _mine(self, seen: Seen) -> bool:
        above, among_experts, _ = seen.path.partition(".experts")
        if among_experts:
            self._mixtures.add(above)
        # Picked by expert, rows cannot be told apart; what adds them up can. Where experts run in a loop, the product
        # with their routing weights stands outside of them.
        if self._rows > 1 and (among_experts or (seen.path in self._mixtures and seen.op == "mul")):
            return False
        bad = ~torch.isfinite(seen.out) if seen.keep is None else ~torch.isfinite(seen.out) & seen.keep
        shared = self._rows == 1 or not bad.dim() or bad.shape[0] % self._rows
        return bool((bad if shared else bad.reshape(self._rows, -1)[self._row]).any())
