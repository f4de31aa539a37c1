"""How long work tells where it is: one signature, whoever works and whoever shows it."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all (0 where that is not known), and what is being done."""

Announce = Callable[[str], None]
"""Called with a sentence before what the user did not ask for by name."""


def silent(done: int, total: int, what: str) -> None:
    """Tells nobody."""


def said(doing: str, progress: Progress) -> Progress:
    """The same progress, with what all of it is for in front."""
    return lambda done, total, what: progress(done, total, f"{doing}: {what}")
