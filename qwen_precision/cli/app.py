"""The command line: parse, call one verb, write, return an exit code. Torch is imported inside the verbs that need it.

Results go to stdout; progress, warnings and the next command to try go to stderr.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qwen_precision import __version__
from qwen_precision.cli import options, terminal
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import append, check_writable, write_atomically
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report, rescue_exit_code
from qwen_precision.judge.nextcommand import next_command, next_rescue
from qwen_precision.record.file import save
from qwen_precision.record.run import Run
from qwen_precision.render import View
from qwen_precision.report import view as reporting
from qwen_precision.settings.config import (
    MEMORY,
    RESCUE_DTYPES,
    SWEEPS,
    ProbeSettings,
    load_generate_settings,
    load_settings,
)
from qwen_precision.settings.guards import ON_FAILURE, load_guards
from qwen_precision.settings.levels import FAIL_ON

app = typer.Typer(
    name="qprec",
    no_args_is_help=True,
    add_completion=False,
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


@app.command()
def probe(
    model: options.ModelArgument,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Dtype to try; repeatable. Default: all three.",
            metavar="|".join(DTYPES),
            callback=options.choice_from(DTYPES, "dtype"),
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable. Default: a built-in set.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts: YAML, one a line, or a saved run.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Cut every prompt to so many tokens.")] = None,
    device: options.DeviceOption = None,
    attn: options.AttentionOption = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Keep all weights, or one layer at a time. Default: auto, by the memory that is free.",
            metavar="|".join(MEMORY),
            callback=options.choice_from(MEMORY, "memory mode"),
        ),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Leave the fp32 reference out: no headroom is predicted.")
    ] = False,
    config: Annotated[str | None, typer.Option(help="A YAML profile, by file or name. Flags win over it.")] = None,
    revision: options.RevisionOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to save the run.")] = Path("qprec-run.json"),
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="What gives exit code 1. Default: fail.",
            metavar="|".join(FAIL_ON),
            callback=options.choice_from(FAIL_ON, "level"),
        ),
    ] = None,
    explain: options.ExplainOption = None,
    budget: options.BudgetOption = None,
    sweep: options.SweepOption = None,
    sweep_limit: options.SweepLimitOption = None,
    sweep_texts: options.SweepTextsOption = None,
    rescue_to: options.RescueToOption = None,
    rescue_margin: options.RescueMarginOption = None,
    rescue_dtype: options.RescueDtypeOption = None,
    force: options.ReplaceOption = False,
    keep_unverified: options.KeepOption = False,
) -> None:
    """Find the operation that overflows first, in which layer, at which token and channel.

    Runs the checkpoint in fp32, and in each dtype beside it, with every operation watched.

    Where fp16 fails, it ends with the plan of an exact rescaling that makes it safe; --rescue-to carries it out.
    """
    flags = {
        "dtypes": dtype or None,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "device": device,
        "attention": attn,
        "memory": memory,
        "reference": False if no_reference else None,
        "fail_on": fail_on,
        "rescue_margin": rescue_margin,
        "explain": explain,
        "budget": budget,
        "sweep": sweep,
        "sweep_limit": sweep_limit,
        "sweep_texts": sweep_texts,
    }
    settings = load_settings(config, flags)
    specs = _specs(prompt, settings.prompts if prompt is None or prompts else None, [])
    check_writable(output, [Path(each) for each in (model, settings.prompts, config) if each])
    if explain is False and budget is not None:
        raise UsageError("--budget: is for the control runs, which --no-explain leaves out; give one of the two.")
    if settings.sweep != SWEEPS[0] and (settings.sweep_limit or settings.sweep_texts):
        given = "--sweep-limit" if settings.sweep_limit else "--sweep-texts"
        raise UsageError(f"{given}: goes with --sweep {SWEEPS[0]}; add it.")
    target = None
    if rescue_to is None:
        _without_a_folder({"--rescue-dtype": rescue_dtype, "--force": force, "--keep-unverified": keep_unverified})
    else:
        _can_rescue(settings, rescue_to, output)
    from qwen_precision.diagnose.run import diagnose
    from qwen_precision.rescue.deliver import Target

    if rescue_to is not None:
        target = Target(rescue_to, rescue_dtype or RESCUE_DTYPES[0], force, keep_unverified)
    with terminal.progress() as (progress, _):
        report = diagnose(
            model,
            settings,
            specs,
            revision,
            target,
            progress,
            terminal.note,
            lambda measured: _save(measured, output),
            output.with_name(f"{output.name}.sweep"),
        )
    _save(report.run, output)
    _show(report, output, settings.fail_on, rescue_to is not None)


_saved: list[Path] = []
"""What this call of the program has written, for the sentence of an interrupt."""


def _save(run: Run, path: Path) -> None:
    save(run, path)
    _saved.append(path)


def _without_a_folder(flags: dict[str, Any]) -> None:
    given = [flag for flag, value in flags.items() if value]
    if given:
        raise UsageError(f"{given[0]}: says how to write a rescued checkpoint; add --rescue-to FOLDER.")


def _can_rescue(settings: ProbeSettings, folder: Path, output: Path) -> None:
    if "fp16" not in settings.dtypes:
        raise UsageError("--rescue-to: makes a checkpoint safe in fp16, which --dtype leaves out; add --dtype fp16.")
    if not settings.reference:
        raise UsageError("--rescue-to: needs the fp32 reference; leave --no-reference out.")
    real = Path(os.path.realpath(output))
    if Path(os.path.realpath(folder)) in (real, *real.parents):
        raise UsageError(f"-o {output}: lies in the folder of --rescue-to, which is written whole; choose another.")


def _specs(texts: list[str] | None, file: str | None, instead: list[str]) -> Any:
    """Prompts from the flags; ``instead`` where none is given, and if that is empty the built-in set."""
    if texts is not None and file is not None:
        raise UsageError("--prompt and --prompts: give one of the two.")
    from qwen_precision.settings.prompts import read_prompts

    return read_prompts(texts or ([] if file is not None else instead), file)


def _show(report: Report, path: Path, fail_on: str, rescued: bool = False) -> NoReturn:
    """The table, what to do next, and the exit code of a run that was just made, or of the rescue asked for."""
    terminal.result(str(terminal.render(View((report,), fail_on), "table")))
    terminal.note(f"saved {path}; show it again with: qprec report {shlex.quote(str(path))}")
    command = next_command(report, shlex.quote(str(path)))
    if command is not None:
        terminal.note(f"find where it starts with: {command}")
    rescue = next_rescue(report, shlex.quote(str(path)))
    if rescue is not None and not rescued:
        terminal.note(f"make it safe in fp16 with: {rescue}")
    if rescued and (report.run.rescue is None or report.run.rescue.exported is None):
        terminal.note("no rescaled checkpoint was written")
    raise typer.Exit(rescue_exit_code(report, fail_on) if rescued else report.exit_code(fail_on))


@app.command()
def generate(
    model: options.ModelArgument,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype to generate in. Default: fp16.",
            metavar="|".join(DTYPES),
            callback=options.choice_from(DTYPES, "dtype"),
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable: they make one batch.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts: YAML, one a line, or a saved run.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put each prompt into the chat template, or take it as it is.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Draw each token, or take the likeliest.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many of the likeliest tokens; 0 for all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens of this share of the likeliest's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 for none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers. Default: 0.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    guards: Annotated[
        str | None, typer.Option(help="A guard profile, by name (default, strict, observe, off) or file.")
    ] = None,
    no_guards: Annotated[bool, typer.Option("--no-guards", help="As transformers does it; the same as off.")] = False,
    on_failure: Annotated[
        str | None,
        typer.Option(
            help="What to do with a row that failed.",
            metavar="|".join(ON_FAILURE),
            callback=options.choice_from(ON_FAILURE, "way"),
        ),
    ] = None,
    probe_run: Annotated[Path | None, typer.Option(help="A probe of the same checkpoint, for advice.")] = None,
    device: options.DeviceOption = None,
    attn: options.AttentionOption = None,
    revision: options.RevisionOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to save the run.")] = Path("qprec-gen.json"),
    fail_on: options.FailOnOption = "fail",
) -> None:
    """Generate text in one dtype, with guards against NaN and overflow; says what they saw and did.

    Sampling options default to the checkpoint's generation_config.json.
    """
    if no_guards and (guards is not None or on_failure is not None):
        raise UsageError("--no-guards: goes with neither --guards nor --on-failure; give one of them.")
    profile = "off" if no_guards else guards if guards is not None else "default"
    settings = load_generate_settings(
        {
            "guards": profile,
            "on_failure": on_failure,
            "dtype": dtype,
            "prompts": prompts,
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "repetition_penalty": repetition_penalty,
            "device": device,
            "attention": attn,
        }
    )
    chosen = load_guards(profile, on_failure)
    specs = _specs(prompt, prompts, [options.DEFAULT_PROMPT])
    inputs = [model, prompts, probe_run, *([guards] if guards and Path(guards).suffix else [])]
    check_writable(output, [Path(each) for each in inputs if each])
    from qwen_precision.generate.run import generate as run_it

    with terminal.streaming() if stream else terminal.progress() as (progress, on_token):
        run = run_it(model, settings, chosen, specs, revision, probe_run, progress, on_token)
    _save(run, output)
    _show(judge(run), output, fail_on)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs that `qprec probe` or `generate` saved, or bundles.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--format",
            help="How to show it. Default: by the suffix of -o, else table.",
            metavar="|".join(reporting.NAMES),
            callback=options.choice_from(reporting.NAMES, "format"),
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to a file, not stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="An older run: only what is new gives exit code 1.")] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Without prompts, texts and token strings.")] = False,
    fail_on: options.FailOnOption = "fail",
) -> None:
    """Show saved runs again: verdict, NaN, inf and "!!!!" findings, headroom. Measures nothing."""
    name = reporting.format_for(format, output)
    if output is not None:
        check_writable(output, [*runs, *([baseline] if baseline else [])], force=force)
    shown = reporting.view(runs, fail_on, baseline, redact)
    text = reporting.bundle(shown) if name == reporting.BUNDLE else terminal.render(shown, name, output is not None)
    if output is not None:
        write_atomically(output, text)
        terminal.note(f"wrote {output}")
    else:
        terminal.result(str(text))
    summary = os.environ.get("GITHUB_STEP_SUMMARY") if name == "github" else None
    if summary:
        append(Path(summary), str(terminal.render(shown, "markdown", plain=True)), "GITHUB_STEP_SUMMARY")
    raise typer.Exit(shown.exit_code)


_TYPER_INTERRUPTED = 130  # what typer makes of Ctrl-C before we see it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code and never raises for a user's mistake."""
    _saved.clear()
    try:
        result = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="qprec", standalone_mode=False)
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except QprecError as error:
        terminal.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        terminal.error(f"interrupted; the run is in {_saved[-1]}." if _saved else "interrupted; nothing was saved.")
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
        terminal.error(f"this is a bug in qprec {__version__}; please report it with the lines above.")
        return 3
    if not message():  # `qprec` alone: the help was the answer
        return code
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "qprec")
    terminal.error(f"{' '.join(str(message()).split()).rstrip('.')}. See: {path} --help")
    return code
