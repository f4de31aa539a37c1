"""Two runs of the same checkpoint: what is new, what is gone, what changed. Pure; no torch.

A finding is the same one if kind, dtype and place are the same; the token, the prompt and the numbers may differ.
"""

from dataclasses import dataclass

from qwen_precision.judge.findings import Finding, Report
from qwen_precision.settings import FAILING, SEVERITIES

_LEAST_CHANGE = 0.05
"""Share by which headroom must differ to count as changed: less is the noise of another machine's sums."""

Key = tuple[str, str, int | None, str, str, str, int | None]


@dataclass(frozen=True)
class Changed:
    """A finding of both runs that is not quite the same."""

    before: Finding
    now: Finding

    @property
    def worse(self) -> bool:
        """Whether it is a failure now and was none, or has less headroom."""
        if self.now.severity != self.before.severity:
            return SEVERITIES.index(self.now.severity) > SEVERITIES.index(self.before.severity)
        return (self.now.magnitude.headroom or 0) < (self.before.magnitude.headroom or 0)


@dataclass(frozen=True)
class Changes:
    """What a report has that its baseline had not, and the other way round."""

    baseline: Report
    new: tuple[Finding, ...]
    fixed: tuple[Finding, ...]
    not_compared: tuple[str, ...]
    """Dtypes of the baseline that this run did not run, or did not finish: nothing is known to be fixed there."""
    changed: tuple[Changed, ...]
    headroom: dict[str, tuple[float, float]]
    """By dtype: the least headroom of the baseline and of the report."""

    @property
    def risen(self) -> tuple[Finding, ...]:
        """Findings that were there, and are more severe now."""
        return tuple(each.now for each in self.changed if each.worse and each.now.severity != each.before.severity)

    def exit_code(self, fail_on: str) -> int:
        """1 if something is new, or became a failure, at or above ``fail_on``; else 0."""
        return int(any(finding.severity in FAILING[fail_on] for finding in [*self.new, *self.risen]))


def changes(baseline: Report, report: Report) -> Changes:
    """Compare a report with an older one."""
    before = {_key(finding): finding for finding in baseline.findings}
    now = {_key(finding): finding for finding in report.findings}
    changed = [Changed(before[key], now[key]) for key in now if key in before and _differ(before[key], now[key])]
    room = {}
    for dtype, rows in report.headroom.items():
        older = baseline.headroom.get(dtype)
        if rows and older:
            room[dtype] = (older[0].headroom, rows[0].headroom)
    unknown = [name for name in baseline.verdict if name not in report.verdict or report.stopped]
    return Changes(
        baseline=baseline,
        new=tuple(f for key, f in now.items() if key not in before),
        fixed=tuple(f for key, f in before.items() if key not in now and f.dtype not in unknown),
        not_compared=tuple(unknown),
        changed=tuple(changed),
        headroom=room,
    )


def _key(finding: Finding) -> Key:
    # An operation that was near the limit and is beyond it now is the same one, worse.
    kind = "range" if finding.kind in ("overflow", "nan", "near-overflow") else finding.kind
    place = finding.place
    return kind, finding.dtype, place.layer, place.module, place.op, place.name, place.row


def _differ(before: Finding, now: Finding) -> bool:
    if before.severity != now.severity:
        return True
    older, newer = before.magnitude.headroom, now.magnitude.headroom
    return older is not None and newer is not None and abs(newer - older) > _LEAST_CHANGE * max(older, newer)
