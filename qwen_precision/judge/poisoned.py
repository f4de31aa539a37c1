"""A KV cache that holds what another request left there: what shows it in the record of a serving engine. No torch.

Attention reads the cache, which is no argument of it. So it is where a clean request goes bad, from finite inputs, and
the same tokens are clean in an engine whose cache is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwen_precision.judge.columns import Columns
from qwen_precision.judge.findings import Limits
from qwen_precision.record import Control, Event, Explanation, Pass, Run

SWITCHES = (
    "VLLM_COMPUTE_NANS_IN_LOGITS=1 counts such requests, and VLLM_RAISE_ON_LOGIT_NANS=1 ends the engine at the first."
)
"""vLLM's own."""


class Suspect(NamedTuple):
    """A request that went bad in attention."""

    each: Pass
    event: Event
    ids: list[int]
    """Its tokens, up to the one at which it was seen."""


def is_live(run: Run) -> bool:
    """Whether it was measured inside a serving engine, as ``vllm/`` does."""
    return run.verb == "probe" and any(choice.what == "engine" for choice in run.choices)


def suspect(run: Run, each: Pass, event: Event) -> Suspect | None:
    """What is asked about, if an origin in a pass may be such a cache."""
    rows = run.prompts[each.prompt].rows
    row = event.row if event.row is not None else 0 if len(rows) == 1 else None
    if not is_live(run) or "attention" not in run.sites[event.site].op or row is None or row >= len(rows):
        return None
    last = event.position if event.position is not None else len(rows[row].ids) - 1
    return Suspect(each, event, rows[row].ids[: last + 1])


def failed_before(columns: Columns, one: Suspect) -> str | None:
    """The request that may have left it: the first that failed in this engine before, at this depth or above."""
    depth = columns.depth(one.event.site)
    for earlier in columns.passes(one.each.dtype):
        bad = [event for event in earlier.events if event.nan or event.inf]
        if earlier.prompt < one.each.prompt and any(columns.depth(event.site) <= depth for event in bad):
            return columns.run.prompts[earlier.prompt].name
    return None


def clean_in(run: Run, one: Suspect) -> bool:
    """Whether the same tokens were clean in an engine."""
    return any(
        not any(_meets(event, number, len(one.ids)) for event in each.events)
        for each in run.passes
        if each.dtype == one.each.dtype and each is not one.each
        for number, row in enumerate(run.prompts[each.prompt].rows)
        if one.ids and row.ids[: len(one.ids)] == one.ids
    )


def _meets(event: Event, row: int, tokens: int) -> bool:
    mine = event.row in (None, row) and (event.position is None or event.position < tokens)
    return mine and bool(event.nan or event.inf)


def with_fresh_engines(runs: Sequence[Run]) -> list[Run]:
    """Runs that are shown together: each with what the others tell of the same requests in another engine.

    Only that they are clean there is told: where they fail as well, nothing says that that engine was a fresh one.
    """
    return [_told(run, [other for other in runs if other is not run and _alike(other, run)]) for run in runs]


def _alike(one: Run, other: Run) -> bool:
    """Whether two records are of the same checkpoint in an engine, and of the same of its workers."""
    worker, again = ([choice.reason for choice in run.choices if choice.what == "engine"] for run in (one, other))
    return is_live(one) and is_live(other) and worker == again and one.model.files == other.model.files


def _told(run: Run, others: Sequence[Run]) -> Run:
    made = list(_controls(run, others))
    if not made:
        return run
    known = run.explanation or Explanation(budget=0, controls=[], left_out=[], hashes={}, continuations=[])
    return run.model_copy(update={"explanation": known.model_copy(update={"controls": [*known.controls, *made]})})


def _controls(run: Run, others: Sequence[Run]) -> Iterator[Control]:
    columns = Columns(run, Limits())
    for each in run.passes:
        for event in columns.origins(each):
            one = suspect(run, each, event)
            if one is not None and any(clean_in(other, one) for other in others):
                yield Control(
                    what="fresh engine",
                    dtype=each.dtype,
                    prompt=run.prompts[each.prompt].name,
                    row=event.row or 0,
                    tokens=len(one.ids),
                    position=None,
                    clean=True,
                    detail="the same tokens in a fresh engine",
                    began=None,
                )
