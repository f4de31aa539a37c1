"""How bad a finding is, and what may fail a run: words that flags, findings and exit codes share."""

SEVERITIES = ("info", "warning", "error")


FAILING: dict[str, tuple[str, ...]] = {"fail": ("error",), "risk": ("error", "warning"), "never": ()}
"""Severities that fail a run, by what it may be failed on."""


FAIL_ON = tuple(FAILING)
