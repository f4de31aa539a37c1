"""What to do next, each with the command that does it, from a judged run."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from qwen_precision.dtypes import RESCUED
from qwen_precision.judge import Group, Report, next_command, next_rescue, next_sweep, quoted_for_a_shell
from qwen_precision.record import Rescue
from qwen_precision.render.text import room
from qwen_precision.render.words.rescue import costs_briefly


class Step(NamedTuple):
    """Something to do: a command that stands alone on its line, or a sentence, or both."""

    label: str
    command: str
    said: str


def steps(report: Report, first: Group | None, record: str) -> Iterator[Step]:
    """The most useful first.

    Args:
        report: of one run.
        first: what the answer is about; None where nothing was found.
        record: where the run is saved, as a word of a command line, or empty.
    """
    yield from _repairs(report, first, record)
    sweep = next_sweep(report) if first is None or first.first.severity == "warning" else None
    if sweep is not None:
        yield Step("Go on", sweep, "tries every token as the first one: a few may go beyond what texts reach")
    if record:
        yield Step("More", f"qprec report {record}", "")
        if first is not None:
            yield Step("Share", f"qprec report {record} -o report.md", "")


def _repairs(report: Report, first: Group | None, record: str) -> Iterator[Step]:
    corpus = report.corpus
    if corpus is not None and corpus.record and report.verdict.get(RESCUED) == "fail" and not report.run.redacted:
        words = [report.run.model.source, "--prompts", corpus.record, "--dtype", RESCUED]
        command = " ".join(["qprec probe", *map(quoted_for_a_shell, words)])
        yield Step("Go on", command, "with the prompts of the block where it is worst: plans an exact rescue")
    exported = report.run.rescue.exported if report.run.rescue is not None else None
    if exported is not None and exported.kept and exported.verified:
        yield Step(
            "Use it",
            f"qprec generate {quoted_for_a_shell(exported.folder)} --dtype {exported.dtype}",
            "a plain checkpoint: transformers, vLLM (--dtype float16) and others load it as it is",
        )
        return
    known = record or report.record or "RUN"
    rescue, origin = next_rescue(report, known), next_command(report, known)
    if origin is not None:
        yield Step("Find it", origin, "where it starts, and why")
    if rescue is not None:
        yield Step("Fix it", rescue, _gain(report, report.run.rescue))
    others = [dtype for dtype, verdict in report.verdict.items() if verdict == "ok"]
    if first is not None and first.first.severity == "error" and rescue is None and origin is None:
        yield Step("Do", "", first.first.cause.advice)
    elif first is not None and first.first.severity == "error" and others and report.run.generation is None:
        yield Step("or", "", f"run it in {' or '.join(others)}")
    if first is not None and first.first.severity == "warning" and rescue is None and origin is None:
        yield Step("Do", "", first.first.cause.advice)


def _gain(report: Report, plan: Rescue | None) -> str:
    before = report.headroom.get(RESCUED) or []
    lost = costs_briefly(plan) if plan is not None else ""
    notes = [lost, "planned on this prompt alone" if len(report.run.prompts) == 1 else ""]
    more = "".join(f"; {note}" for note in notes if note)
    if plan is None or not before or not math.isfinite(before[0].headroom):
        return f"same answers in fp32, bit for bit{more}"
    least = f"in fp16 the least headroom {room(before[0].headroom)} becomes {room(plan.margin)} or more"
    return f"same answers in fp32; {least}{more}"
