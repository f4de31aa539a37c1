"""lm_head, the largest product of all: whole where it fits, in slices where it must not be held.

Resident, the vocabulary is taken at once, so the logits are bit-identical to the model's own. Streamed, it is
taken a slice of rows at a time (the order of summation inside a matrix product may then differ in the last
bit). In both, the tokens go in pieces when the logits of all of them would be too large to hold: nothing ever
holds ``[tokens, vocabulary]`` of a long prompt.
"""

import math
import time
from functools import partial

import torch
from torch import Tensor, nn

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import Encoded, Scratch, WeightStore, path_of
from qwen_precision.probe.logprobs import LogProbs
from qwen_precision.probe.task import FinalHook, Task
from qwen_precision.probe.watched import Section, WatchedRun
from qwen_precision.record import rounded
from qwen_precision.torch_dtypes import torch_dtype

LOGITS_BYTES = 1 << 30
"""Logits of more bytes than this are computed a piece of the tokens at a time."""


class Head:
    """Runs lm_head for every dtype and prompt, watched."""

    def __init__(self, model: nn.Module, store: WeightStore, scratch: Scratch, measure: WatchedRun) -> None:
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._store, self._scratch, self._measure = store, scratch, measure
        self._path = path_of(model, self._head)

    def run(
        self,
        hidden: dict[tuple[str, int], Tensor],
        prompts: list[Encoded],
        task: Task,
        seconds: dict[str, float],
        on_final: FinalHook | None,
    ) -> None:
        """Compute logits of all positions; keep the likeliest next token of each row.

        Args:
            hidden: by (dtype, prompt), ``[batch, tokens, hidden]`` after the final norm.
            prompts: what the streams are of.
        """
        name = f"{self._path}.weight"
        if not self._store.parts(name):
            # A bare model (an embedding model, say) has no lm_head: the final hidden states are its answer.
            for (dtype, prompt), states in hidden.items():
                if on_final is not None:
                    on_final(dtype, prompt, states, None)
            return
        best: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        last: dict[tuple[str, int], list[Tensor]] = {}
        step = task.vocabulary_rows or (1 << 62)
        self._logprobs = LogProbs(prompts)
        for start, rows in self._store.row_chunks(name, step):
            for dtype in task.dtypes:
                started = time.perf_counter()
                self._scratch.place(self._head, {"weight": rows}, torch_dtype(dtype))
                seconds["read and cast"] += time.perf_counter() - started
                started = time.perf_counter()
                for key, states in hidden.items():
                    if key[0] != dtype:
                        continue
                    logits = self._one(key, states, prompts[key[1]].mask.bool(), start)
                    best[key] = _better(best.get(key), logits[:, -1], start)
                    last.setdefault(key, []).append(logits[:, -1].float())
                    if on_final is not None and task.vocabulary_rows == 0:
                        on_final(dtype, key[1], states, logits)
                seconds[dtype] += time.perf_counter() - started
            self._scratch.release()
        ends = {key: torch.cat(parts, dim=-1) for key, parts in last.items()}
        if on_final is not None and task.vocabulary_rows:
            for (dtype, prompt), states in hidden.items():
                on_final(dtype, prompt, states, ends[dtype, prompt][:, None])
        self._write(best)
        self._diverge(ends)
        for key, errors in self._logprobs.errors().items():
            self._measure.collector.column(*key).logprob_error = errors

    def _one(self, key: tuple[str, int], states: Tensor, valid: Tensor, start: int) -> Tensor:
        """Logits of one stream for the placed rows, all positions looked at; gives the last piece."""
        weight = self._head._parameters["weight"]
        assert weight is not None
        per_token = states.shape[0] * weight.shape[0] * states.element_size()
        step = max(1, min(states.shape[1], LOGITS_BYTES // per_token))
        logits = states
        for begin in range(0, states.shape[1], step):
            piece = states[:, begin : begin + step]
            part = Section(
                key, valid[:, begin : begin + step], self._head, partial(self._head, piece), slice_at=(begin, start)
            )
            logits, readings = self._measure.run(part)
            self._measure.look(part, readings)
            if key[0] == REFERENCE and self._measure.beyond(readings):
                self._measure.foresee(part)
            self._logprobs.add(key, logits, begin, start)
        return logits

    def _write(self, best: dict[tuple[str, int], tuple[Tensor, Tensor]]) -> None:
        for (dtype, prompt), (values, ids) in best.items():
            finite = torch.isfinite(values).tolist()
            column = self._measure.collector.column(dtype, prompt)
            column.top1 = [token if fine else None for token, fine in zip(ids.tolist(), finite, strict=True)]

    def _diverge(self, last: dict[tuple[str, int], Tensor]) -> None:
        """Kullback-Leibler divergence of each row's next token from the reference's, in float64."""
        for (dtype, prompt), logits in last.items():
            reference = last.get((REFERENCE, prompt))
            if reference is None or dtype == REFERENCE:
                continue
            wanted, ours = torch.log_softmax(reference.double(), -1), torch.log_softmax(logits.double(), -1)
            rows = (wanted.exp() * (wanted - ours)).sum(dim=-1).tolist()
            # Rounding can make it a hair less than nothing.
            kl = [rounded(max(row, 0.0)) if math.isfinite(row) else None for row in rows]
            self._measure.collector.column(dtype, prompt).kl = kl


def _better(before: tuple[Tensor, Tensor] | None, last: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The larger of the best so far and the best of a slice, row by row; NaN wins and stays (as in argmax)."""
    values, ids = last.max(dim=-1)
    ids = ids + start
    # A row that holds -inf logits is as broken as one that holds NaN.
    values = torch.where(torch.isfinite(last).all(dim=-1), values, torch.full_like(values, torch.nan))
    if before is None:
        return values, ids
    take = (values > before[0]) | torch.isnan(values)
    keep_nan = torch.isnan(before[0])
    take = take & ~keep_nan
    return torch.where(take, values, before[0]), torch.where(take, ids, before[1])
