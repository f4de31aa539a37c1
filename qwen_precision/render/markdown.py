"""Markdown for a bug report: what maintainers ask for, in the order in which they read it.

First what one screen says, what it is not, how to see it again, the environment: a section for each field of the issue
templates of transformers, vLLM and SGLang. All else is folded below. GitHub takes 65,536 characters: sections are cut
from the least important up, and that is said. Strings from strangers are inert: no markup, no HTML, no mention, no
issue link.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge import Report, grouped, headroom_gains, same_again
from qwen_precision.qwen3 import name_of
from qwen_precision.render.repro.script import render_repro
from qwen_precision.render.text import count, number, ranges, room, safe
from qwen_precision.render.view import View, one, record_of
from qwen_precision.render.words import engines, logits, why
from qwen_precision.render.words import rescue as words
from qwen_precision.render.words.answer import RULED_OUT, Answer, answer
from qwen_precision.render.words.changes import change_lines
from qwen_precision.render.words.continuation import went
from qwen_precision.render.words.corpus import across, beside
from qwen_precision.render.words.finding import COUNTED, facts
from qwen_precision.render.words.notseen import not_seen
from qwen_precision.render.words.time import time_words

LONGEST = 65_000
"""Characters; GitHub's limit is 65,536."""

_FINDINGS = 40
_IDS = 400
_TRIPS = 40
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
    if view.changes:
        lines = [f"- {escaped(line)}" for line in change_lines(view)]
        sections.insert(0, _Section(100, "changes", "## Against the baseline\n\n" + "\n".join(lines)))
    table = _side_by_side(view.reports)
    if table:
        sections.insert(0, _Section(100, "side by side", table))
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


_LINKS = re.compile(r"@|\\#(?=\d)|\bGH-(?=\d)|\b[0-9a-f]{7}(?=[0-9a-f]{33}\b)", re.IGNORECASE)
"""What GitHub makes a link of, whatever stands in front of it or for it (cmark-gfm#181): people, issues, commits. A
space of no width after it is what stops that."""


def escaped(text: str, longest: int = 300) -> str:
    """Plain text inside Markdown: nothing of it is markup, a mention or a link."""
    shown = safe(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"([\\`*_{}\[\]()#!|~^$])", r"\\\1", shown)
    shown = _LINKS.sub(lambda found: f"{found[0]}&#8203;", shown)
    return shown.replace("://", ":&#8203;//").replace("www.", "www&#46;")


def fenced(text: str, longest: int = 20_000, language: str = "text") -> str:
    """A code block with a fence that the text cannot close."""
    shown = "\n".join(safe(line, longest) for line in text[:longest].split("\n"))
    ticks = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def _sections(report: Report) -> Iterator[_Section]:
    told = answer(report)
    yield _Section(100, "verdict", _head(report, told))
    sections: list[tuple[int, str, str]] = [
        (95, "what to do", _steps(told)),
        (94, "all prompts", _across(report)),
        (92, "engines", _engines(report)),
        (88, "what it is not", _ruled_out(told)),
        (85, "reproduction", _reproduction(report)),
        (70, "environment", _environment(report)),
        (90, "findings", _folded(f"All findings ({len(grouped(report.findings))})", _findings(report))),
        (87, "rescue", _folded("Rescue", _rescue(report))),
        (80, "generated text", _folded("Generated text", _texts(report))),
        (60, "trips", _trips(report)),
        (78, "control runs", _folded("Control runs", _controls(report))),
        (75, "triggers", _folded("Triggers", _triggers(report))),
        (65, "precision", _folded("Precision against fp32", _precision(report))),
        (62, "logits", _folded("Float32 logits: what they buy, what they cost", _logits(report))),
        (40, "headroom", _folded("Headroom, tightest operation of each layer", _headroom(report))),
        (50, "prompts", _folded("Prompts and token ids", _prompts(report))),
        (45, "choices", _folded("Choices and weight files", _choices(report))),
    ]
    yield from (_Section(weight, name, text) for weight, name, text in sections if text)


def _folded(title: str, text: str) -> str:
    """A section that is opened by whoever wants it."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def _head(report: Report, told: Answer) -> str:
    """The first screen: what ran, the verdicts, the first failure. "Describe the bug", in most templates."""
    model = report.run.model
    title = f"# {escaped(told.title)}" + (f" ({escaped(report.name)})" if report.name else "")
    ran = f"{escaped(told.ran)}; {model.parameters:,} parameters; {escaped(report.run.tool)}"
    lines = [title, "", f"{ran}, {escaped(report.run.created)}.", "", "| dtype | verdict | |", "|---|---|---|"]
    lines += [f"| {each.dtype} | **{each.verdict.upper()}** | {escaped(each.said)} |" for each in told.verdicts]
    lines.append("")
    for fact in told.facts:
        if fact.label == RULED_OUT:
            continue  # a section of its own
        lines.append(f"- **{fact.label}**: {escaped(fact.text, 600)}" if fact.label else f"  {escaped(fact.text, 600)}")
    lines += [
        "",
        *(escaped(line, 400) for line in not_seen(report)),
        "",
        COUNTED,
    ]
    return "\n".join(lines).rstrip()


def _steps(told: Answer) -> str:
    parts = []
    for step in told.steps:
        said = escaped(f"{step.label}: {step.said}" if step.said else step.label, 500)
        parts.append(f"{said}\n\n{fenced(step.command)}" if step.command else said)
    return "## What to do\n\n" + "\n\n".join(parts) if parts else ""


def _across(report: Report) -> str:
    """Of a folder of records: who fails where, and how near the others are."""
    lines = [f"- **{escaped(label)}**: {escaped(said, 800)}" for label, said in across(report)]
    return "## All prompts\n\n" + "\n".join(lines) if lines else ""


def _side_by_side(reports: tuple[Report, ...]) -> str:
    """A row a checkpoint of a folder."""
    head, *rows = beside(reports) or [[]]
    lines = [f"| {' | '.join(escaped(word) for word in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if rows else ""


def _engines(report: Report) -> str:
    """A row an engine that was asked about."""
    if not report.engines:
        return ""
    lines = ["| engine | verdict | headroom | where | avoided by |", "|---|---|---|---|---|"]
    for each in report.engines:
        told = "; ".join(part for part in (engines.where(each), engines.lacks(each)) if part)
        lines.append(
            f"| {escaped(each.engine.name, 40)} | **{each.verdict.upper()}** | {room(each.headroom)} | "
            f"{escaped(told, 500)} | {escaped(engines.avoids(report, each), 400)} |"
        )
    notes = [each.engine for each in report.engines if each.engine.note]
    said = [f"- **{escaped(each.name, 40)}**: {escaped(each.note, 500)}" for each in notes]
    return "## Engines\n\n" + "\n".join([*lines, *([""] if said else []), *said])


def _ruled_out(told: Answer) -> str:
    """What the first failure is not: what a maintainer would ask next."""
    lines = [f"- {escaped(what)}: {escaped(how)}" for what, how in told.ruled_out]
    return "## Ruled out\n\n" + "\n".join(lines) if lines else ""


def _reproduction(report: Report) -> str:
    """Command, and what should have happened."""
    good = [dtype for dtype, verdict in report.verdict.items() if verdict == "ok"]
    expected = (
        f"Finite numbers, as in {' and '.join(good)} with the same weights and tokens." if good else "Finite numbers."
    )
    return (
        "## Reproduction\n\n"
        + fenced(same_again(report.run, record_of(report)))
        + _folded_script(report)
        + f"\n\n## Expected behaviour\n\n{expected}"
    )


def _folded_script(report: Report) -> str:
    """The same with nothing but torch and transformers; a redacted run, or one that never began, has nothing for it."""
    if (
        report.run.redacted
        or not report.run.dtypes
        or not any(row.ids for prompt in report.run.prompts for row in prompt.rows)
    ):
        return ""
    script = fenced(render_repro(one(report)).rstrip(), language="python")
    return "\n\n" + _folded("The same as a script of torch and transformers", script)


def _findings(report: Report) -> str:
    groups = grouped(report.findings)
    lines = []
    for position, group in enumerate(groups[:_FINDINGS], 1):
        first = group.first
        lines.append(f"{position}. **{first.severity}**, {first.dtype}, {escaped(first.kind)}, {escaped(group.where)}")
        lines += [f"   - {key + ': ' if key else ''}{escaped(line, 600)}" for key, line in facts(report, group)]
        lines.append(f"   - advice: {escaped(first.cause.advice, 600)}")
    if len(groups) > _FINDINGS:
        lines.append(f"\n… and {len(groups) - _FINDINGS} more.")
    return "\n".join(lines)


def _controls(report: Report) -> str:
    """The same prompts in the other dtypes, run beside it: what a maintainer asks for first."""
    run = report.run
    if run.generation is not None or not run.passes:
        return ""
    lines = []
    for dtype in dict.fromkeys(each.dtype for each in run.passes):
        mine = [each for each in run.passes if each.dtype == dtype]
        bad = sum(any(event.nan or event.inf for event in each.events) for each in mine)
        prompts = count(len(mine), "prompt")
        what = f"not finite on {bad} of {prompts}" if bad else f"every operation finite on {prompts}"
        lines.append(f"- {dtype}{' (the reference)' if dtype == REFERENCE else ''}: {what}")
    changed = [f"- {escaped(line)}" for line in why.controls(report)]
    changed = ["", "A failing row, changed in one way:", "", *changed] if changed else []
    return "The same weights, prompts and attention in each dtype:\n\n" + "\n".join([*lines, *changed])


def _triggers(report: Report) -> str:
    """What a sweep found, and massive activations."""
    found = [
        ("Sweep", list(why.triggers(report.run))),
        ("Massive activations in fp32", list(why.massive(report))),
    ]
    return "\n\n".join(
        f"**{title}**\n\n" + "\n".join(f"- {escaped(line)}" for line in lines) for title, lines in found if lines
    )


def _texts(report: Report) -> str:
    made = report.run.generation
    if made is None:
        return ""
    lines = []
    for row in made.rows[:20]:
        lines += [
            f"Row {row.row}: {escaped(went(row))}",
            fenced(f"{row.input[:500]}\n----\n{row.text[:2000]}"),
            "",
        ]
    return "\n".join(lines)


def _trips(report: Report) -> str:
    made = report.run.generation
    if made is None or not made.trips:
        return ""
    steps: dict[str, list[int]] = {}
    for trip in made.trips:
        done = "" if trip.acted or trip.guard == "watch" else " (only reported)"
        same = f"{trip.row} | {trip.dtype} | {escaped(trip.guard)} | {trip.kind}{done} | {escaped(trip.why)}"
        steps.setdefault(same, []).append(trip.step)
    rows = ["| steps | row | dtype | guard | what | why |", "|---|---|---|---|---|---|"]
    rows += [f"| {ranges(held)} | {same} |" for same, held in list(steps.items())[:_TRIPS]]
    more = f"\n\n… and {len(steps) - _TRIPS} more." if len(steps) > _TRIPS else ""
    return _folded(f"Trips ({len(made.trips)})", "\n".join(rows) + more)


def _environment(report: Report) -> str:
    """As ``transformers env`` prints it, and what it leaves out."""
    known = report.run.environment
    named = [
        ("`transformers` version", "transformers"),
        ("Platform", "platform"),
        ("Python version", "python"),
        ("Huggingface_hub version", "huggingface_hub"),
        ("Safetensors version", "safetensors"),
        ("PyTorch version", "torch"),
    ]
    lines = [f"- {label}: {escaped(known[key])}" for label, key in named if key in known]
    lines += [
        f"- {escaped(key, 60)}: {escaped(value)}"
        for key, value in known.items()
        if key not in {each for _, each in named}
    ]
    return "## Environment\n\n" + "\n".join(lines)


def _choices(report: Report) -> str:
    files = [
        f"- {escaped(each.name)}: {each.bytes:,} bytes, SHA-256 {each.sha256 or 'not computed'}"
        for each in report.run.model.files
    ]
    rows = [f"| {escaped(c.what)} | {escaped(c.value)} | {escaped(c.reason)} |" for c in report.run.choices]
    table = "| what | value | reason |\n|---|---|---|\n" + "\n".join(rows) if rows else ""
    took = time_words(report.run)
    time = f"Time: {escaped(took)}" if took else ""
    return "\n\n".join(part for part in (table, "\n".join(files), time) if part)


def _prompts(report: Report) -> str:
    parts = []
    for prompt in report.run.prompts:
        for number_, row in enumerate(prompt.rows):
            ids = " ".join(map(str, row.ids[:_IDS])) + (f" … ({len(row.ids)} in all)" if len(row.ids) > _IDS else "")
            head = f"**{escaped(prompt.name)}**, row {number_}, {count(len(row.ids), 'token')}"
            parts.append(f"{head}, padded on the left by {row.padding}\n\n{fenced(row.text[:2000])}\n\n{fenced(ids)}")
    return "\n\n".join(parts)


def _precision(report: Report) -> str:
    rows = [
        f"| {dtype} | {number(each.layers[-1]) if each.layers and each.layers[-1] is not None else '-'} | "
        f"{f'{each.agree} of {each.rows}' if each.rows else '-'} | {number(each.kl)} | {number(each.logprob)} |"
        for dtype, each in report.precision.items()
    ]
    head = "| dtype | relative error after last layer | same top-1 | KL at most | "
    head += "log-probability error |\n|---|---|---|---|---|\n"
    closer = why.nearer(report)
    return head + "\n".join([*rows, *(["", escaped(closer)] if closer else [])]) if rows else ""


def _logits(report: Report) -> str:
    """What a softmax in float32 is worth, and what logits take."""
    parts = ["\n".join(f"- {escaped(line, 600)}" for line in logits.saved(report))]
    parts += [f"**{escaped(part.title)}**\n\n{_table(list(part.head), part.rows)}" for part in logits.tables(report)]
    parts.append("\n".join(escaped(line, 600) for line in logits.notes(report)))
    return "\n\n".join(part for part in parts if part)


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(each if each == "---" else escaped(each) for each in line) + " |" for line in lines
    )


def _rescue(report: Report) -> str:
    """The plan that makes it safe in fp16, and what was proven of it."""
    plan = report.run.rescue
    if plan is None:
        return ""
    lines = [escaped(words.headline(plan), 600), ""]
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
    return "\n\n".join(parts)
