"""Text that says nothing, recognised from the token ids alone. Pure; the guard and the judgement both use it.

- a *run*: one token over and over. The argmax of an all-NaN row is id 0, which is ``!`` in a byte-level vocabulary
  (transformers#33294), so NaN prints ``!!!!``.
- *descending* ids: what top-k makes of a NaN row in some engines, k-1 down to 0: ``43210/.-,+*`` for k = 20
  (Don-Chad/ninfer-3090#23). A countdown of digits has descending ids too, but neither starts at k-1 nor ends at 0.
- a *cycle*: a few tokens that come round again and again.

What made them (bad logits, or a model that merely repeats itself) ids cannot tell; whoever watched the logits can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_precision.settings import Degenerate


@dataclass(frozen=True)
class Symptom:
    """A stretch of degenerate ids."""

    kind: Literal["run", "descending", "cycle"]
    start: int
    """Step of its first token."""
    length: int
    """Tokens."""
    period: int
    """Tokens after which it repeats: 1 for a run, 0 for descending ids."""

    @property
    def end(self) -> int:
        """The step after its last token."""
        return self.start + self.length


def at_the_end(ids: Sequence[int], limits: Degenerate, top_k: int = 0) -> Symptom | None:
    """The symptom that the last tokens show, or None; of a longer one, as much as the limits ask for.

    Args:
        ids: all tokens generated so far for one row.
        limits: how long it must be.
        top_k: of the sampler, 0 if it has none.
    """
    return _descending(ids, limits, top_k) or _repeated(ids, limits)


def symptoms(ids: Sequence[int], limits: Degenerate, top_k: int = 0) -> list[Symptom]:
    """Every stretch of a finished text, whole, in order; they do not overlap."""
    found: list[Symptom] = []
    for end in range(1, len(ids) + 1):
        now = at_the_end(ids[:end], limits, top_k)
        if now is None:
            continue
        if found and now.start < found[-1].end and (now.kind, now.period) == (found[-1].kind, found[-1].period):
            found[-1] = Symptom(now.kind, found[-1].start, end - found[-1].start, now.period)
        elif not found or now.start >= found[-1].end:
            found.append(now)
    return found


def _repeated(ids: Sequence[int], limits: Degenerate) -> Symptom | None:
    """The shortest period with which the end repeats itself often enough."""
    for period in range(1, min(limits.period, len(ids) // 2) + 1):
        least = limits.run if period == 1 else period * limits.repeats
        if len(ids) < least:
            break
        length = period
        while length < len(ids) and length < least and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= least:
            return Symptom("run" if period == 1 else "cycle", len(ids) - length, length, period)
    return None


def _descending(ids: Sequence[int], limits: Degenerate, top_k: int) -> Symptom | None:
    length = 1
    while length < len(ids) and ids[-length - 1] == ids[-length] + 1:
        length += 1
    if length < limits.descending or (ids[-1] != 0 and ids[-length] != top_k - 1):
        return None
    return Symptom("descending", len(ids) - length, length, 0)
