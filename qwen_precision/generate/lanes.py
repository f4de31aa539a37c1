"""Rows of a batch that are computed together in one dtype, with a KV cache of their own, and the models for it.

A generation starts as one lane of all rows. A row whose logits cannot be used leaves it for a new lane, which is
filled from the tokens alone: nothing of the poisoned cache goes along. The old lane keeps its shape, so that what
the other rows compute stays bit for bit what it was.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.machine import free_bytes
from qwen_precision.qwen3.rescaling import Rescaling
from qwen_precision.record.generation import Poison


class RescalerLike(Protocol):
    """What ``rescaler.Rescaler`` offers; it stands above this floor."""

    def rescaling(self, prefixes: Sequence[Sequence[int]], more: float = 1.0) -> Rescaling:
        """The powers with which these tokens are inside fp16, with so many times the margin."""

    def load(self, rescaling: Rescaling, device: torch.device) -> nn.Module:
        """The rescaled model."""


class NoRoom(QprecError):
    """The weights in this dtype do not fit into the memory that is free."""


class Models:
    """The checkpoint in the dtypes that are in use; weights always come from its files, never from another dtype.

    Args:
        checkpoint: a checked checkpoint.
        device: where they compute.
        attention: ``sdpa``, ``eager``, or None for what transformers would choose.
        tell: called with what is being done.
        rescaler: makes rescaled weights, where ``rescale`` may be called.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        attention: str | None,
        tell: Callable[[str], None] = lambda what: None,
        rescaler: RescalerLike | None = None,
    ) -> None:
        self._checkpoint, self._device, self._attention, self._tell = checkpoint, device, attention, tell
        self._loaded: dict[str, Any] = {}
        self._rescaler = rescaler
        self._rescalings: dict[str, Rescaling] = {}

    def get(self, weights: str) -> Any:
        """The model in a dtype (by its name), or with rescaled weights (by what ``rescale`` gave), for evaluation.

        Raises:
            NoRoom: it does not fit beside what is there.
            QprecError: a file is damaged, or a tensor is missing.
        """
        if weights not in self._loaded:
            self._make_room(weights)
            self._tell(f"loading the weights in {weights}")
            self._loaded[weights] = self._load(weights)
        return self._loaded[weights]

    def _make_room(self, dtype: str) -> None:
        need, free = self._checkpoint.parameters * DTYPES[dtype].bytes, free_bytes(self._device)
        if need > free:
            raise NoRoom(f"{dtype} needs {need / 2**30:.1f} GiB on {self._device}, {free / 2**30:.1f} GiB are free")

    def rescale(
        self, dtype: str, prefixes: Sequence[Sequence[int]], tried: Collection[str], more: float
    ) -> tuple[str, Rescaling]:
        """Rescaled weights with which these tokens stay inside the dtype; gives their name for ``get``.

        Args:
            dtype: the format they are in.
            prefixes: token ids, without padding.
            tried: names of weights with which they failed.
            more: times the margin that is usual.

        Raises:
            NoRoom: they do not fit beside what is there.
            QprecError: no rescaling helps.
        """
        assert self._rescaler is not None, "the settings that ask for this give one"
        rescaling = self._rescaler.rescaling(prefixes, more)
        name = next((name for name, held in self._rescalings.items() if held == rescaling), None)
        if name in tried or rescaling.changes_nothing:
            raise QprecError(f"{dtype} fails although every operation of these tokens is in range when measured")
        if name is None:
            name = f"{dtype} rescaled" + (f" {len(self._rescalings) + 1}" if self._rescalings else "")
            self._rescalings[name] = rescaling
        if name not in self._loaded:
            self._make_room(dtype)
            self._loaded[name] = self._rescaler.load(rescaling, self._device)
        return name, rescaling

    def release(self, weights: str) -> None:
        """Give the memory back, whoever else still holds the module: its weights go to the meta device."""
        model = self._loaded.pop(weights, None)
        if model is not None:
            model.to("meta")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _load(self, dtype: str) -> nn.Module:
        folder = self._checkpoint.folder
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, DTYPES[dtype].torch_name), use_safetensors=True, local_files_only=True,
                trust_remote_code=False, output_loading_info=True,
                **({"attn_implementation": self._attention} if self._attention else {}),
            )  # fmt: skip
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and safetensors raise whatever a broken file leads to
            raise QprecError(f"{folder}: transformers cannot load the weights: {in_one_line(error)}") from error
        model, told = loaded
        missing = sorted(told["missing_keys"])
        if missing:
            raise QprecError(
                f"{folder}: the tensor {missing[0]} is in none of its files; "
                "the checkpoint is incomplete or its config.json is another model's."
            )
        placed: nn.Module = model.to(self._device).eval()
        return placed


class Lane:
    """Some rows in one dtype.

    Args:
        model: in that dtype.
        dtype: its name.
        rows: which rows of the batch; the order is that of the lane's own batch.
        ids: ``[batch, tokens]`` of the whole batch.
        mask: ``[batch, tokens]`` 1 at tokens, 0 at padding, of the whole batch.
        chunk: prompt tokens that go through the model at once; 0 for all.
        weights: name of the weights, where they are not the checkpoint's own in that dtype.
    """

    def __init__(
        self, model: Any, dtype: str, rows: Sequence[int], ids: Tensor, mask: Tensor, chunk: int,
        weights: str | None = None,
    ) -> None:  # fmt: skip
        self.dtype, self.rows = dtype, list(rows)
        self.weights = weights or dtype
        self._model, self._chunk = model, chunk
        self._index = torch.tensor(self.rows, device=ids.device)
        mask = mask[self._index]
        # Padding that all rows of the lane have is left out: alone, a row needs none.
        self._first = int(mask.argmax(dim=-1).min())
        self._mask = mask[:, self._first :]
        self._seen = self._first
        self._padded = not bool((self._mask == 1).all())
        self.cache: Any = DynamicCache(config=model.config)
        self.chunks = 0
        self._told: set[int] = set()
        takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._keep = {"logits_to_keep": 1} if takes_last else {}

    def forward(self, ids: Tensor) -> Tensor:
        """``[rows, vocabulary]`` logits after the last token of ``ids`` (``[batch, tokens]``), in the model's dtype."""
        new = ids[self._index, self._seen :]
        grown = new.shape[1] - (self._mask.shape[1] - (self._seen - self._first))
        if grown > 0:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), grown))], dim=-1)
        self._seen = ids.shape[1]
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        size = self._chunk or new.shape[1]
        done = self._mask.shape[1] - new.shape[1]
        for start in range(0, new.shape[1], size):
            stop = min(start + size, new.shape[1])
            out = self._model(
                input_ids=new[:, start:stop].contiguous(),
                attention_mask=self._mask[:, : done + stop] if self._padded else None,  # as transformers does
                position_ids=positions[:, start:stop].contiguous(), past_key_values=self.cache, use_cache=True,
                return_dict=True, **self._keep,
            )  # fmt: skip
            self.chunks += 1
        last: Tensor = out.logits[:, -1]
        return last

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
