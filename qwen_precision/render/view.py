"""What a renderer is given: one or several reports, what they are compared with, and how wide the terminal is."""

import re
from dataclasses import dataclass

from qwen_precision.judge import Changes, Report, exit_code_of


@dataclass(frozen=True)
class View:
    """Everything that is to be shown."""

    reports: tuple[Report, ...]
    fail_on: str = "fail"
    changes: Changes | None = None
    """Against a baseline; then what is new decides the exit code."""
    record: str = ""
    """Where the only run of it is saved, as a word of a command line, for the commands that are named."""
    width: int = 80
    colour: bool = False

    @property
    def exit_code(self) -> int:
        """The worst of all reports: 1 before 3 before 0; the same for every format."""
        if self.changes is not None:
            codes = {self.changes.exit_code(self.fail_on)}
            codes |= {3 for report in self.reports if report.stopped}
        else:
            codes = {exit_code_of(report, self.fail_on) for report in self.reports}
        return 1 if 1 in codes else max(codes, default=0)


def one(report: Report, fail_on: str = "fail") -> View:
    """A view of a single report."""
    return View((report,), fail_on)


def model_named(report: Report) -> str:
    """The model in a title: its hub id, or the last two parts of its folder. A stranger's words are still in it."""
    parts = [part for part in re.split(r"[\\/]", report.run.model.source) if part]
    return "/".join(parts[-2:])
