"""Markdown for a bug report: what maintainers ask for, in the order in which they read it.

Model and revision, dtype, the first failing operation, findings, the command to run again, prompts and token ids,
environment. GitHub takes 65,536 characters: sections are cut from the least important up, and that is said. Strings
from strangers are inert: no markup, no HTML, no mention, no issue link.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge import Finding, Report, headroom_gains, precision, same_again
from qwen_precision.qwen3 import name_of
from qwen_precision.render.text import count, number, room, safe
from qwen_precision.render.view import View
from qwen_precision.render.words import rescue as words
from qwen_precision.render.words import why
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.notseen import not_seen

LONGEST = 65_000
"""Characters; GitHub's limit is 65,536."""

_FINDINGS = 40
_IDS = 400
_MOVED = 12
"""Operations whose headroom before and after a rescue is shown."""


@dataclass(frozen=True)
class _Section:
    weight: int
    """The least important is cut first."""
    name: str
    text: str


def render_markdown(view: View) -> str:
    """All reports, one after another; cut to what GitHub takes."""
    sections = [section for report in view.reports for section in _sections(report)]
    if view.changes is not None:
        lines = [f"- {escaped(line)}" for line in change_lines(view.changes)]
        sections.insert(0, _Section(100, "changes", "## Against the baseline\n\n" + "\n".join(lines)))
    dropped: list[str] = []
    while sum(len(each.text) + 2 for each in sections) > LONGEST and len(sections) > 1:
        least = min(sections, key=lambda each: (each.weight, -len(each.text)))
        sections.remove(least)
        dropped.append(least.name)
    text = "\n\n".join(each.text for each in sections)
    if dropped:
        names = ", ".join(dict.fromkeys(dropped))
        text = text[: LONGEST - 200] + f"\n\n*Left out to stay below GitHub's 65,536 characters: {names}.*"
    return text + "\n"


def escaped(text: str, longest: int = 300) -> str:
    """Plain text inside Markdown: nothing of it is markup, a mention or a link."""
    shown = safe(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"([\\`*_{}\[\]()#!|~^$])", r"\\\1", shown)
    return shown.replace("@", "&#64;").replace("://", ":&#8203;//").replace("www.", "www&#46;")


def fenced(text: str, longest: int = 20_000) -> str:
    """A code block with a fence that the text cannot close."""
    shown = "\n".join(safe(line, longest) for line in text[:longest].split("\n"))
    ticks = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _details(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _sections(report: Report) -> Iterator[_Section]:
    yield _Section(100, "verdict", _head(report))
    findings: list[tuple[int, str, Callable[[Report], str]]] = [
        (90, "findings", _findings),
        (88, "control runs", _controls),
        (80, "generated text", _texts),
        (85, "command", _command),
        (60, "trips", _trips),
        (70, "environment", _environment),
        (50, "prompts", _prompts),
        (40, "headroom", _headroom),
        (45, "choices", _choices),
        (65, "precision", _precision),
        (87, "rescue", _rescue),
        (75, "triggers", _triggers),
    ]
    for weight, name, make in findings:
        text = make(report)
        if text:
            yield _Section(weight, name, text)


def _head(report: Report) -> str:
    run, model = report.run, report.run.model
    title = f"# qprec {run.verb}: {escaped(model.source)}" + (f" ({escaped(report.name)})" if report.name else "")
    revision = f" at {escaped(model.revision, 60)}" if model.revision else ""
    lines = [
        title,
        "",
        f"{escaped(model.architecture)}{revision}, {model.layers} layers, {model.parameters:,} parameters stored as "
        f"{escaped(model.source_dtype)}; {escaped(run.tool)}, {escaped(run.created)}.",
        "",
        "| dtype | verdict | first |",
        "|---|---|---|",
    ]
    for dtype, verdict in report.verdict.items():
        first = next((f for f in report.findings if f.dtype == dtype and f.severity != "info"), None)
        lines.append(f"| {dtype} | **{verdict.upper()}** | {_place(first) if first else '-'} |")
    lines += ["", *(escaped(line, 400) for line in not_seen(report))]
    if report.stopped:
        lines += ["", f"**Stopped early:** {escaped(report.stopped)}. What was not reached is not judged."]
    if report.run.unfinished:
        lines += ["", f"**Not finished:** {escaped(report.run.unfinished)}."]
    return "\n".join(lines)


def _place(finding: Finding) -> str:
    layer = f"layer {finding.place.layer}: " if finding.place.layer is not None else ""
    step = f"step {finding.place.step}, row {finding.place.row}: " if finding.place.step is not None else ""
    return f"{step}{layer}{escaped(finding.place.name)} ({escaped(finding.kind)})"


def _findings(report: Report) -> str:
    if not report.findings:
        return "## Findings\n\nNone."
    lines = ["## Findings", ""]
    for position, finding in enumerate(report.findings[:_FINDINGS], 1):
        lines.append(f"{position}. **{finding.severity}**, {finding.dtype}, {_place(finding)}")
        lines += [f"   - {fact}" for fact in _facts(report, finding)]
    if len(report.findings) > _FINDINGS:
        lines.append(f"\n… and {len(report.findings) - _FINDINGS} more.")
    return "\n".join(lines)


def _facts(report: Report, finding: Finding) -> Iterator[str]:
    if (finding.place.step is None or finding.origin) and finding.kind != "advice":
        yield f"where: {escaped(finding.place.module)}, {escaped(finding.place.op)}"
    if finding.magnitude.reference is not None:
        size = finding.magnitude
        yield f"magnitude in fp32: {number(size.reference)}, headroom {room(size.headroom)}"
    if finding.place.token is not None:
        token = finding.place.token
        what = "padding" if token.padding else f"id {token.id} “{escaped(str(token.text), 60)}”"
        channel = f", channel {finding.place.channel}" if finding.place.channel is not None else ""
        yield f"token {token.position} of row {token.row} ({what}){channel}"
    if finding.place.key is not None:
        key = finding.place.key
        yield f"key of token {key.position} (id {key.id} “{escaped(str(key.text), 60)}”)"
    if finding.magnitude.nan or finding.magnitude.inf:
        later = "later operation" if finding.place.step is None else "later step"
        size = finding.magnitude
        yield f"{size.inf:,} inf, {size.nan:,} NaN, passed on by {count(finding.spread.propagated, later)}"
    yield f"cause: {escaped(finding.cause.sentence, 600)}"
    if finding.cause.kind is not None:
        yield f"because: {escaped(why.because(finding))}"
    yield from (f"evidence: {escaped(line)}" for line in finding.cause.evidence)
    yield from (f"{key}: {escaped(line)}" for key, line in why.microscope(report, finding))
    yield f"advice: {escaped(finding.cause.advice, 600)}"


def _controls(report: Report) -> str:
    """The same prompts in the other dtypes, run beside it: what a maintainer asks for first."""
    run = report.run
    if run.generation is not None or not run.passes:
        return ""
    lines = []
    for dtype in dict.fromkeys(each.dtype for each in run.passes):
        mine = [each for each in run.passes if each.dtype == dtype]
        bad = sum(any(event.nan or event.inf for event in each.events) for each in mine)
        what = (
            f"not finite on {bad} of {count(len(mine), 'prompt')}"
            if bad
            else (f"every operation finite on {count(len(mine), 'prompt')}")
        )
        lines.append(f"- {dtype}{' (the reference)' if dtype == REFERENCE else ''}: {what}")
    changed = [f"- {escaped(line)}" for line in why.controls(report)]
    changed = ["", "A failing row, changed in one way:", "", *changed] if changed else []
    head = "## Control runs\n\nThe same weights, prompts and attention in each dtype:\n\n"
    return head + "\n".join([*lines, *changed])


def _triggers(report: Report) -> str:
    """What a sweep found, and massive activations."""
    found = [
        ("Sweep", list(why.triggers(report.run))),
        ("Massive activations in fp32", list(why.massive(report))),
    ]
    return "\n\n".join(
        f"## {title}\n\n" + "\n".join(f"- {escaped(line)}" for line in lines) for title, lines in found if lines
    )


def _command(report: Report) -> str:
    return "## Run it again\n\n" + fenced(same_again(report.run, report.name or "run.json"))


def _texts(report: Report) -> str:
    made = report.run.generation
    if made is None:
        return ""
    lines = ["## Generated", ""]
    for row in made.rows[:20]:
        stretches = ", ".join(f"{each.way} from step {each.start}" for each in row.stretches[:8])
        lines += [
            f"Row {row.row}: {count(len(row.ids), 'token')}, {escaped(row.finish)}; {stretches}",
            fenced(f"{row.input[:500]}\n----\n{row.text[:2000]}"),
            "",
        ]
    return "\n".join(lines)


def _trips(report: Report) -> str:
    made = report.run.generation
    if made is None or not made.trips:
        return ""
    rows = ["| step | row | dtype | guard | what | why |", "|---|---|---|---|---|---|"]
    for trip in made.trips[:40]:
        done = "" if trip.acted or trip.guard == "watch" else " (only reported)"
        rows.append(
            f"| {trip.step} | {trip.row} | {trip.dtype} | {escaped(trip.guard)} | {trip.kind}{done} | "
            f"{escaped(trip.why)} |"
        )
    more = f"\n\n… and {len(made.trips) - 40} more." if len(made.trips) > 40 else ""
    return _details(f"Trips ({len(made.trips)})", "\n".join(rows) + more)


def _environment(report: Report) -> str:
    rows = [f"| {escaped(key, 60)} | {escaped(value)} |" for key, value in report.run.environment.items()]
    return "## Environment\n\n| what | value |\n|---|---|\n" + "\n".join(rows)


def _choices(report: Report) -> str:
    rows = [f"| {escaped(c.what)} | {escaped(c.value)} | {escaped(c.reason)} |" for c in report.run.choices]
    return _details("Choices", "| what | value | reason |\n|---|---|---|\n" + "\n".join(rows)) if rows else ""


def _prompts(report: Report) -> str:
    parts = []
    for prompt in report.run.prompts:
        for number_, row in enumerate(prompt.rows):
            ids = " ".join(map(str, row.ids[:_IDS])) + (f" … ({len(row.ids)} in all)" if len(row.ids) > _IDS else "")
            head = f"**{escaped(prompt.name)}**, row {number_}, {count(len(row.ids), 'token')}"
            parts.append(f"{head}, padded on the left by {row.padding}\n\n{fenced(row.text[:2000])}\n\n{fenced(ids)}")
    return _details("Prompts and token ids", "\n\n".join(parts)) if parts else ""


def _precision(report: Report) -> str:
    rows = [
        f"| {dtype} | {number(each.layers[-1]) if each.layers and each.layers[-1] is not None else '-'} | "
        f"{each.agree} of {each.rows} | {number(each.kl)} | {number(each.logprob)} |"
        for dtype, each in precision(report.run).items()
    ]
    head = "## Precision against fp32\n\n| dtype | relative error after last layer | same top-1 | KL at most | "
    head += "log-probability error |\n|---|---|---|---|---|\n"
    closer = why.nearer(report)
    return head + "\n".join([*rows, *(["", escaped(closer)] if closer else [])]) if rows else ""


def _rescue(report: Report) -> str:
    """The plan that makes it safe in fp16, and what was proven of it."""
    plan = report.run.rescue
    if plan is None:
        return ""
    lines = ["## Rescue", "", escaped(words.headline(plan), 600), ""]
    lines += [f"- {escaped(line)}" for line in words.factors(plan)]
    if not plan.rescaling.changes_nothing:
        lines += ["", "| operation | layer | headroom before | after |", "|---|---|---|---|"]
        lines += [
            f"| {escaped(row.name)} | {'-' if row.layer is None else row.layer} | {room(row.before)} | "
            f"{room(row.after)} |"
            for row in headroom_gains(report.run)[:_MOVED]
        ]
        lines += ["", escaped(words.costs(report, plan), 600)]
    lines += (
        ["", "What no factor moves:", "", *(f"- {escaped(line)}" for line in words.stuck(plan))] if plan.stuck else []
    )
    if plan.exported is not None:
        lines += ["", *(f"- {key}: {escaped(value, 600)}" for key, value in words.proof(report, plan.exported))]
    return "\n".join(lines)


def _headroom(report: Report) -> str:
    parts = []
    for dtype, rows in report.headroom.items():
        if not rows or dtype not in ("fp16",):
            continue
        lines = [f"**{dtype}**", "", "| layer | operation | largest | headroom |", "|---|---|---|---|"]
        for row in report.tightest(dtype):
            site = report.run.sites[row.site]
            lines.append(
                f"| {'-' if site.layer is None else site.layer} | "
                f"{escaped(name_of(site.module, site.op, site.call))} | {number(row.abs_max)} | "
                f"{room(row.headroom)} |"
            )
        parts.append("\n".join(lines))
    return _details("Headroom, tightest operation of each layer", "\n\n".join(parts)) if parts else ""
