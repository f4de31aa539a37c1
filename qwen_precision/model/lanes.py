"""Rows of a batch that are computed together in one dtype, with a KV cache of their own.

A generation starts as one lane of all rows. A row whose logits cannot be used leaves it for a new lane, which is
filled from the tokens alone: nothing of the poisoned cache goes along. The old lane keeps its shape, so that what
the other rows compute stays bit for bit what it was.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.machine import out_of_memory
from qwen_precision.record import Poison


def only_the_last(model: Any) -> dict[str, int]:
    """The argument with which a model's forward gives the logits of the last position alone, where it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def cache_argument(model: Any) -> str | None:
    """What a model's forward calls its key-value cache: transformers renames it from 5.24 on; None without one."""
    takes = inspect.signature(model.forward).parameters
    named = (name for name in ("cache", "past_key_values") if name in takes)
    return next((name for name in named if "dict" not in str(takes[name].annotation)), None)  # XLM's is one of tensors


def takes_positions(model: Any) -> bool:
    """Whether a model's forward is given positions: as in transformers' own ``generate``, not where it would only hand
    them on."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _starts_anew(model: Any) -> bool:
    """Whether a call of several tokens forgets what was before: Mamba's first scan takes no state to start from."""
    return any(hasattr(module, "x_proj") and hasattr(module, "dt_proj") for module in model.modules())


def positions_of(mask: Tensor) -> Tensor:
    """``[batch, tokens]`` position ids, counted from each row's first real token."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def decoding(model: Any) -> AbstractContextManager[Any]:
    """What stands around every step but the first: on a GPU transformers decodes the experts of a MoE layer in another
    way than it prefills them."""
    optimised = getattr(model, "_optimize_model_for_decode", None)
    return optimised() if optimised is not None else nullcontext()


def not_decoded(model: Any, error: BaseException | None = None) -> QprecError:
    """What is said of a model that no ``Lane`` can run: without a cache, or with one of a kind of its own.

    Args:
        model: of transformers.
        error: what its forward raised; None where it takes no cache at all.
    """
    why = f" ({in_one_line(error)})" if error is not None else ""
    return QprecError(
        f"{type(model).__name__}: takes no key-value cache as `qprec generate` decodes with{why}; "
        "`qprec probe` finds where it overflows"
    )


class Lane:
    """Some rows in one dtype.

    Args:
        model: in that dtype.
        dtype: its name.
        rows: which rows of the batch; the order is that of the lane's own batch.
        ids: ``[batch, tokens]`` of the whole batch.
        mask: ``[batch, tokens]`` 1 at tokens, 0 at padding, of the whole batch.
        chunk: prompt tokens that go through the model at once; 0 for all, as where a chunk would forget the one before.
        weights: name of the weights, where they are not the checkpoint's own in that dtype.
    """

    def __init__(
        self,
        model: Any,
        dtype: str,
        rows: Sequence[int],
        ids: Tensor,
        mask: Tensor,
        chunk: int,
        weights: str | None = None,
    ) -> None:
        self.dtype, self.rows = dtype, list(rows)
        self.weights = weights or dtype
        self._model, self._chunk = model, 0 if _starts_anew(model) else chunk
        self._index = torch.tensor(self.rows, device=ids.device)
        mask = mask[self._index]
        # Padding that all rows of the lane have is left out: alone, a row needs none.
        self._first = int(mask.argmax(dim=-1).min())
        self._mask = mask[:, self._first :]
        self._seen = self._first
        self._padded = not bool((self._mask == 1).all())
        self.cache: Any = DynamicCache(config=model.config)
        self.chunks = 0
        self.held = 0
        """Bytes of the largest tensor of logits that the model gave: of the last position, or of a whole chunk where it
        cannot be asked for that alone."""
        self._told: set[int] = set()
        self._keep = only_the_last(model)
        self._placed = takes_positions(model)
        self._cached = {cache_argument(model) or "past_key_values": self.cache}
        layers = getattr(self.cache, "layers", [])
        self._attends = not layers or any(hasattr(layer, "keys") for layer in layers)

    def forward(self, ids: Tensor) -> Tensor:
        """``[rows, vocabulary]`` logits after the last token of ``ids`` (``[batch, tokens]``), in the model's dtype.

        Raises:
            QprecError: the model cannot be run so, a few tokens at a time.
        """
        new = ids[self._index, self._seen :]
        grown = new.shape[1] - (self._mask.shape[1] - (self._seen - self._first))
        if grown > 0:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), grown))], dim=-1)
        self._seen = ids.shape[1]
        positions = positions_of(self._mask)[:, -new.shape[1] :]
        size = self._chunk or new.shape[1]
        done = self._mask.shape[1] - new.shape[1]
        for start in range(0, new.shape[1], size):
            stop = min(start + size, new.shape[1])
            seen = 0 if self._attends else done + start  # a state has taken in what was before
            mask = self._mask[:, seen : done + stop] if self._padded else None  # as transformers does
            last = self._step(new[:, start:stop].contiguous(), mask, positions[:, start:stop].contiguous())
            self.chunks += 1
        return last

    def _step(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """The logits after the last of these ids; the cache holds what was before them."""
        given = {"input_ids": ids, "attention_mask": mask, **self._cached}
        if self._placed:
            given["position_ids"] = positions
        try:
            logits: Tensor = self._model(**given, use_cache=True, return_dict=True, **self._keep).logits
            self.held = max(self.held, logits.numel() * logits.element_size())
        except Exception as error:  # whatever a family does that counts or keeps its cache another way
            if out_of_memory(error):
                raise
            raise not_decoded(self._model, error) from error
        return logits[:, -1]

    def poisoned(self, row: int) -> Poison | None:
        """Where the row's cache is first not finite; None if it is finite, or that was told before: it stays bad."""
        if row in self._told:
            return None
        place = self._poison(self.rows.index(row))
        if place is not None:
            self._told.add(row)
        return place

    def _poison(self, own: int) -> Poison | None:
        real = self._mask[own].bool()
        for number, layer in enumerate(getattr(self.cache, "layers", [])):
            for part in ("keys", "values"):
                held = getattr(layer, part, None)
                if not isinstance(held, Tensor) or held.dim() != 4:
                    continue
                bad = ~torch.isfinite(held[own]).all(dim=-1).all(dim=0)
                if bool(bad.any()):
                    gone = max(0, len(real) - len(bad))  # a sliding window has dropped the oldest
                    position = int(bad.int().argmax()) + gone + self._first
                    padding = not bool((bad[: len(real) - gone] & real[gone:]).any())
                    return Poison.model_validate(
                        {"layer": number, "part": part, "position": position, "in_padding": padding}
                    )
        return None
