"""Log-probability of every token given those before it, from logits that come in pieces and slices."""

import math

import torch
from torch import Tensor

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import Encoded
from qwen_precision.record import rounded
from qwen_precision.torch_dtypes import widened

_AT_ONCE = 1 << 18
"""Logits upcast to fp32 at a time, whole rows of the vocabulary: those of a long prompt are never held twice, and what
fits into the cache is read from there. A card has no such cache, and waits for each call."""
_ON_A_CARD = 1 << 24


class LogProbs:
    """Adds up what the pieces of a stream's logits say of its own prompt's tokens.

    Args:
        prompts: what the streams are of.
    """

    def __init__(self, prompts: list[Encoded]) -> None:
        self._prompts = prompts
        self._total: dict[tuple[str, int], Tensor] = {}
        self._chosen: dict[tuple[str, int], Tensor] = {}

    def add(self, key: tuple[str, int], logits: Tensor, begin: int, start: int) -> None:
        """Take a piece.

        Args:
            key: dtype and prompt.
            logits: ``[batch, positions, rows of the vocabulary]``.
            begin: first position of the piece.
            start: first row of the vocabulary.
        """
        ids = self._prompts[key[1]].ids
        if key not in self._total:
            self._total[key] = torch.full(ids.shape, -math.inf, device=ids.device)
            self._chosen[key] = torch.full(ids.shape, math.nan, device=ids.device)
        place = slice(begin, begin + logits.shape[1])
        self._total[key][:, place] = torch.logaddexp(self._total[key][:, place], _summed(logits))
        following = ids[:, place.start + 1 : place.stop + 1] - start
        width = following.shape[1]
        here = (following >= 0) & (following < logits.shape[2])
        found = logits[:, :width].gather(-1, following.clamp(0, logits.shape[2] - 1)[..., None])[..., 0].float()
        held = self._chosen[key][:, place.start : place.start + width]
        held.copy_(torch.where(here, found, held))

    def of(self, key: tuple[str, int]) -> Tensor:
        """``[batch, tokens]`` float32: at each token the log-probability of the next one, in nats; NaN at the last."""
        return self._chosen[key] - self._total[key]

    def errors(self) -> dict[tuple[str, int], list[float | None]]:
        """By stream and row: root mean square difference from the reference, in nats; None where not finite."""
        found = {}
        for dtype, prompt in self._total:
            if dtype == REFERENCE or (REFERENCE, prompt) not in self._total:
                continue
            ours, wanted = (self.of(key) for key in ((dtype, prompt), (REFERENCE, prompt)))
            mask = self._prompts[prompt].mask.bool()
            both = mask[:, :-1] & mask[:, 1:]
            square = torch.where(both, widened((ours - wanted)[:, :-1]).square(), 0.0)
            rows = (square.sum(dim=1) / both.sum(dim=1)).sqrt().tolist()  # NaN of a row with one token
            found[dtype, prompt] = [rounded(value) if math.isfinite(value) else None for value in rows]
        return found


def _summed(logits: Tensor) -> Tensor:
    """``logsumexp`` in fp32 over the last dimension, a few rows at a time in memory that is used again."""
    rows = logits.flatten(0, 1)
    step = max(1, (_AT_ONCE if rows.device.type == "cpu" else _ON_A_CARD) // max(1, rows.shape[1]))
    held = torch.empty((min(step, len(rows)), rows.shape[1]), device=rows.device)
    found = []
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        wide = held[: len(piece)].copy_(piece)
        top = wide.amax(dim=-1, keepdim=True)
        top = torch.where(torch.isinf(top), 0.0, top)  # infinity less infinity is no number
        found.append(wide.sub_(top).exp_().sum(dim=-1).log_().add_(top[:, 0]))
    return torch.cat(found).view(logits.shape[:2])
