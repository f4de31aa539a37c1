"""What differs from a baseline, in sentences; the table and the markdown both use it."""

from collections.abc import Iterator

from qwen_precision.judge import Changes, Finding
from qwen_precision.qwen3 import placed
from qwen_precision.render.text import count, room, safe
from qwen_precision.render.view import View

_MOST = 12


def change_lines(view: View) -> Iterator[str]:
    """Of each report that is compared: new findings first, then worse, better, fixed, and the least headroom."""
    for report, changes in zip(view.reports, view.changes, strict=False):
        head = f"{safe(report.name)}: " if len(view.reports) > 1 else ""
        yield from (f"{head}{line}" for line in _lines(changes))
    for name in view.gone:
        yield f"{safe(name)}: is in the baseline and not here"


def _lines(changes: Changes) -> Iterator[str]:
    name = f" {safe(changes.baseline.name)}" if changes.baseline.name else ""
    yield (
        f"against{name} of {safe(changes.baseline.run.created)}: {count(len(changes.new), 'new finding')}, "
        f"{len(changes.fixed)} fixed, {len(changes.changed)} changed"
    )
    yield from _some("new", [_place(finding) for finding in changes.new])
    for word, worse in (("worse", True), ("better", False)):
        yield from _some(
            word,
            [
                f"{_place(each.now)} ({_was(each.before)} -> {_was(each.now)})"
                for each in changes.changed
                if each.worse == worse
            ],
        )
    yield from _some("fixed", [_place(finding) for finding in changes.fixed])
    if changes.not_compared:
        yield f"not compared, because this run did not run or finish it: {', '.join(changes.not_compared)}"
    for dtype, (before, now) in changes.headroom.items():
        yield f"least headroom in {dtype}: {room(before)} -> {room(now)}"


def _some(word: str, lines: list[str]) -> Iterator[str]:
    yield from (f"{word}: {line}" for line in lines[:_MOST])
    if len(lines) > _MOST:
        yield f"{word}: and {len(lines) - _MOST} more"


def _place(finding: Finding) -> str:
    return f"{finding.dtype} {finding.kind}, {placed(finding.place.layer, safe(finding.place.name))}"


def _was(finding: Finding) -> str:
    return (
        f"{finding.severity}, headroom {room(finding.magnitude.headroom)}"
        if finding.magnitude.headroom
        else finding.severity
    )
