"""From raw logits to one token a row, with transformers' own processors, as ``generate`` of transformers does it.

What a healthy step costs beside that: one softmax, a top-10 and an entropy of ``[batch, vocabulary]``, what rounding
makes of it in the step's dtype, and one copy to the host that carries everything about the step (tokens, numbers, which
rows are done). No bad row ever
reaches ``multinomial``: on CUDA that would end the process, not only the draw. The random numbers of a row do not
depend on what is in the other rows, so a step can be drawn again with one row mended and the rest comes out the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.probe import largest, rounded_chances
from qwen_precision.torch_dtypes import torch_dtype


@dataclass(frozen=True)
class Drawn:
    """One row of a step, on the host."""

    token: int
    top1: float
    """Probability of the likeliest token before any filter; NaN where the row is not usable."""
    margin: float
    """Logit of the likeliest minus that of the second."""
    entropy: float
    """Nats."""
    left: float
    """Largest score after the processors: -inf where they left no token."""
    done: bool
    """Whether a stopping criterion is met with this token."""
    logprob: float = math.nan
    """Of the token, in nats, before any filter; this and what follows is NaN where nothing was watched."""
    rounded: tuple[float, float, float, float] = (math.nan,) * 4
    """What the dtype of the step makes of the softmax: error of that (nats), mass lost, changes of rank among the ten
    likeliest, whether the likeliest is another; NaN in float32."""

    @property
    def usable(self) -> bool:
        """Whether the raw row was finite (or -inf beside finite numbers)."""
        return math.isfinite(self.top1)

    @property
    def drawable(self) -> bool:
        """Whether a token could be chosen from what the processors left."""
        return math.isfinite(self.left)


class Chooser:
    """Draws tokens.

    Args:
        processors: transformers' prepared logits processors, warpers included.
        criteria: transformers' prepared stopping criteria.
        sample: draw from the distribution, or take the likeliest.
        pad: what a row that is over is continued with.
        watch: whether the numbers of the raw rows are wanted.
    """

    def __init__(self, processors: Any, criteria: Any, sample: bool, pad: int, watch: bool) -> None:
        self._processors, self._criteria = processors, criteria
        self._sample, self._pad, self._watch = sample, pad, watch

    def __call__(
        self,
        ids: Tensor,
        raw: Tensor,
        going: Tensor,
        dtypes: Sequence[str],
        forced: dict[int, int] | None = None,
    ) -> tuple[Tensor, list[Drawn]]:
        """One step.

        Args:
            ids: ``[batch, tokens]`` so far, padding included.
            raw: ``[batch, vocabulary]`` raw logits; not changed.
            going: ``[batch]`` bool, rows that are not over.
            dtypes: in which each row was computed; its raw logits are numbers of that.
            forced: tokens for rows that are not to be drawn.

        Returns:
            ``[batch, tokens + 1]`` ids, and the rows of the step.
        """
        logs = torch.log_softmax(raw, dim=-1, dtype=torch.float32) if self._watch else None
        numbers, rounding = self._looked_at(raw, logs, dtypes)
        try:
            scores = self._processors(ids, raw.clone())  # some processors write into what they are given
        except (IndexError, TypeError, ValueError) as error:
            raise QprecError(
                f"generation_config.json: a logits processor of transformers fails: {in_one_line(error)}"
            ) from error
        left = scores.amax(dim=-1)
        tokens = self._chosen(scores, left)
        tokens = torch.where(going, tokens, self._pad)
        for row, token in (forced or {}).items():
            tokens[row] = token
        longer = torch.cat([ids, tokens[:, None]], dim=-1)
        done = self._criteria(longer, None)
        columns = [tokens.float(), *numbers, left.float(), done.float()]  # ids below 2^24 are exact in fp32
        columns += _of_the_chosen(logs, tokens, dtypes) + rounding if logs is not None else []
        host = torch.stack(columns, dim=1).tolist()
        return longer, [_drawn(row) for row in host]

    def _looked_at(self, raw: Tensor, logs: Tensor | None, dtypes: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Probability of the likeliest token, margin, entropy; the first is NaN for NaN, +inf, or all -inf.

        And what rounding does to the distributions: mass lost, changes of rank, whether the likeliest is another.
        """
        if logs is None:
            return [_unknown(raw)] * 3, []
        values, ids = largest(raw)
        chances = logs.exp()
        # 0 * -inf would be NaN where a vocabulary is masked; a tenth of the time of torch.special.entr.
        entropy = -(chances * logs.clamp(min=-1e4)).sum(dim=-1)
        found = [_unknown(raw)] * 3
        for dtype, mine in _narrow(dtypes, raw):
            rounded = rounded_chances(chances.to(dtype), raw, values, ids)
            found = [torch.where(mine, new.float(), old) for new, old in zip(rounded, found, strict=True)]
        return [logs.amax(dim=-1).exp(), values[:, 0] - values[:, 1], entropy], found

    def _chosen(self, scores: Tensor, left: Tensor) -> Tensor:
        if not self._sample:
            return scores.argmax(dim=-1)
        chances = torch.softmax(scores, dim=-1)
        chances.masked_fill_(~torch.isfinite(left)[:, None], 1.0)
        return torch.multinomial(chances, num_samples=1).squeeze(1)


def _unknown(raw: Tensor) -> Tensor:
    return torch.full((len(raw),), math.nan, device=raw.device)


def _narrow(dtypes: Sequence[str], raw: Tensor) -> Iterator[tuple[torch.dtype, Tensor]]:
    """Each dtype but float32, with ``[batch]`` bool: the rows that it computed."""
    for name in dict.fromkeys(dtypes):
        if name != REFERENCE:
            alone = all(each == name for each in dtypes)  # of one dtype nothing has to be copied to the device
            ones = torch.ones(len(raw), dtype=torch.bool, device=raw.device) if alone else None
            mine = ones if ones is not None else torch.tensor([each == name for each in dtypes], device=raw.device)
            yield torch_dtype(name), mine


def _of_the_chosen(logs: Tensor, tokens: Tensor, dtypes: Sequence[str]) -> list[Tensor]:
    """Log-probability of each row's token, and what is added to it by rounding."""
    chosen = logs.gather(-1, tokens[:, None])[:, 0]
    error = _unknown(logs)
    for dtype, mine in _narrow(dtypes, logs):
        error = torch.where(mine, chosen.to(dtype).float() - chosen, error)
    return [chosen, error]


def _drawn(row: list[float]) -> Drawn:
    token, top1, margin, entropy, left, done, *more = row
    if not more:
        return Drawn(int(token), top1, margin, entropy, left, bool(done))
    logprob, error, mass, ranks, changed = more
    return Drawn(int(token), top1, margin, entropy, left, bool(done), logprob, (error, mass, ranks, changed))


def sampling_error() -> str:
    """The sentence with which this torch refuses a row of NaN probabilities."""
    try:
        torch.multinomial(torch.full((1, 2), math.nan), num_samples=1)
    except RuntimeError as error:
        return str(error)
    return "probability tensor contains either `inf`, `nan` or element < 0"
