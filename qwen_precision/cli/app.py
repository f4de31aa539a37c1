"""The command line: parse, call one verb, write, return an exit code. Torch is imported inside the verbs that need it.

Results go to stdout; progress, warnings and the next command to try go to stderr.
"""

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

from qwen_precision import __version__
from qwen_precision.cli import outcome, terminal
from qwen_precision.cli.generate import generate
from qwen_precision.cli.help import Grouped
from qwen_precision.cli.probe import probe
from qwen_precision.cli.report import report
from qwen_precision.cli.signals import interruptible
from qwen_precision.errors import QprecError, UsageError, in_one_line
from qwen_precision.parents import follows

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="qprec",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=_HELP,
    pretty_exceptions_enable=False,
    help="Find where a Qwen3 checkpoint overflows in half precision, why, and how much headroom the rest has.",
    epilog="Exit codes: 0 nothing found, 1 findings at or above --fail-on, 2 bad usage, 3 could not run.",
)


def _version(show: bool) -> None:
    if show:
        terminal.result(f"qprec {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _command, _short in (
    (probe, "Which operation overflows first, where, and why."),
    (generate, "Text in one dtype, with guards against NaN and overflow."),
    (report, "Saved runs shown again, in any format; measures nothing."),
):
    app.command(cls=Grouped, context_settings=_HELP, short_help=_short)(_command)

_TYPER_INTERRUPTED = 130  # what typer makes of Ctrl-C before we see it


def main(argv: Sequence[str] | None = None, ends: bool = False) -> int:
    """Run the program; gives its exit code and never raises for a user's mistake.

    Args:
        argv: the words of the command line; those of this process by default.
        ends: whether the process ends after it, so that signals are ignored from the exit code on.
    """
    outcome.saved.clear()
    terminal.be_quiet(False)
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_place(args)
        with interruptible(ends):
            result = app(args=args, prog_name="qprec", standalone_mode=False, obj=args)
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except QprecError as error:
        terminal.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        kept = f"the run is in {outcome.saved[-1]}" if outcome.saved else "nothing was saved"
        if not follows():
            terminal.error(f"interrupted; {kept}.")
        return 3
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the help, of which nobody wanted the rest
            terminal.nobody_reads()
            return 0
        return error.code if isinstance(error.code, int) else 3
    except ModuleNotFoundError as error:
        return _not_installed(error)
    except BaseException as error:  # what Rust code raises is no Exception
        return _left_over(error)
    return result if isinstance(result, int) else 0


def _check_place(args: list[str]) -> None:
    """What every path of a command hangs on: words that a file can be called by, and a folder to start from."""
    for word in args:
        try:
            if b"\0" in os.fsencode(word):
                raise ValueError
        except ValueError as error:
            raise UsageError(f"{word[:60]!r}: is no text that a file or a prompt can have; leave it out.") from error
    for option, value in pairwise([*args, "-"]):  # a path of no words is the working folder
        if option in ("--output=", "-o=") or (option in ("--output", "-o") and not value):
            raise UsageError(f"{option.rstrip('=')}: is empty; give the name of a file, or - for stdout.")
    try:
        os.getcwd()
    except OSError as error:
        raise QprecError(f"the working folder cannot be read ({error.strerror}); change to another.") from error


def _not_installed(error: ModuleNotFoundError) -> int:
    """A dependency that is not there is no bug: `report` needs no torch, so qprec may be installed without it."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "qwen_precision":
        return _left_over(error)
    terminal.error(f"needs {name}, which is not installed in {sys.prefix}; install it with: pip install {name}")
    return 3


def _left_over(error: BaseException) -> int:
    """What nothing closer has made a sentence of: typer's own errors (a wrong option), the system's, and bugs."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(message) or not isinstance(code, int):
        terminal.error(_of_the_system(error) or _of_a_bug(error))
        return 3  # 1 would say "findings" to a CI server: a crash has the code of a run that could not be
    if type(error).__name__ == "NoArgsIsHelpError":  # `qprec` alone: the help is the answer
        terminal.help_text(str(message()))
        return code
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "qprec")
    said = " ".join(str(message()).split()).removesuffix(".")
    terminal.error(f"{said}{'' if said.endswith('?') else '.'} See: {path} --help")
    return code


def _of_the_system(error: BaseException) -> str | None:
    """The sentence of what is the machine's fault, whichever line met it; None of anything else."""
    kept = f"; the run so far is in {outcome.saved[-1]}" if outcome.saved else ""
    if isinstance(error, MemoryError):
        return f"out of memory; try fewer or shorter prompts, or --memory streamed{kept}."
    number = error.errno if isinstance(error, OSError) else None
    if number in _SYSTEM:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename is not None else ""
        return f"{where}{os.strerror(number)}; {_SYSTEM[number]}{kept}."
    return None


_ROOM = "make room where the output goes, or set TMPDIR to a folder with some"
_SYSTEM = {
    errno.EMFILE: "allow more (ulimit -n 256)",
    errno.ENFILE: "close some of them",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "check the disk",
    errno.ENOMEM: "free some memory",
}
"""What to do about errors of the system that any line may meet."""


def _of_a_bug(error: BaseException) -> str:
    """The sentence of a real bug. Its traceback goes into a file, whose name is in the sentence."""
    lines = "".join(traceback.format_exception(error))
    said = f"this is a bug in qprec {__version__} ({in_one_line(error, 120)}); please report it"
    kept = f" The run so far is in {outcome.saved[-1]}." if outcome.saved else ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="qprec-bug-", suffix=".txt", delete=False
        ) as file:
            file.write(lines)
    except OSError:
        terminal.note(lines)
        return f"{said} with the lines above.{kept}"
    return f"{said} with the file {file.name}.{kept}"
