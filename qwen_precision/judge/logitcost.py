"""What logits cost, in bytes and milliseconds: those of a run, and those of longer prompts. Pure; no torch."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.record import Run

LENGTHS = (8_000, 32_000, 128_000)
"""Tokens of prompts that the cost is told for, beside the run's own."""


class Length(NamedTuple):
    """Logits of prompts of a length, in bytes."""

    name: str
    rows: int
    tokens: int
    float32: int
    narrow: int
    """In the dtype of the run that has the fewest bytes."""


@dataclass(frozen=True)
class Cost:
    """What logits take."""

    vocabulary: int
    dtype: str
    """Whose bytes ``Length.narrow`` has: the narrowest of the run."""
    last: Length
    """The last position alone, of the run's own batch."""
    whole: Length
    """All positions of the run's largest prompt."""
    longer: tuple[Length, ...]
    """Of one row each, ``LENGTHS`` tokens long."""
    held: int | None
    """Bytes of the largest tensor of logits that there was in the run; None where nobody looked."""
    prompt: str | None
    """Name of the run's largest prompt, where it has several and that is among them. A stranger's words."""
    pieces: int
    """So many pieces of the prompt went through one after another."""
    weights: int
    """Bytes of the checkpoint's weights: a step of a text reads all of them at least once, unless it has experts."""
    seconds: float | None
    """That upcasting the last position took at each step; None where it was not taken, or all is float32 anyway."""

    @property
    def lengths(self) -> list[Length]:
        """All of them, from the last position up."""
        return [self.last, self.whole, *self.longer]


def cost(run: Run) -> Cost | None:
    """None where no logits were computed, or a record from elsewhere does not say how many there are."""
    told = run.generation.logits if run.generation is not None else run.logits
    if told is None or not told.bytes or not told.whole_prompt_bytes or not run.dtypes:
        return None
    dtype = min(run.dtypes, key=lambda name: DTYPES[name].bytes)
    size = 4 if told.upcast else DTYPES[dtype].bytes
    vocabulary = told.vocabulary or run.model.vocabulary
    if vocabulary <= 0:
        return None
    rows, tokens = max(1, told.bytes // (vocabulary * size)), max(1, told.whole_prompt_bytes // told.bytes)
    timed = (
        told.upcast
        and dtype != REFERENCE
        and told.steps
        and math.isfinite(told.upcast_seconds)
        and told.upcast_seconds > 0
    )

    def length(name: str, rows: int, tokens: int) -> Length:
        every = rows * tokens * vocabulary
        return Length(name, rows, tokens, every * DTYPES[REFERENCE].bytes, every * DTYPES[dtype].bytes)

    return Cost(
        vocabulary=vocabulary,
        dtype=dtype,
        last=length("last position", rows, 1),
        whole=length("this prompt", rows, tokens),
        longer=tuple(length(f"{each:,} tokens", 1, each) for each in LENGTHS),
        held=told.held,
        prompt=_named(run, rows, tokens),
        pieces=told.chunks,
        weights=run.model.weight_bytes,
        seconds=told.upcast_seconds / told.steps if timed and told.steps else None,
    )


def _named(run: Run, rows: int, tokens: int) -> str | None:
    """The prompt of that size, of several."""
    if len(run.prompts) < 2:
        return None
    sizes = ((each.name, len(each.rows), each.rows[0]) for each in run.prompts if each.rows)
    return next((name for name, many, row in sizes if (many, row.padding + len(row.ids)) == (rows, tokens)), None)


_NEGLIGIBLE = 0.01
"""Share of the weights' bytes below which a step's logits make no difference to its time or memory."""


def a_step(taken: Cost) -> str:
    """What upcasting the last position takes, in a sentence."""
    time = f" and {taken.seconds * 1e3:.2g} ms" if taken.seconds is not None else ""
    said = f"Upcasting the last position takes {sized(taken.last.float32)}{time} a step"
    if not taken.weights:
        return f"{said}."
    share = taken.last.float32 / taken.weights
    return f"{said}: {share:.2g} times the bytes of the weights{', negligible' if share < _NEGLIGIBLE else ''}."


def sized(count: int) -> str:
    """Bytes as a person reads them, in powers of ten: 608 kB, 77.8 GB."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.3g} {unit}"
    return f"{count} bytes"
