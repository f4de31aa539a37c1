"""Something not finite that nothing watched began: a kernel that torch cannot see into, memory written behind its back.

It is met where an operation was already given it. That place is named, with what it is: not where it began.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.columns import Columns, Where, token_of
from qwen_precision.judge.findings import Cause, Finding, Magnitude, Place, Spread
from qwen_precision.qwen3 import name_of
from qwen_precision.record import Event, Pass, Site

_ADVICE = (
    "Look at what runs just before: a custom kernel, or memory written in place. With --attn eager, or without the "
    "package that brings the kernel, every operation is torch's own and is watched."
)


def unwatched(columns: Columns) -> Iterator[Finding]:
    """Something not finite was met of which no operation that was watched is the origin."""
    dtypes = dict.fromkeys([*columns.run.dtypes, *([REFERENCE] if columns.run.reference else [])])
    for dtype in dtypes:
        found: dict[Where | None, Finding] = {}
        prompts: dict[Where | None, list[str]] = {}
        for each in columns.passes(dtype):
            for event in _met(columns, each):
                where = columns.place(event) if event is not None else None
                found.setdefault(where, _finding(columns, each, event))
                prompts.setdefault(where, []).append(columns.run.prompts[each.prompt].name)
        for where, finding in found.items():
            yield replace(finding, spread=Spread(prompts=tuple(dict.fromkeys(prompts[where]))))


def _met(columns: Columns, each: Pass) -> Iterator[Event | None]:
    """The first bad event of every stretch of a pass that ended badly and has no origin; None for the logits alone.

    A stretch ends where the stream is replaced, or with the pass. Behind a clamp the stream is nobody's.
    """
    bad = [event for event in sorted(each.events, key=lambda event: event.step) if event.nan or event.inf]
    start = -math.inf
    for seed in each.reseeded:
        here = [event for event in bad if start <= columns.depth(event.site) < seed.layer]
        yield from _first_of(here)
        start = seed.layer
        if seed.clamped:
            return
    here = [event for event in bad if start <= columns.depth(event.site)]
    if any(event.nan and event.site == each.last for event in here):
        yield from _first_of(here)
    elif not each.reseeded and not bad and _answerless(columns, each):
        yield None


def _first_of(stretch: list[Event]) -> Iterator[Event]:
    if stretch and all(event.clean_weights and not event.clean_inputs for event in stretch):
        yield stretch[0]


def _answerless(columns: Columns, each: Pass) -> bool:
    """Whether a row has no likeliest token where the reference has one."""
    reference = columns.by_key.get((REFERENCE, each.prompt))
    theirs = reference.top1 if reference is not None else []
    return any(own is None and other is not None for own, other in zip(each.top1, theirs, strict=False))


def _finding(columns: Columns, each: Pass, event: Event | None) -> Finding:
    run = columns.run
    site = run.sites[event.site] if event is not None else Site(layer=None, module="lm_head", op="logits", call=0)
    name = name_of(site.module, site.op, site.call) if event is not None else "logits"
    place = Place(site.layer, site.module, site.op, name, prompt=run.prompts[each.prompt].name)
    if event is not None:
        token = token_of(run, each, event)
        place = replace(place, site=event.site, token=token, channel=event.channel, expert=event.expert)
    said = f"The {name} was given something that is not finite, and no operation that was watched made it."
    if event is None:
        said = "The logits are not finite, and no operation that was watched made them so."
    return Finding(
        kind="unwatched",
        severity="error",
        dtype=each.dtype,
        place=place,
        magnitude=Magnitude(nan=event.nan if event is not None else 0, inf=event.inf if event is not None else 0),
        cause=Cause("not-watched", said, (), _ADVICE),
        origin=False,
    )
