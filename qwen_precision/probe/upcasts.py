"""What a softmax in float32 is worth on every prompt, and what the logits take, from pieces and slices of them."""

import math

import torch
from torch import Tensor

from qwen_precision.dtypes import REFERENCE
from qwen_precision.model import Encoded, Stopwatch
from qwen_precision.probe.logprobs import LogProbs
from qwen_precision.probe.softmax import of_positions, of_tokens
from qwen_precision.record import LOOKED_AT, LogitsCost, Upcast, rounded
from qwen_precision.torch_dtypes import torch_dtype

_OF_A_PROMPT = 64
"""Positions of all rows of a prompt whose whole vocabulary is looked at, at most, but for one a row."""


class Upcasts:
    """Keeps a few positions' logits of every stream until the vocabulary is whole, and then looks at them.

    Args:
        prompts: what the streams are of.
    """

    def __init__(self, prompts: list[Encoded]) -> None:
        self._prompts = prompts
        self._held: dict[tuple[str, int], dict[int, Tensor]] = {}

    def add(self, key: tuple[str, int], logits: Tensor, begin: int, start: int) -> None:
        """Take a piece; arguments as for ``LogProbs.add``."""
        if key[0] == REFERENCE:
            return
        places = self._places(key[1]) - begin
        here = (places >= 0) & (places < logits.shape[1])
        rows = torch.arange(len(places), device=places.device)[:, None]
        found = logits[rows, places.clamp(0, logits.shape[1] - 1)].to(torch_dtype(key[0]))
        slices = self._held.setdefault(key, {})
        slices[start] = torch.where(here[..., None], found, slices[start]) if start in slices else found

    def close(self, logprobs: LogProbs) -> dict[tuple[str, int], list[Upcast | None]]:
        """By stream and row, for the record."""
        return {key: self._rows(key, logprobs) for key in self._held}

    def _places(self, prompt: int) -> Tensor:
        """``[batch, positions]``, evenly from a row's first token to its last; of a short row some come twice."""
        mask = self._prompts[prompt].mask
        batch, tokens = mask.shape
        count = max(1, min(LOOKED_AT, tokens, _OF_A_PROMPT // batch))
        back = torch.arange(count - 1, -1, -1, device=mask.device)
        return tokens - 1 - (mask.sum(dim=1, keepdim=True) - 1) * back // max(1, count - 1)

    def _rows(self, key: tuple[str, int], logprobs: LogProbs) -> list[Upcast | None]:
        slices = self._held[key]
        logits = torch.cat([slices[start] for start in sorted(slices)], dim=-1)
        found = torch.stack([of_positions(row) for row in logits])
        places = self._places(key[1])
        found[:, 1:, 0] *= places[:, 1:] != places[:, :-1]
        mask = self._prompts[key[1]].mask.bool()
        tokens = of_tokens(logprobs.of(key)[:, :-1], mask[:, :-1] & mask[:, 1:], torch_dtype(key[0]))
        flat = torch.cat([tokens.flatten().to(found.dtype), found.flatten()]).tolist()  # one transfer a stream
        wide, deep = tokens.shape[1], found.shape[1] * found.shape[2]
        batch = len(tokens)
        rest = flat[batch * wide :]
        return [
            _part(flat[row * wide : (row + 1) * wide], rest[row * deep : (row + 1) * deep], found.shape[2])
            for row in range(batch)
        ]


def _part(tokens: list[float], positions: list[float], width: int) -> Upcast:
    rows = [positions[at : at + width] for at in range(0, len(positions), width)]
    rows = [row for row in rows if row[0]]
    count = int(tokens[0])
    largest, rms, loss, in_dtype, off = (rounded(value) if count else None for value in tokens[1:6])
    by_hand = [row[4] for row in rows]
    finite = [value for value in by_hand if math.isfinite(value)]
    return Upcast(
        tokens=count,
        logprob_max=largest,
        logprob_rms=rms if rms is not None and math.isfinite(rms) else None,
        loss=loss,
        loss_in_dtype=in_dtype,
        loss_error=off,
        bad=int(tokens[6]),
        zero=int(tokens[7]),
        rows=len(rows),
        mass_lost=_farthest([row[1] for row in rows]),
        ranks=int(sum(row[2] for row in rows)),
        changed=int(sum(row[3] for row in rows)),
        by_hand=_farthest(finite),
        by_hand_bad=len(by_hand) - len(finite),
        unshifted_bad=int(sum(row[5] for row in rows)),
    )


def _farthest(values: list[float]) -> float | None:
    """Of these the one farthest from zero."""
    return rounded(max(values, key=abs)) if values else None


class Costs:
    """Counts bytes of logits as they come, and what upcasting a step's takes.

    Args:
        prompts: what the streams are of; not none.
    """

    def __init__(self, prompts: list[Encoded]) -> None:
        self._largest = max(range(len(prompts)), key=lambda number: prompts[number].ids.numel())
        self._shape = prompts[self._largest].ids.shape
        self._watch = Stopwatch(prompts[0].ids.device)
        self._pieces: set[int] = set()
        self._upcast: set[tuple[str, int]] = set()
        self._held = 0

    def saw(self, key: tuple[str, int], logits: Tensor, begin: int) -> None:
        """A tensor that a model gave; arguments as for ``LogProbs.add``."""
        self._held = max(self._held, logits.numel() * logits.element_size())
        if key[1] == self._largest:
            self._pieces.add(begin)

    def upcast(self, key: tuple[str, int], last: Tensor) -> Tensor:
        """``[batch, rows of the vocabulary]`` logits of the last position, in float32."""
        if key[0] == REFERENCE:
            return last.float()
        self._upcast.add(key)
        return self._watch.timed(key[0], last.float)

    def close(self, vocabulary: int) -> LogitsCost:
        """For the record. On a GPU this waits for it."""
        batch, tokens = self._shape
        return LogitsCost(
            upcast=True,
            upcast_seconds=round(self._watch.seconds, 6),
            bytes=batch * vocabulary * 4,
            whole_prompt_bytes=batch * tokens * vocabulary * 4,
            chunks=len(self._pieces),
            steps=len(self._upcast),
            vocabulary=vocabulary,
            held=self._held,
        )
