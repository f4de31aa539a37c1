"""Which control runs would tell the causes of a failure apart: planned from a judged run, made elsewhere. No torch.

A control is the failing row changed in one way, in the same dtype. Every row that failed by itself is asked about, by
its first origin: what comes later in it ran on hidden states that were not its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.columns import Columns, token_of
from qwen_precision.judge.findings import Finding, Limits, Report
from qwen_precision.qwen3 import row_of
from qwen_precision.record import ControlKind, Row, Run

KINDS = ("overflow", "nan")
"""Findings that controls can say something about."""


class Candidate(NamedTuple):
    """One control that could be run."""

    what: ControlKind
    dtype: str
    prompt: str
    row: int
    ids: tuple[int, ...]
    detail: str
    position: int | None = None
    """Token position in the padded row that it is about, or None."""
    attention: str | None = None
    """An implementation other than that of the failing run."""

    @property
    def job(self) -> tuple[str, str, bool]:
        """Controls that agree in this go through the layers together."""
        return self.dtype, self.attention or "", self.what == "full reduction"


class Asked(NamedTuple):
    """A failing row, and the finding that asks about it."""

    finding: Finding
    number: int
    """Of the row."""
    row: Row
    batched: bool
    position: int | None
    """Of the token, in the padded row; None at padding, or where it is not known."""
    hidden: bool = False
    """Whether another row of its batch is worse at the same operation: then it is only asked whether it fails alone."""

    @property
    def place(self) -> int | None:
        """The token's index in the row's ids."""
        return None if self.position is None else self.position - self.row.padding


def asked(report: Report) -> list[Asked]:
    """Failing rows of every dtype, in the order of the forward; not those whose stream had been replaced before."""
    found: dict[tuple[str, str | None, int], Asked] = {}
    for finding in report.findings:
        each = _asked(report.run, finding)
        if each is not None:
            found.setdefault((finding.dtype, finding.place.prompt, each.number), each)
    columns = Columns(report.run, Limits())
    for finding in report.findings:
        for each in _beside(columns, finding):
            found.setdefault((finding.dtype, each.finding.place.prompt, each.number), each)
    return list(found.values())


def _beside(columns: Columns, finding: Finding) -> Iterator[Asked]:
    """Other rows of a batch that fail at the same operation: each may have a reason of its own."""
    run = columns.run
    for each in columns.passes(finding.dtype):
        prompt = run.prompts[each.prompt]
        if len(prompt.rows) == 1:
            continue
        for event in columns.origins(each):
            if event.site == finding.place.site:
                place = replace(finding.place, prompt=prompt.name, token=token_of(run, each, event))
                one = _asked(run, replace(finding, place=place))
                if one is not None:
                    yield one._replace(hidden=True)


def _asked(run: Run, finding: Finding) -> Asked | None:
    measured = finding.kind in KINDS and finding.severity == "error" and not finding.predicted
    prompt = next((each for each in run.prompts if each.name == finding.place.prompt), None)
    if not measured or prompt is None or finding.dtype == REFERENCE or finding.cause.kind == "dead-in-fp32":
        return None
    token = finding.place.token
    number = token.row if token is not None else 0
    mine = [p for p in run.passes if p.dtype == finding.dtype and run.prompts[p.prompt].name == prompt.name]
    layer = finding.place.layer if finding.place.layer is not None else len(run.sites)
    if number >= len(prompt.rows) or any(number in s.rows and s.layer <= layer for p in mine for s in p.reseeded):
        return None
    position = token.position if token is not None and not token.padding else None
    return Asked(finding, number, prompt.rows[number], len(prompt.rows) > 1, position)


def candidates(report: Report, templates: Sequence[Candidate] = ()) -> list[Candidate]:
    """Controls of every failing row, the most telling of each first; before them the first that failed, as it was.

    Args:
        report: of the run.
        templates: the same texts with the chat template, or without it, where there is one.
    """
    lots: list[list[Candidate]] = []
    again: dict[str, Candidate] = {}
    for each in asked(report):
        again.setdefault(each.finding.dtype, _same(each))
        about = (each.finding.dtype, each.finding.place.prompt, each.number)
        mine = [template for template in templates if (template.dtype, template.prompt, template.row) == about]
        lot: dict[tuple[object, ...], Candidate] = {}
        for control in _ordered(report.run, each, mine):
            known = not each.batched and list(control.ids) == each.row.ids and control.job[1:] == ("", False)
            if control.ids and not known:
                lot.setdefault((control.ids, control.job), control)
        lots.append(list(lot.values())[: 1 if each.hidden else None])
    return [*again.values(), *(control for control in chain(*zip_longest(*lots)) if control is not None)]


def _same(each: Asked) -> Candidate:
    """The cheapest control: where chance is at work, what a change does tells nothing."""
    detail = "the same batch, run again" if each.batched else "the same row, run again"
    return Candidate(
        "same again", each.finding.dtype, str(each.finding.place.prompt), each.number, tuple(each.row.ids), detail
    )


def starts_at(run: Run, dtype: str, prompt: str) -> tuple[str, str, int, int | None, int | None] | None:
    """Where a dtype first fails on a prompt: module, operation, call, row and position; None where it does not."""
    found = [
        event
        for each in run.passes
        if each.dtype == dtype and run.prompts[each.prompt].name == prompt
        for event in each.events
        if event.nan or event.inf
    ]
    if not found:
        return None
    first = min(found, key=lambda event: event.step)
    site = run.sites[first.site]
    return site.module, site.op, site.call, first.row, first.position


def _ordered(run: Run, each: Asked, templates: list[Candidate]) -> Iterator[Candidate]:
    finding, ids, place = each.finding, each.row.ids, each.place
    site = (
        run.sites[finding.place.site]
        if finding.place.site is not None and finding.place.site < len(run.sites)
        else None
    )

    def control(what: ControlKind, changed: list[int], detail: str, attention: str | None = None) -> Candidate:
        about = None if attention or what in ("row alone", "full reduction") else each.position
        return Candidate(
            what, finding.dtype, str(finding.place.prompt), each.number, tuple(changed), detail, about, attention
        )

    if each.batched:
        yield control("row alone", ids, "the same row without the batch and its padding")
    if site is not None and row_of(site.module, site.op, site.call).role == "scores":
        yield control("sdpa", ids, "the same tokens with sdpa attention", "sdpa")
    if _on_cuda(run) and finding.magnitude.headroom is not None and finding.magnitude.headroom >= 1:
        yield control("full reduction", ids, "the same tokens without reduced-precision reductions")
    if place is None:
        return
    text = f"token {place}"
    yield control("token alone", [ids[place]], f"{text} alone")
    others = [i for i in ids if i != ids[place]]
    yield control("without the token", others, f"the row without {text}, wherever it stands")
    yield from templates
    if place > 0:
        yield from _before(control, ids, place, text, _other(run, ids, place))


def _before(
    control: Callable[[ControlKind, list[int], str], Candidate],
    ids: list[int],
    place: int,
    text: str,
    other: int | None,
) -> Iterator[Candidate]:
    """What tells a length from what stands before the token."""
    yield control("before the token", ids[:place], f"what stands before {text}")
    yield control("token after the first", [ids[0], ids[place]], f"{text} right after the first token")
    many = [ids[0]] * place + [ids[place]]
    yield control("as many first tokens", many, f"{text} after {place} times the first token")
    if many == ids[: place + 1] and other is not None:  # that was the row itself: the first may be half of the fault
        yield control("as many other tokens", [other] * place + [ids[place]], f"{text} after {place} times id {other}")
    yield control("up to the token", ids[: place + 1], f"the row up to {text}")


def _other(run: Run, ids: list[int], place: int) -> int | None:
    """A token of any prompt that is neither the row's first nor the one asked about."""
    everything = chain(ids, *(row.ids for prompt in run.prompts for row in prompt.rows))
    return next((each for each in everything if each not in (ids[0], ids[place])), None)


def _on_cuda(run: Run) -> bool:
    return any(choice.what == "device" and choice.value.startswith("cuda") for choice in run.choices)
