"""Which control runs would tell the causes of a failure apart: planned from a judged run, made elsewhere. No torch.

A control is the failing row changed in one way, in the same dtype. Every row that failed by itself is asked about, by
its first origin: what comes later in it ran on hidden states that were not its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.columns import Columns, narrow_sums, token_of
from qwen_precision.judge.findings import Finding, Limits, Report
from qwen_precision.judge.replays import Unseen, unseen
from qwen_precision.qwen3 import row_of
from qwen_precision.record import ControlKind, Pass, Row, Run, Site

KINDS = ("overflow", "nan")
"""Findings that controls can say something about."""
_SUMS = ("product", "scores", "router", "logits")
"""Roles of the operations whose partial sums a card's kernels may keep in fewer bits."""


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
    columns = Columns(report.run, Limits())
    found: dict[tuple[str, str | None, int, bool], Asked] = {}
    own = (_asked(columns, finding) for finding in report.findings)
    beside = chain.from_iterable(_beside(columns, finding) for finding in report.findings)
    for each in chain(own, beside):
        if each is not None:
            about = each.finding.dtype, each.finding.place.prompt, each.number, each.position is None
            found.setdefault(about, each)
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
                one = _asked(columns, replace(finding, place=place))
                if one is not None:
                    yield one._replace(hidden=True)


def _asked(columns: Columns, finding: Finding) -> Asked | None:
    run = columns.run
    measured = finding.kind in KINDS and finding.severity == "error" and not finding.predicted
    prompt = next((each for each in run.prompts if each.name == finding.place.prompt), None)
    if not measured or prompt is None or finding.dtype == REFERENCE or finding.cause.kind == "dead-in-fp32":
        return None
    token = finding.place.token
    if token is None and len(prompt.rows) > 1:
        return None  # which of the rows it was is not known
    number = token.row if token is not None else 0
    mine = [p for p in run.passes if p.dtype == finding.dtype and run.prompts[p.prompt].name == prompt.name]
    layer = finding.place.layer if finding.place.layer is not None else len(run.sites)
    if number >= len(prompt.rows) or not all(_own(columns, each, number, layer) for each in mine):
        return None
    position = token.position if token is not None and not token.padding else None
    return Asked(finding, number, prompt.rows[number], len(prompt.rows) > 1, position)


def _own(columns: Columns, each: Pass, row: int, layer: int) -> bool:
    """Whether a row came to a layer by itself, or would have but for its padding, which a row alone does not have."""
    seeds = [seed for seed in each.reseeded if row in seed.rows and seed.layer <= layer]
    before = [e for e in columns.origins(each) if (e.row or 0) == row and columns.depth(e.site) < layer]
    return not seeds or (all(e.in_padding for e in before) and not any(seed.clamped for seed in seeds))


def candidates(report: Report, templates: Sequence[Candidate] = ()) -> list[Candidate]:
    """Controls of every failing row, the most telling of each first.

    Before them all failing rows as they were, and all that make one failing step of a generation again.

    Args:
        report: of the run.
        templates: the same texts with the chat template, or without it, where there is one.
    """
    lots: list[list[Candidate]] = []
    again: dict[str, Candidate] = {}
    planned: set[tuple[object, ...]] = set()
    for each in asked(report):
        again.setdefault(each.finding.dtype, _same(each))
        about = (each.finding.dtype, each.finding.place.prompt, each.number)
        mine = [template for template in templates if (template.dtype, template.prompt, template.row) == about]
        lot: list[Candidate] = []
        for control in _ordered(report.run, each, mine):
            known = not each.batched and list(control.ids) == each.row.ids and control.job[1:] == ("", False)
            same = (*about, control.position, control.ids, control.job)
            if control.ids and not known and same not in planned:
                planned.add(same)
                lot.append(control)
        lots.append(lot[: 1 if each.hidden else None])
    replays = [control for each in unseen(Columns(report.run, Limits())) for control in _replays(each)]
    return [*again.values(), *replays, *(control for control in chain(*zip_longest(*lots)) if control is not None)]


def _same(each: Asked) -> Candidate:
    """The cheapest control, for all failing rows of a dtype: where chance is at work, a change tells nothing."""
    return Candidate("same again", each.finding.dtype, str(each.finding.place.prompt), each.number, (), "as it was")


def _replays(each: Unseen) -> Iterator[Candidate]:
    """One tells nothing without the one before it: they are not mixed with those of other rows."""
    ids = tuple(each.prompt.rows[each.number].ids)
    for what, detail in each.replays():
        yield Candidate(what, each.failed.dtype, each.prompt.name, each.number, ids, detail)


class Start(NamedTuple):
    """Where something not finite is met first."""

    site: Site
    bad: int
    """Elements that are not finite there."""


def starts_at(run: Run, dtype: str, prompt: str, row: int) -> Start | None:
    """Where a dtype first fails on a row of a prompt; None where it does not."""
    found = [
        event
        for each in run.passes
        if each.dtype == dtype and run.prompts[each.prompt].name == prompt
        for event in each.events
        if (event.nan or event.inf) and event.row in (None, row)
    ]
    if not found:
        return None
    first = min(found, key=lambda event: event.step)
    return Start(run.sites[first.site], first.nan + first.inf)


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
        yield control("row alone", ids, "alone, without the batch and its padding")
    role = row_of(site.module, site.op, site.call).role if site is not None else None
    if role == "scores":
        yield control("sdpa", ids, "the same tokens with sdpa attention", "sdpa")
    if (
        role in _SUMS
        and (_on_cuda(run) or narrow_sums(run))
        and finding.magnitude.reference is not None
        and (finding.magnitude.reference == 0 or (finding.magnitude.headroom or 0) >= 1)
    ):
        yield control("full reduction", ids, "the same tokens without reduced-precision reductions")
    if place is None:
        return
    text = f"token {each.position}"
    yield control("token alone", [ids[place]], f"{text} alone")
    others = [i for i in ids if i != ids[place]]
    yield control("without the token", others, f"the prompt with every occurrence of {text} taken out")
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
    yield control("before the token", ids[:place], f"only what comes before {text}")
    yield control("token after the first", [ids[0], ids[place]], f"{text} right after the first token")
    many = [ids[0]] * place + [ids[place]]
    yield control("as many first tokens", many, f"{text} after {place} times the first token")
    if other is not None:  # the first may be half of the fault
        yield control("as many other tokens", [other] * place + [ids[place]], f"{text} after {place} times id {other}")
    yield control("up to the token", ids[: place + 1], f"the prompt cut after {text}")


def _other(run: Run, ids: list[int], place: int) -> int | None:
    """A token of any prompt that is neither the row's first nor the one asked about; else one beside the first."""
    everything = chain(ids, *(row.ids for prompt in run.prompts for row in prompt.rows))
    beside = (each for each in (ids[0] + 1, ids[0] + 2, ids[0] - 1) if 0 <= each < run.model.vocabulary)
    return next((each for each in chain(everything, beside) if each not in (ids[0], ids[place])), None)


def _on_cuda(run: Run) -> bool:
    return any(choice.what == "device" and choice.value.startswith("cuda") for choice in run.choices)
