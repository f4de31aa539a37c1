"""Which control runs would tell the causes of a failure apart: planned from a judged run, made elsewhere. No torch.

A control is the failing row changed in one way, in the same dtype. Only the first origin of each dtype is asked about:
what follows it in the same stream has the same trigger.
"""

from collections.abc import Iterator
from typing import NamedTuple

from qwen_precision.dtypes import REFERENCE
from qwen_precision.evidence import ControlKind
from qwen_precision.findings import Finding, Report
from qwen_precision.record import Prompt, Row, Run

KINDS = ("overflow", "nan")
"""Findings that controls can say something about."""


class Planned(NamedTuple):
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


def is_scores(module: str, op: str, call: int) -> bool:
    """Whether an operation is the scores of eager attention: a product, then scaled, then masked."""
    return module.endswith("self_attn") and (op, call) in {("matmul", 0), ("mul", 4), ("add", 2)}


def planned(report: Report) -> list[Planned]:
    """Controls of every dtype that failed, the most telling first; none of them is the failing run itself again."""
    found: list[Planned] = []
    for dtype in report.verdict:
        first = next((each for each in report.findings if each.dtype == dtype and _askable(each)), None)
        prompt = next((each for each in report.run.prompts if first and each.name == first.prompt), None)
        if first is None or prompt is None:
            continue
        seen: set[tuple[int, ...]] = set()
        for each in _of(report.run, first, prompt):
            if each.attention is None and each.ids in seen:
                continue
            seen.add(each.ids)
            found.append(each)
    return found


def failing_rows(report: Report) -> Iterator[tuple[str, str, list[int]]]:
    """Dtype, name of the prompt and token ids of the first failing row of each dtype."""
    for dtype in report.verdict:
        first = next((each for each in report.findings if each.dtype == dtype and _askable(each)), None)
        prompt = next((each for each in report.run.prompts if first and each.name == first.prompt), None)
        if first is not None and prompt is not None:
            yield dtype, prompt.name, prompt.rows[int((first.token or {}).get("row") or 0)].ids


def _askable(finding: Finding) -> bool:
    return (
        finding.kind in KINDS and finding.severity == "error" and not finding.predicted and finding.dtype != REFERENCE
    )


def _of(run: Run, finding: Finding, prompt: Prompt) -> Iterator[Planned]:
    number = int((finding.token or {}).get("row") or 0)
    row = prompt.rows[number]

    def control(what: ControlKind, ids: list[int], detail: str, attention: str | None = None) -> Planned:
        place = None if attention or what == "row alone" else int((finding.token or {}).get("position") or 0)
        return Planned(what, finding.dtype, prompt.name, number, tuple(ids), detail, place, attention)

    site = next((s for s in run.sites if s.module == finding.module and s.op == finding.op), None)
    eager = any(is_scores(s.module, s.op, s.call) for s in run.sites)
    if eager and site is not None and finding.module.endswith("self_attn"):
        yield control("sdpa", row.ids, "the same tokens with sdpa attention", "sdpa")
    if len(prompt.rows) > 1:
        yield control("row alone", row.ids, "the same row without the batch and its padding")
    yield from (each for each in _tokens(finding, row, control) if len(prompt.rows) > 1 or list(each.ids) != row.ids)


def _tokens(finding: Finding, row: Row, control: object) -> Iterator[Planned]:
    token = finding.token
    if token is None or token["padding"] or not callable(control):
        return
    place = int(token["position"] or 0) - row.padding
    text = f"token {place}"
    yield control("token alone", row.ids[place : place + 1], f"{text} alone")
    if place == 0 and len(row.ids) > 1:
        yield control("without the first token", row.ids[1:], f"the row without {text}")
    if place > 0:
        yield control("token after the first", [row.ids[0], row.ids[place]], f"{text} right after the first token")
        yield control("before the token", row.ids[:place], f"the {place} tokens before {text}")
        if place + 1 < len(row.ids):
            yield control("up to the token", row.ids[: place + 1], f"the first {place + 1} tokens, up to {text}")
