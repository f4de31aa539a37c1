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


ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a program or a generator. What else is no Exception is a stranger's: Rust code that gives up raises so."""


def is_ours(error: BaseException) -> bool:
    """Whether the code that raised an exception is this program's own, and not a library's that it called."""
    if not isinstance(error, Exception):
        return False  # nothing here raises one: it comes from Rust, which leaves no frame of its own
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).partition(".")[0] == __name__.partition(".")[0]


def in_one_line(error: BaseException, longest: int = 300) -> str:
    """Somebody else's exception as a part of a sentence: its kind, and its text on one line."""
    text = " ".join(str(error).split())
    cut = text if len(text) <= longest else text[:longest].rstrip() + " …"
    return f"{type(error).__name__}: {cut}" if text else type(error).__name__
