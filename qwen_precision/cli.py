"""The command line: parse, call one verb, write, return an exit code. Torch is imported by ``probe`` alone.

Results go to stdout; progress, warnings and the next command to try go to stderr.
"""

import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qwen_precision import __version__
from qwen_precision.checks import judge
from qwen_precision.config import ATTENTION, MEMORY, load_settings
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import check_writable, write_atomically
from qwen_precision.findings import FAIL_ON, Limits, Report
from qwen_precision.record import load, save
from qwen_precision.render import RENDERERS

app = typer.Typer(
    name="qprec", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Find where a Qwen3 checkpoint overflows in half precision, why, and how much headroom the rest has.",
    epilog="Exit codes: 0 nothing found, 1 findings at or above --fail-on, 2 bad usage, 3 could not run.",
)  # fmt: skip


def one_of(names: Sequence[str] | dict[str, Any], what: str) -> Callable[[Any], Any]:
    """A callback that accepts only the names of a table, so that help, check and table cannot drift."""

    def check(value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each not in names:
                raise typer.BadParameter(f"unknown {what} {each!r}; expected one of {', '.join(names)}.")
        return value

    return check


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


@app.command()
def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id (owner/name), a checkpoint folder, or the word demo.")
    ],
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Dtype to try; repeatable. Default: all three.", metavar="|".join(DTYPES),
                     callback=one_of(DTYPES, "dtype")),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable. Default: a built-in set.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts: YAML, or one a line.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Cut every prompt to so many tokens.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. Default: auto.")] = None,
    attn: Annotated[
        str | None,
        typer.Option(help="Attention implementation. Default: what transformers chooses.",
                     metavar="|".join(ATTENTION), callback=one_of(ATTENTION, "attention implementation")),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Keep all weights, or one layer at a time. Default: auto, by the memory that is free.",
                     metavar="|".join(MEMORY), callback=one_of(MEMORY, "memory mode")),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Leave the fp32 reference out: no headroom is predicted.")
    ] = False,
    config: Annotated[str | None, typer.Option(help="A YAML profile, by file or name. Flags win over it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to save the run.")] = Path("qprec-run.json"),
    fail_on: Annotated[
        str | None,
        typer.Option(help="What gives exit code 1. Default: fail.", metavar="|".join(FAIL_ON),
                     callback=one_of(FAIL_ON, "level")),
    ] = None,
) -> None:  # fmt: skip
    """Find the operation that overflows first, in which layer, at which token and channel.

    Runs the checkpoint in fp32, and in each dtype beside it, with every operation watched.
    """
    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts: give one of the two.")
    flags = {
        "dtypes": dtype or None, "prompts": prompts, "max_tokens": max_tokens, "device": device,
        "attention": attn, "memory": memory, "reference": False if no_reference else None, "fail_on": fail_on,
    }  # fmt: skip
    settings = load_settings(config, flags)
    from qwen_precision.prompts import read_prompts

    specs = read_prompts(prompt or [], settings.prompts)
    check_writable(output, [Path(each) for each in (model, settings.prompts, config) if each])
    from qwen_precision.probe import probe as measure

    with _progress() as progress:
        run = measure(model, settings, specs, revision, progress)
    save(run, output)
    report = judge(run, _limits(run.settings))
    _result(_render(report, "table", settings.fail_on))
    _note(f"saved {output}; show it again with: qprec report {shlex.quote(str(output))}")
    raise typer.Exit(report.exit_code(settings.fail_on))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run that `qprec probe -o` saved.")],
    format: Annotated[
        str,
        typer.Option("-f", "--format", help="How to show it.", metavar="|".join(RENDERERS),
                     callback=one_of(RENDERERS, "format")),
    ] = "table",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to a file, not stdout.")] = None,
    fail_on: Annotated[
        str,
        typer.Option(help="What gives exit code 1.", metavar="|".join(FAIL_ON), callback=one_of(FAIL_ON, "level")),
    ] = "fail",
) -> None:  # fmt: skip
    """Show a saved run again: verdict, NaN and inf findings, headroom. Measures nothing."""
    record = load(run)
    if output is not None:
        check_writable(output, [run])
    judged = judge(record, _limits(record.settings))
    text = _render(judged, format, fail_on, plain=output is not None)
    if output is None:
        _result(text)
    else:
        write_atomically(output, text)
        _note(f"wrote {output}")
    raise typer.Exit(judged.exit_code(fail_on))


def _limits(settings: dict[str, Any]) -> Limits:
    """The limits a run was made with; a record from elsewhere may hold anything, then the defaults hold."""
    default = Limits()
    near, share = settings.get("near_overflow"), settings.get("underflow_share")
    return Limits(
        near if isinstance(near, (int, float)) and near >= 1 else default.near_overflow,
        share if isinstance(share, (int, float)) and share > 0 else default.underflow_share,
    )


def _render(judged: Report, name: str, fail_on: str, plain: bool = False) -> str:
    if name != "table":
        return RENDERERS[name](judged, fail_on)
    terminal = sys.stdout is not None and sys.stdout.isatty() and not plain
    width = shutil.get_terminal_size((80, 24)).columns if terminal or "COLUMNS" in os.environ else 80
    return RENDERERS[name](judged, fail_on, width=width, colour=_colour(terminal))


def _colour(terminal: bool) -> bool:
    return terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _result(text: str) -> None:
    """Write to stdout, and notice here if that cannot be done."""
    if sys.stdout is None:
        raise QprecError("stdout is closed; give -o FILE to write to a file.")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets ? instead of nothing
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise QprecError(f"stdout: cannot be written ({error.strerror}).") from error


def _note(text: str) -> None:
    _stderr().print(text, markup=False, style="dim")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr; nothing at all where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the checkpoint", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show


_TYPER_INTERRUPTED = 130  # what typer makes of Ctrl-C before we see it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code and never raises for a user's mistake."""
    try:
        result = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="qprec", standalone_mode=False)
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except QprecError as error:
        _error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _error("interrupted; nothing was saved.")
        return 3
    except BrokenPipeError:
        # The reader of a pipe (head, a pager) went away: that is its right. Nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 3
    except Exception as error:
        return _from_typer(error)
    return result if isinstance(result, int) else 0


def _from_typer(error: Exception) -> int:
    """Typer's own errors (a wrong option) can say what is wrong; anything else is a bug and stays one."""
    message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(message) or not isinstance(code, int):
        # Exit code 1 would say "findings" to a CI server, so a crash has the code of a run that could not be.
        traceback.print_exception(error)
        _error(f"this is a bug in qprec {__version__}; please report it with the lines above.")
        return 3
    if not message():  # `qprec` alone: the help was the answer
        return code
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "qprec")
    _error(f"{' '.join(str(message()).split()).rstrip('.')}. See: {path} --help")
    return code


def _error(text: str) -> None:
    _stderr().print(f"qprec: {text}", markup=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
