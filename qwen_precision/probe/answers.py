"""What the logits of every stream say: the likeliest next tokens, how far their distribution is from fp32's, and what a
softmax in float32 is worth."""

import math

import torch
from torch import Tensor

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import Encoded
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.logprobs import LogProbs
from qwen_precision.probe.upcasts import Costs, Upcasts
from qwen_precision.record import rounded
from qwen_precision.torch_dtypes import widened


class Answers:
    """Takes logits, in pieces of the tokens and slices of the vocabulary; puts what they say into the collector.

    Args:
        prompts: what the streams are of.
        collector: takes it.
    """

    def __init__(self, prompts: list[Encoded], collector: Collector) -> None:
        self._prompts, self._collector = prompts, collector
        self._logprobs, self._upcasts, self._costs = LogProbs(prompts), Upcasts(prompts), Costs(prompts)
        self._best: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._last: dict[tuple[str, int], list[Tensor]] = {}

    def add(self, key: tuple[str, int], logits: Tensor, begin: int = 0, start: int = 0) -> None:
        """Take a piece.

        Args:
            key: dtype and prompt.
            logits: ``[batch, positions, rows of the vocabulary]``.
            begin: first position of the piece.
            start: first row of the vocabulary.
        """
        self._logprobs.add(key, logits, begin, start)
        self._upcasts.add(key, logits, begin, start)
        self._costs.saw(key, logits, begin)
        if begin + logits.shape[1] == self._prompts[key[1]].ids.shape[1]:
            self._best[key] = _better(self._best.get(key), logits[:, -1], start)
            self._last.setdefault(key, []).append(self._costs.upcast(key, logits[:, -1]))

    def close(self) -> dict[tuple[str, int], Tensor]:
        """Write everything down; gives ``[batch, vocabulary]`` logits of the last position, by stream."""
        ends = {key: torch.cat(parts, dim=-1) for key, parts in self._last.items()}
        for key, (values, ids) in self._best.items():
            finite = torch.isfinite(values).tolist()
            self._collector.column(*key).top1 = [
                token if fine else None for token, fine in zip(ids.tolist(), finite, strict=True)
            ]
        self._diverge(ends)
        for key, errors in self._logprobs.errors().items():
            self._collector.column(*key).logprob_error = errors
        for key, rows in self._upcasts.close(self._logprobs).items():
            self._collector.column(*key).upcast = rows
        if ends:
            self._collector.logits = self._costs.close(next(iter(ends.values())).shape[-1])
        return ends

    def _diverge(self, last: dict[tuple[str, int], Tensor]) -> None:
        """Kullback-Leibler divergence of each row's next token from the reference's, in the widest format."""
        for (dtype, prompt), logits in last.items():
            reference = last.get((REFERENCE, prompt))
            if reference is None or dtype == REFERENCE:
                continue
            wanted, ours = (torch.log_softmax(widened(each), -1) for each in (reference, logits))
            rows = (wanted.exp() * (wanted - ours)).sum(dim=-1).tolist()
            # Rounding can make it a hair less than nothing.
            kl = [rounded(max(row, 0.0)) if math.isfinite(row) else None for row in rows]
            self._collector.column(dtype, prompt).kl = kl


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
