"""The whole model as transformers loads it, one dtype after another, watched: for what is not run layer by layer.

Nothing of the architecture is known or replaced, so this is what the user runs, whatever the family. It takes the
memory of all weights in a dtype, and a row that has gone bad stays so: what would overflow behind it is told from the
reference alone.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError
from qwen_precision.model import Encoded, Models, NoRoom, layers_of, positions_of
from qwen_precision.probe.answers import Answers
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.foretold import foretell
from qwen_precision.probe.hidden import as_error, distance, massive, massive_numbers
from qwen_precision.probe.task import FinalHook, Task
from qwen_precision.probe.watched import Section, WatchedRun
from qwen_precision.progress import Announce, Progress, silent, untold
from qwen_precision.watcher import Reading, Watcher, attached

_HELD = 1 << 30
"""Bytes of the reference's hidden states that are kept for comparison; of longer prompts none are."""


class Whole:
    """One run over all prompts and dtypes.

    Args:
        models: loads the checkpoint.
        prompts, task, collector, progress, on_final, announce: as for ``Shadow``; the vocabulary is always taken whole.
    """

    def __init__(
        self,
        models: Models,
        prompts: list[Encoded],
        task: Task,
        collector: Collector,
        progress: Progress = silent,
        on_final: FinalHook | None = None,
        announce: Announce = untold,
    ) -> None:
        self._models, self._prompts, self._task, self._collector = models, prompts, task, collector
        self._progress, self._on_final, self._announce = progress, on_final, announce
        self._watcher = Watcher()
        self._measure = WatchedRun(self._watcher, collector, task, strict=True)
        self._answers = Answers(prompts, collector)
        self._ran: dict[tuple[str, int], list[Reading]] = {}
        self._hidden: dict[tuple[int, int], Tensor] = {}
        self.seconds: dict[str, float] = {"read and cast": 0.0, **dict.fromkeys(task.dtypes, 0.0)}

    def run(self) -> None:
        """Run everything: all dtypes once, then closely where something was not finite or near a limit."""
        steps = len(self._task.dtypes) * len(self._prompts)
        try:
            for place, name in enumerate(self._task.dtypes):
                model = self._loaded(name)
                with self._running(name, model):
                    if not place:
                        self._foretell(model, name)
                    for prompt in range(len(self._prompts)):
                        self._progress(place * len(self._prompts) + prompt, steps, f"{name}, the whole model")
                        self._once(model, name, prompt)
            self._answers.close()
            self._look_closely()
            self._progress(steps, steps, "done")
        finally:
            self._hidden.clear()
            for name in self._task.dtypes:
                self._models.release(name)

    @property
    def without_head(self) -> bool:
        """Whether the files hold no lm_head: the answer is then what comes before it."""
        return self._models.without_head

    # -- the parts ----------------------------------------------------------------------------------------

    def _foretell(self, model: nn.Module, name: str) -> None:
        def once(prompt: int) -> None:
            self._measure.rehearse(self._section(model, name, prompt))

        foretell(self._prompts, self._task.dtypes, 1, once, self._announce)

    def _loaded(self, name: str) -> nn.Module:
        """The model in a dtype; the others are let go where it does not fit beside them."""
        started = time.perf_counter()
        try:
            model: nn.Module = self._models.get(name)
        except NoRoom:
            for other in self._task.dtypes:
                self._models.release(other)
            try:
                model = self._models.get(name)
            except NoRoom as error:
                raise QprecError(
                    f"{error}; this family runs only as a whole: take a machine with more memory, or leave this dtype "
                    "out (--dtype, --no-reference)."
                ) from error
        self.seconds["read and cast"] += time.perf_counter() - started
        return model

    @contextmanager
    def _running(self, name: str, model: nn.Module) -> Iterator[None]:
        started = time.perf_counter()
        with torch.inference_mode(), attached(model, self._watcher):
            yield
        self.seconds[name] += time.perf_counter() - started

    def _once(self, model: nn.Module, name: str, prompt: int) -> None:
        """The first run of a prompt in a dtype: every operation, every layer and the answer are measured."""
        with self._layers_seen(model, name, prompt):
            answer, self._ran[name, prompt] = self._measure.run(self._section(model, name, prompt))
        shape = self._prompts[prompt].ids.shape
        headed = has_head(model) and not self.without_head
        logits = answer if answer.dim() == 3 and answer.shape[:2] == shape and headed else None
        if logits is not None:
            self._answers.add((name, prompt), logits)
        if self._on_final is not None:
            self._on_final(name, prompt, answer, logits)

    def _section(self, model: nn.Module, name: str, prompt: int) -> Section:
        valid = self._prompts[prompt].mask.bool()
        runs = partial(forward, self._models.called(name), self._prompts[prompt])
        return Section((name, prompt), valid, model, runs)

    @contextmanager
    def _layers_seen(self, model: nn.Module, name: str, prompt: int) -> Iterator[None]:
        """Hooks that measure the hidden states after every layer, unwatched."""
        _, layers = layers_of(model)
        width = int(getattr(model.config.get_text_config(), "hidden_size", 0))  # type: ignore[operator,union-attr]
        if not layers or len(layers) * self._prompts[prompt].ids.numel() * width * 4 > _HELD:
            yield
            return
        handles = [
            layer.register_forward_hook(partial(self._after_layer, name, prompt, index))
            for index, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_layer(self, name: str, prompt: int, index: int, layer: nn.Module, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            return
        with _disable_current_modes():
            valid, column = self._prompts[prompt].mask.bool(), self._collector.column(name, prompt)
            if hidden.shape[:2] != valid.shape:
                return
            if name == REFERENCE:
                self._hidden[prompt, index] = hidden
                column.massive += massive(massive_numbers(hidden, valid).tolist(), hidden.shape[1], index)
            elif (prompt, index) in self._hidden:
                own = valid & torch.isfinite(hidden).flatten(1).all(dim=1)[:, None]
                column.layer_error.append(as_error(float(distance(hidden, self._hidden[prompt, index], own))))

    def _look_closely(self) -> None:
        """Run again what was not finite or near a limit: the reference first, which tells more."""
        for name in self._task.dtypes:
            asked = [prompt for prompt in range(len(self._prompts)) if self._is_asked(name, prompt)]
            if not asked:
                continue
            model = self._loaded(name)
            with self._running(name, model):
                for prompt in asked:
                    self._progress(0, 0, f"{name}, closely")
                    wide = self._measure.wide(self._ran, prompt)
                    self._measure.look(self._section(model, name, prompt), self._ran[name, prompt], wide)

    def _is_asked(self, name: str, prompt: int) -> bool:
        return self._measure.is_asked(name, self._ran[name, prompt], self._measure.wide(self._ran, prompt))


def has_head(model: nn.Module) -> bool:
    """Whether a model's answer is logits over its vocabulary."""
    get: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


def _counts_tokens(model: nn.Module) -> bool:
    """Whether it leaves padding out of its positions by itself, as RoBERTa does, from padding's own on."""
    return any(
        path.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
        for path, part in model.named_modules()
    )


def forward(model: nn.Module, prompt: Encoded) -> Tensor:
    """What a model of transformers answers: its logits, else its last hidden states.

    A plain forward counts padding in the position of a token; ``generate`` does not, so positions are given there.
    What reads with an encoder and writes with a decoder is given the prompt for both, as BART's own forward does.
    """
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"attention_mask": prompt.mask, "use_cache": False, "return_dict": True}
    if not bool(prompt.mask.all()) and not _counts_tokens(model):
        given["position_ids"] = positions_of(prompt.mask)
    start = getattr(model.config, "decoder_start_token_id", None)
    if getattr(model.config, "is_encoder_decoder", False) and start is not None:
        given["decoder_input_ids"] = torch.cat((torch.full_like(prompt.ids[:, :1], start), prompt.ids[:, :-1]), dim=1)
    out = model(input_ids=prompt.ids, **{key: value for key, value in given.items() if key in takes})
    answer = getattr(out, "logits", None)
    found: Tensor = answer if answer is not None else out[0]
    return found
