"""How long work tells where it is: one signature, whoever works and whoever shows it."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all (0 where that is not known), and what is being done."""

Announce = Callable[[str], None]
"""Called with a sentence before what the user did not ask for by name."""


def lasting(seconds: float) -> str:
    """How long something takes, as roughly as it is known."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h" if seconds < 172800 else f"{seconds / 86400:,.0f} days"


def untold(sentence: str) -> None:
    """Announces to nobody."""


def silent(done: int, total: int, what: str) -> None:
    """Tells nobody."""


def said(doing: str, progress: Progress) -> Progress:
    """The same progress, with what all of it is for in front."""
    return lambda done, total, what: progress(done, total, f"{doing}: {what}")
