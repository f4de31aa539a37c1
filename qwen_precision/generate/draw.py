"""From raw logits to one token a row, with transformers' own processors, as ``generate`` of transformers does it.

What a healthy step costs beside that: one softmax, a top-2 and an entropy of ``[batch, vocabulary]``, and one
copy to the host that carries everything about the step (tokens, numbers, which rows are done). No bad row ever
reaches ``multinomial``: on CUDA that would end the process, not only the draw. The random numbers of a row do not
depend on what is in the other rows, so a step can be drawn again with one row mended and the rest comes out the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_precision.errors import QprecError, in_one_line


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
        self, ids: Tensor, raw: Tensor, going: Tensor, forced: dict[int, int] | None = None
    ) -> tuple[Tensor, list[Drawn]]:
        """One step.

        Args:
            ids: ``[batch, tokens]`` so far, padding included.
            raw: ``[batch, vocabulary]`` raw logits; not changed.
            going: ``[batch]`` bool, rows that are not over.
            forced: tokens for rows that are not to be drawn.

        Returns:
            ``[batch, tokens + 1]`` ids, and the rows of the step.
        """
        numbers = self._looked_at(raw)
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
        host = torch.stack(columns, dim=1).tolist()
        return longer, [Drawn(int(row[0]), row[1], row[2], row[3], row[4], bool(row[5])) for row in host]

    def _looked_at(self, raw: Tensor) -> list[Tensor]:
        """Probability of the likeliest token, margin, entropy; the first is NaN for NaN, +inf, or all -inf."""
        if not self._watch:
            return [torch.full((len(raw),), math.nan, device=raw.device)] * 3
        first, second = raw.topk(2, dim=-1).values.float().unbind(-1)
        logs = torch.log_softmax(raw, dim=-1, dtype=torch.float32)
        # 0 * -inf would be NaN where a vocabulary is masked; a tenth of the time of torch.special.entr.
        entropy = -(logs.exp() * logs.clamp(min=-1e4)).sum(dim=-1)
        return [logs.amax(dim=-1).exp(), first - second, entropy]

    def _chosen(self, scores: Tensor, left: Tensor) -> Tensor:
        if not self._sample:
            return scores.argmax(dim=-1)
        chances = torch.softmax(scores, dim=-1)
        chances.masked_fill_(~torch.isfinite(left)[:, None], 1.0)
        return torch.multinomial(chances, num_samples=1).squeeze(1)


def sampling_error() -> str:
    """The sentence with which this torch refuses a row of NaN probabilities."""
    try:
        torch.multinomial(torch.full((1, 2), math.nan), num_samples=1)
    except RuntimeError as error:
        return str(error)
    return "probability tensor contains either `inf`, `nan` or element < 0"
