"""Something not finite that nothing watched began: a kernel that torch cannot see into, memory written behind its back.

It is met where an operation was already given it. That place is named, with what it is: not where it began.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.columns import Columns, place_of
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Spread
from qwen_precision.record import Event, Pass

_ADVICE = (
    "Look at what runs just before: a custom kernel, or memory written in place. With --attn eager, or without the "
    "package that brings the kernel, every operation is torch's own and is watched."
)


class _Met(NamedTuple):
    """Where it is met first."""

    site: int
    event: Event | None
    """Of what was given to the operation; None where all that it gave was finite, and what was read of it was not."""


def unwatched(columns: Columns) -> Iterator[Finding]:
    """Something not finite was met of which no operation that was watched is the origin."""
    for dtype in dict.fromkeys([*columns.run.dtypes, REFERENCE]):
        found: dict[int, Finding] = {}
        prompts: dict[int, list[str]] = {}
        for each in columns.passes(dtype):
            for met in _met(columns, each):
                found.setdefault(met.site, _finding(columns, each, met))
                prompts.setdefault(met.site, []).append(columns.run.prompts[each.prompt].name)
        for site, finding in found.items():
            yield replace(finding, spread=Spread(prompts=tuple(dict.fromkeys(prompts[site]))))


def _met(columns: Columns, each: Pass) -> Iterator[_Met]:
    """Of every stretch of a pass that ended badly and has no origin.

    A stretch ends where the stream is replaced, or with the pass. Behind a clamp the stream is nobody's.
    """
    bad = [event for event in sorted(each.events, key=lambda event: event.step) if event.nan or event.inf]
    start = -math.inf
    for seed in each.reseeded:
        here = [event for event in bad if start <= columns.depth(event.site) < seed.layer]
        yield from _first(here, partial(_last_before, columns, seed.layer))
        start = seed.layer
        if seed.clamped:
            return
    here = [event for event in bad if start <= columns.depth(event.site)]
    last, lost = each.last, not each.reseeded and _answerless(columns, each)
    if lost or any(event.nan and event.site == last for event in here):
        yield from _first(here, lambda: last)


def _first(stretch: list[Event], last: Callable[[], int | None]) -> Iterator[_Met]:
    """Its first event; where it has none, the last operation, which is only looked for then: sites are many."""
    if not stretch:
        site = last()
        if site is not None:
            yield _Met(site, None)
    elif all(event.clean_weights and not event.clean_inputs for event in stretch):
        yield _Met(stretch[0].site, stretch[0])


def _last_before(columns: Columns, layer: int) -> int | None:
    sites = range(len(columns.run.sites))
    return max((site for site in sites if columns.depth(site) == layer - 1), default=None)


def _answerless(columns: Columns, each: Pass) -> bool:
    """Whether a row has no likeliest token where the reference has one."""
    reference = columns.by_key.get((REFERENCE, each.prompt))
    theirs = reference.top1 if reference is not None else []
    return any(own is None and other is not None for own, other in zip(each.top1, theirs, strict=False))


def _finding(columns: Columns, each: Pass, met: _Met) -> Finding:
    event, place = met.event, place_of(columns, each, met.site, met.event)
    size, said = Magnitude(), f"What the {place.name} gave was finite, and what was read of it was not"
    if event is not None:
        size, said = Magnitude(nan=event.nan, inf=event.inf), f"The {place.name} was given something that is not finite"
    said = f"{said}; no operation that was watched made it so."
    cause = Cause("not-watched", said, (), _ADVICE)
    return Finding("unwatched", "error", each.dtype, place, size, cause, origin=False)
