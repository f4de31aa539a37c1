"""The answer to a run in a dozen facts: what a person, a bug report and a page show first, from one place.

What ran; a verdict a dtype; the first failure: where it starts, how far it goes, why, what it is not; the room each
layer has; what to do, with the command that does it. Strings from strangers are still in it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwen_precision.dtypes import DTYPES, RESCUED, narrowest
from qwen_precision.judge import Finding, Group, Report, grouped
from qwen_precision.qwen3 import name_of, placed
from qwen_precision.render.text import count, number, quoted, room
from qwen_precision.render.words import corpus, engines, logits
from qwen_precision.render.words.finding import how_far, inside, tried, why
from qwen_precision.render.words.rescue import why_none
from qwen_precision.render.words.ruledout import ruled_out
from qwen_precision.render.words.steps import Step, steps
from qwen_precision.render.words.why import swept, times_nearer


class Verdict(NamedTuple):
    """One dtype."""

    dtype: str
    verdict: str
    said: str


class Fact(NamedTuple):
    """A label (empty: it belongs to the one above) and a sentence."""

    label: str
    text: str


class Room(NamedTuple):
    """The least headroom of a layer, or of several neighbours."""

    layers: str
    headroom: float


class Answer(NamedTuple):
    """All of it."""

    title: str
    ran: str
    verdicts: list[Verdict]
    facts: list[Fact]
    dtype: str | None
    """Whose room the layers have, where there is one with a narrow range."""
    rooms: list[Room]
    steps: list[Step]
    ruled_out: list[tuple[str, str]]
    """What the first failure is not, and how that is known."""


RULED_OUT = "Not it"
"""The label of what the failure is not."""

MOST_ROOMS = 8
"""Columns of layers; of more layers several share one."""


def answer(report: Report, record: str = "") -> Answer:
    """Everything that is told first.

    Args:
        report: of one run.
        record: where the run is saved, as a word of a command line; commands that read it are left out without.
    """
    run = report.run
    title = f"qprec {run.verb} {run.model.source}"
    first = _first(report)
    dtype = narrowest(report.verdict) if run.generation is None else None
    return Answer(
        title=f"{title} @ {run.model.revision[:12]}" if run.model.revision else title,
        ran=_ran(report),
        verdicts=[Verdict(name, verdict, verdict_words(report, name)) for name, verdict in report.verdict.items()],
        facts=[
            *_unfinished(report),
            *(_facts(report, first) if first is not None else _tightest(report, dtype)),
            *_corpus(report, first.first.dtype if first is not None else dtype),
            *(Fact("Sweep", line) for line in swept(report.run)),
            *_by_engine(report),
            *_rescued(report),
            *_notes(report),
            *_logits(report),
        ],
        dtype=dtype,
        rooms=_rooms(report, dtype) if dtype is not None and not (first and _is_damage(first.first)) else [],
        steps=list(steps(report, first, record)),
        ruled_out=list(ruled_out(report, first.first)) if first is not None else [],
    )


def _ran(report: Report) -> str:
    run, model = report.run, report.run.model
    chosen = {choice.what: choice.value for choice in run.choices}
    what = count(corpus.in_all(report), "prompt")
    if run.generation is not None:
        what = f"{count(len(run.generation.rows), 'row')} in {run.settings.get('dtype')}"
    way = [chosen[each] for each in ("device", "attention", "arithmetic") if each in chosen]
    way += [each for each in [chosen.get("memory")] if each and each != "resident"]
    return "; ".join(
        [f"{model.architecture}, {model.layers} layers, {model.source_dtype}", what, ", ".join(way)][: 2 + bool(way)]
    )


def _first(report: Report) -> Group | None:
    """What the answer is about: the first error, else the first warning; infos are not an answer."""
    groups = grouped(report.findings)
    for severity in ("error", "warning"):
        found = next((group for group in groups if group.first.severity == severity), None)
        if found is not None:
            return found
    return None


# -- a line a dtype -----------------------------------------------------------------------------------------------


def verdict_words(report: Report, dtype: str) -> str:
    """What a verdict says: which prompts fail, how near a finite dtype came to its limit, or how precise it is."""
    mine = [finding for finding in report.findings if finding.dtype == dtype and finding.severity != "info"]
    if report.run.generation is not None:
        return _of_a_text(report, dtype, mine)
    errors = [finding for finding in mine if finding.severity == "error"]
    if errors:
        return _who(report, errors)
    if mine:
        return "; ".join([f"{mine[0].kind} {_on(mine[0])}".strip(), *_least(report, dtype)])
    if report.verdict[dtype] == "incomplete":
        return "nothing found before it stopped" if report.corpus is None else "no finding in what was seen"
    more = [*_least(report, dtype), *_closer(report, dtype)]
    return "; ".join(["all finite" if more else "every operation finite", *more])


def _is_damage(finding: Finding) -> bool:
    """Whether a file is at fault: then no headroom means anything."""
    return finding.kind in ("weight-nonfinite", "bad-scale")


def _who(report: Report, errors: list[Finding]) -> str:
    failing = {name for finding in errors for name in finding.spread.prompts}
    in_all, counted = corpus.in_all(report), corpus.failing(report, errors[0].dtype)
    if counted and in_all > 1:
        return f"{counted:,} of {count(in_all, 'prompt')} fail"
    if not failing:
        return f"{errors[0].kind} in the file" if errors[0].place.op == "weight" else errors[0].kind
    if in_all == 1:
        return "the prompt fails"
    clean = [quoted(each.name, 24) for each in report.run.prompts if each.name not in failing]
    but = f" (not {' and '.join(clean)})" if len(clean) in (1, 2) else ""
    return f"{len(failing)} of {in_all} prompts fail{but}"


def _on(finding: Finding) -> str:
    names = [quoted(name, 24) for name in finding.spread.prompts]
    return "on " + ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") if names else ""


def _least(report: Report, dtype: str) -> Iterator[str]:
    rows = report.headroom[dtype]
    if rows and math.isfinite(rows[0].headroom) and DTYPES[dtype].max < 1e30:
        yield f"least headroom {room(rows[0].headroom)}"


def _closer(report: Report, dtype: str) -> Iterator[str]:
    """How much nearer to fp32 than bf16: what fp16 is for."""
    times = times_nearer(report) if dtype == "fp16" else None
    if times is not None and times > 1:
        yield f"{times:.2g}x closer to fp32 than bf16"


def _of_a_text(report: Report, dtype: str, mine: list[Finding]) -> str:
    made = report.run.generation
    assert made is not None
    if mine:
        first = mine[0]
        rows = {finding.place.row for finding in mine if finding.place.row is not None}
        where = f"{len(rows)} of {len(made.rows)} rows" if len(made.rows) > 1 else "the text"
        step = f" at step {first.place.step}" if first.place.step is not None else ""
        if first.kind == "degenerate-text" and first.severity != "error":  # logits are repaired, a text is not
            return f"{where} says nothing from step {first.place.step} on ({first.kind}), with repaired logits"
        return f"{where} failed{step} ({first.kind})" + ("" if first.severity == "error" else ", repaired")
    watched = any(value is not None and value == value for row in made.rows for value in row.top1)
    return "all logits finite" if watched else "not watched"


# -- the first failure --------------------------------------------------------------------------------------------


def _unfinished(report: Report) -> Iterator[Fact]:
    if report.corpus is not None and report.stopped:
        said = report.stopped.removeprefix("not seen: ")
        yield Fact("Not seen", f"{said}; what was not reached is not judged")
        yield from (Fact("See it", each) for each in report.corpus.do[:1])
    elif report.stopped:
        yield Fact("Stopped", f"{report.stopped.rstrip('.')}; what was not reached is not judged")
    if report.run.unfinished:
        yield Fact("Not done", report.run.unfinished)


def _corpus(report: Report, dtype: str | None) -> Iterator[Fact]:
    """Of a folder of records: where the prompts fail, and how near the others are."""
    where = corpus.fails_at(report, dtype or "")
    if where:
        yield Fact("Prompts", where)
    spread = corpus.spread(report, dtype)
    if spread:
        yield Fact("Spread", f"headroom of a prompt in {dtype}: {spread}")


def _facts(report: Report, group: Group) -> Iterator[Fact]:
    first = group.first
    if first.place.op == "weight":
        yield Fact(_label(first), first.cause.sentence.rstrip("."))
        yield from _why(report, first)
        return
    where, far = ", ".join([_place(first), *_inside(report, first)]), how_far(first)
    short = first.magnitude.reference is None
    yield Fact(_label(first), f"{where}: {far}" if far and short else where)
    below = "; ".join(part for part in ("" if short else far, _too(group)) if part)
    if below:
        yield Fact("", below)
    rest = [each for each in grouped(report.findings) if each.first.severity == "error"]
    others = [each for each in rest if (each.where, each.first.kind) != (group.where, first.kind)]
    if others:
        yield Fact("Also", _others(others, first.dtype))
    yield from _why(report, first)
    excluded = list(dict.fromkeys(what for what, _ in ruled_out(report, first)))
    if excluded:
        yield Fact(RULED_OUT, ", ".join(excluded))
    if first.cause.done:
        yield Fact("Done", first.cause.done)


def _label(first: Finding) -> str:
    if first.place.op == "weight":
        return "Damage" if _is_damage(first) else "Weight"
    if first.severity == "warning" and first.place.step is None:
        return "Nearest" if first.kind == "near-overflow" else "Risk"
    return "Starts" if first.origin else "Where"


def _too(group: Group) -> str:
    """The other layers in which the same operation fails by itself."""
    rest = [str(layer) for layer in group.layers if layer != group.first.place.layer]
    if not rest:
        return ""
    if len(rest) > 5:
        return f"layers {', '.join(rest[:4])} and {len(rest) - 4} more too"
    return f"layers {', '.join(rest[:-1])} and {rest[-1]} too" if len(rest) > 1 else f"layer {rest[0]} too"


def _place(first: Finding) -> str:
    where = placed(first.place.layer, first.place.name)
    if first.place.step is not None and first.place.site is None:
        return f"step {first.place.step} of row {first.place.row}, {where}"
    return where


def _inside(report: Report, first: Finding) -> Iterator[str]:
    """Token, head, expert, channel; and of several prompts the worst."""
    yield from inside(first.place)
    place = first.place
    if place.prompt is not None and corpus.in_all(report) > 1:
        yield f"in {quoted(place.prompt, 24)}"


def _others(groups: Sequence[Group], dtype: str) -> str:
    said = [f"{each.first.kind} in {each.where}" for each in groups[:2]]
    said = [
        text if each.first.dtype == dtype else f"{text} ({each.first.dtype})"
        for text, each in zip(said, groups, strict=False)
    ]
    return "; ".join(said) + (f" and {len(groups) - 2} more" if len(groups) > 2 else "")


def _why(report: Report, first: Finding) -> Iterator[Fact]:
    if first.kind == "near-overflow":
        return  # what to do says it
    yield Fact("Why", why(first))
    if first.cause.tried:
        yield Fact("Tried", tried(report, first))


_EXPECTED = ("device", "memory", "attention", "arithmetic", "decoding")


def _notes(report: Report) -> Iterator[Fact]:
    """What a reader has to know of how it ran, and settings that make it worse."""
    notes = [
        f"{each.what} {each.value} ({each.reason})"
        for each in report.run.choices
        if each.what not in _EXPECTED and each.reason != "asked for"
    ]
    notes += [
        each.cause.sentence.rstrip(".")
        for each in report.findings
        if each.kind == "advice" and each.place.op == "setting"
    ]
    if notes:
        yield Fact("Note", "; ".join(notes))


def _logits(report: Report) -> Iterator[Fact]:
    """What is advised about them, where anything is: a line a dtype, one of memory, and what to do."""
    advised = [each for each in report.findings if each.kind == "advice" and each.place.op != "setting"]
    # What only code written by hand would lose has no line where there is more to say.
    advised = [each for each in advised if each.place.name != "logits, by hand"] or advised
    softmax = {each.dtype for each in advised if each.place.op == "softmax"}
    said = [logits.at_a_glance(dtype, each) for dtype, each in report.bought.items() if dtype in softmax]
    if any(each.place.op == "memory" for each in advised):
        said.append(logits.memory(report))
    if said:
        said.append(f"do: {logits.remedies(advised)}")
    yield from (Fact("" if number else "Logits", line) for number, line in enumerate(said))


def _rescued(report: Report) -> Iterator[Fact]:
    """What came of a rescue that was carried out, or why none can be."""
    plan = report.run.rescue
    made = plan.exported if plan is not None else None
    if plan is not None and not plan.possible and report.verdict.get(RESCUED) == "fail":
        yield Fact("No rescue", why_none(plan))
    if made is None:
        return
    if not made.verified:
        yield Fact("Rescue", f"NOT verified: {made.why}")
        return
    least = room(float(made.headroom)) if made.headroom is not None else "-"
    equal = "in fp32 the original's answer, bit for bit, before its weights were rounded"
    same = equal if made.identical else "not the original's answer in fp32"
    yield Fact("Rescued", f"{made.folder}: {made.verdict.upper()} in fp16, least headroom {least}; {same}")


_FEW = 3
"""Engines that are told one by one; of more, who fails and who does not."""


def _by_engine(report: Report) -> Iterator[Fact]:
    """What comes of it elsewhere."""
    if len(report.engines) > _FEW:
        yield Fact("Engines", engines.briefly(report.engines))
        return
    for each in report.engines:
        left = f"{room(each.headroom)} room" if each.headroom is not None else ""
        said = [engines.where(each), left, engines.lacks(each)]
        text = "; ".join(part for part in said if part)
        yield Fact("Engine", f"{each.engine.name} {each.verdict.upper()}: {text}")
        avoided = engines.avoided(report, each)
        if avoided:
            yield Fact("", avoided)


# -- room ---------------------------------------------------------------------------------------------------------


def _tightest(report: Report, dtype: str | None) -> Iterator[Fact]:
    """Of a healthy run the place that is nearest to a limit."""
    row = report.headroom[dtype][0] if dtype is not None and report.headroom[dtype] else None
    if row is None or not math.isfinite(row.headroom) or row.abs_max <= 0:
        return
    site = report.run.sites[row.site]
    where = placed(site.layer, name_of(site.module, site.op, site.call))
    limit = f"{dtype}'s limit is {number(row.headroom * row.abs_max)}"
    yield Fact("Tightest", f"{where}: {number(row.abs_max)}; {limit}: {room(row.headroom)} room")


def _rooms(report: Report, dtype: str) -> list[Room]:
    least: dict[int, float] = {}
    for row in report.tightest(dtype):
        layer = report.run.sites[row.site].layer
        if layer is not None:
            least[layer] = row.headroom
    layers = sorted(least)
    size = math.ceil(len(layers) / MOST_ROOMS) or 1
    parts = [layers[at : at + size] for at in range(0, len(layers), size)]
    return [
        Room(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}", min(least[layer] for layer in part))
        for part in parts
    ]
