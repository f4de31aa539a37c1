"""What can go wrong for a user, as one sentence and one exit code; no traceback reaches them.

``main`` in ``cli.py`` prints ``str(error)`` and returns ``error.exit_code``. Every message names the
file or the option, what was expected and what to do next.
"""


class QprecError(Exception):
    """The run could not be done: no such model, an unreadable record, not enough memory."""

    exit_code = 3


class UsageError(QprecError):
    """The request itself is wrong: an unknown dtype, an empty prompt, a bad profile key."""

    exit_code = 2


def in_one_line(error: BaseException, longest: int = 300) -> str:
    """Somebody else's exception as a part of a sentence: its kind, and its text on one line."""
    text = " ".join(str(error).split())
    cut = text if len(text) <= longest else text[:longest].rstrip() + " …"
    return f"{type(error).__name__}: {cut}" if text else type(error).__name__
