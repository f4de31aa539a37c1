"""The command line: parse, call one verb, write, return an exit code. Torch is imported inside the verbs that need it.

Results go to stdout; progress, warnings and the next command to try go to stderr.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from qwen_precision import __version__
from qwen_precision.cli import outcome, terminal
from qwen_precision.cli.generate import generate
from qwen_precision.cli.help import Grouped
from qwen_precision.cli.probe import probe
from qwen_precision.cli.report import report
from qwen_precision.errors import QprecError

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
        typer.echo(f"qprec {__version__}")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code and never raises for a user's mistake."""
    outcome.saved.clear()
    terminal.be_quiet(False)
    try:
        result = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="qprec", standalone_mode=False)
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except QprecError as error:
        terminal.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        terminal.error(
            f"interrupted; the run is in {outcome.saved[-1]}." if outcome.saved else "interrupted; nothing was saved."
        )
        return 3
    except BrokenPipeError:
        # The reader of a pipe (head, a pager) went away: that is its right. Nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 3
    except ModuleNotFoundError as error:
        return _not_installed(error)
    except Exception as error:
        return _from_typer(error)
    return result if isinstance(result, int) else 0


def _not_installed(error: ModuleNotFoundError) -> int:
    """A dependency that is not there is no bug: `report` needs no torch, so qprec may be installed without it."""
    name = (error.name or "").partition(".")[0]
    if not name or name == "qwen_precision":
        return _from_typer(error)
    terminal.error(f"needs {name}, which is not installed in {sys.prefix}; install it with: pip install {name}")
    return 3


def _from_typer(error: Exception) -> int:
    """Typer's own errors (a wrong option) can say what is wrong; anything else is a bug and stays one."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(message) or not isinstance(code, int):
        # Exit code 1 would say "findings" to a CI server, so a crash has the code of a run that could not be.
        traceback.print_exception(error)
        terminal.error(f"this is a bug in qprec {__version__}; please report it with the lines above.")
        return 3
    if not message():  # `qprec` alone: the help was the answer
        return code
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "qprec")
    terminal.error(f"{' '.join(str(message()).split()).rstrip('.')}. See: {path} --help")
    return code
