"""What stands around a finding in its run: the close look at it, what ran before it, massive activations. Pure."""

from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.findings import Finding
from qwen_precision.qwen3 import name_of
from qwen_precision.record import Closeup, Pass, Run

_BEFORE = 4


class Preceding(NamedTuple):
    """An operation that ran before another."""

    name: str
    value: float | None
    """In the dtype itself."""
    reference: float | None


class MassiveChannel(NamedTuple):
    """A channel of the residual stream with massive activations, over layers and prompts."""

    channel: int
    first: int
    last: int
    """Layers after which it has them."""
    value: float
    tokens: list[str]
    """At which, each once."""


def _pass(run: Run, dtype: str, prompt: str | None) -> Pass | None:
    return next((p for p in run.passes if p.dtype == dtype and run.prompts[p.prompt].name == prompt), None)


def closeup_of(run: Run, finding: Finding) -> Closeup | None:
    """The microscope's view of an origin, where there is one."""
    mine = _pass(run, finding.dtype, finding.place.prompt)
    if mine is None or finding.place.site is None:
        return None
    row = finding.place.token.row if finding.place.token is not None else None
    here = [event for event in mine.events if event.site == finding.place.site]
    return next((event.closeup for event in here if row is None or event.row == row), None)


def run_up(run: Run, finding: Finding) -> list[Preceding]:
    """The operations before a finding, in the order they ran, with their largest magnitudes."""
    mine, reference = _pass(run, finding.dtype, finding.place.prompt), _pass(run, REFERENCE, finding.place.prompt)
    if mine is None or finding.place.site is None or not finding.origin or finding.predicted:
        return []
    # Casts have sites of their own, numbered when a dtype first met them: what ran before has a lower number.
    before = [n for n in range(finding.place.site) if mine.abs_max[n] is not None and n not in run.casts][-_BEFORE:]
    return [
        Preceding(
            name_of(run.sites[n].module, run.sites[n].op, run.sites[n].call),
            mine.abs_max[n],
            reference.abs_max[n] if reference is not None else None,
        )
        for n in before
    ]


def massive_channels(run: Run) -> list[MassiveChannel]:
    """Channels with massive activations in the reference, the largest first."""
    found: dict[int, MassiveChannel] = {}
    for each in run.passes:
        rows = run.prompts[each.prompt].rows
        for one in each.massive:
            row = rows[one.row]
            index = one.position - row.padding
            token = row.tokens[index] if 0 <= index < len(row.tokens) else "padding"
            old = found.get(one.channel) or MassiveChannel(one.channel, one.layer, one.layer, 0.0, [])
            tokens = old.tokens if token in old.tokens else [*old.tokens, token]
            first, last, value = min(old.first, one.layer), max(old.last, one.layer), max(old.value, float(one.value))
            found[one.channel] = MassiveChannel(one.channel, first, last, value, tokens)
    return sorted(found.values(), key=lambda each: -each.value)
