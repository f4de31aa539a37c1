"""lm_head, the largest product of all: whole where it fits, in slices where it must not be held.

Resident, the vocabulary is taken at once, so the logits are bit-identical to the model's own. Streamed, it is
taken a slice of rows at a time (the order of summation inside a matrix product may then differ in the last
bit). In both, the tokens go in pieces when the logits of all of them would be too large to hold: nothing ever
holds ``[tokens, vocabulary]`` of a long prompt.
"""

import time
from functools import partial

from torch import Tensor, nn

from qwen_precision.model import Encoded, Scratch, WeightStore, path_of
from qwen_precision.probe.answers import Answers
from qwen_precision.probe.task import FinalHook, Task
from qwen_precision.probe.watched import Section, WatchedRun
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
        step = task.vocabulary_rows or (1 << 62)
        answers = Answers(prompts, self._measure.collector)
        for start, rows in self._store.row_chunks(name, step):
            for dtype in task.dtypes:
                started = time.perf_counter()
                self._scratch.place(self._head, {"weight": rows}, torch_dtype(dtype))
                seconds["read and cast"] += time.perf_counter() - started
                started = time.perf_counter()
                for key, states in hidden.items():
                    if key[0] != dtype:
                        continue
                    logits = self._one(key, states, prompts[key[1]].mask.bool(), start, answers)
                    if on_final is not None and task.vocabulary_rows == 0:
                        on_final(dtype, key[1], states, logits)
                seconds[dtype] += time.perf_counter() - started
            self._scratch.release()
        ends = answers.close()
        if on_final is not None and task.vocabulary_rows:
            for (dtype, prompt), states in hidden.items():
                on_final(dtype, prompt, states, ends[dtype, prompt][:, None])

    def _one(self, key: tuple[str, int], states: Tensor, valid: Tensor, start: int, answers: Answers) -> Tensor:
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
            answers.add(key, logits, begin, start)
        return logits
