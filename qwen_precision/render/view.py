"""What a renderer is given: one or several reports, what they are compared with, and how wide the terminal is."""

import re
from dataclasses import dataclass

from qwen_precision.judge import Changes, Report, exit_code_of


@dataclass(frozen=True)
class View:
    """Everything that is to be shown."""

    reports: tuple[Report, ...]
    fail_on: str = "fail"
    changes: tuple[Changes, ...] = ()
    """Against a baseline, of each report; then what is new decides the exit code."""
    gone: tuple[str, ...] = ()
    """Checkpoints of the baseline that are not among the reports."""
    record: str = ""
    """Where the only run of it is saved, as a word of a command line, for the commands that are named."""
    width: int = 80
    colour: bool = False

    @property
    def exit_code(self) -> int:
        """The worst of all reports: 1 before 3 before 0; the same for every format."""
        if self.changes:
            codes = {each.exit_code(self.fail_on) for each in self.changes}
            codes |= {3 for report in self.reports if report.stopped}
        else:
            codes = {exit_code_of(report, self.fail_on) for report in self.reports}
        return 1 if 1 in codes else max(codes, default=0)

    @property
    def shown(self) -> Report:
        """Of several, the one that a format shows which has room for one: the first that fails, else the first."""
        return next((each for each in self.reports if "fail" in each.verdict.values()), self.reports[0])

    def against(self, report: Report) -> Changes | None:
        """What is new in one of the reports; None where nothing is compared."""
        pairs = zip(self.reports, self.changes, strict=False)
        return next((changes for each, changes in pairs if each is report), None)


def one(report: Report, fail_on: str = "fail") -> View:
    """A view of a single report."""
    return View((report,), fail_on)


def record_of(report: Report) -> str:
    """The file that a command reads the prompts of a report from."""
    return report.corpus.record if report.corpus is not None else report.record or report.name or "run.json"


def model_named(report: Report) -> str:
    """The model in a title: its hub id, or the last two parts of its folder. A stranger's words are still in it."""
    parts = [part for part in re.split(r"[\\/]", report.run.model.source) if part]
    return "/".join(parts[-2:])
