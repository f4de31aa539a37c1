"""``qprec probe``."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_precision.cli import options, outcome, terminal
from qwen_precision.dtypes import DTYPES
from qwen_precision.files import check_writable
from qwen_precision.settings import FAIL_ON, MEMORY, ProbeSettings, load_settings, load_target, read_prompts


def probe(
    context: typer.Context,
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
    settings = load_settings(config, options.given(context, ProbeSettings))
    specs = read_prompts(prompt, settings.prompts if not prompt or prompts else None)
    check_writable(output, [Path(each) for each in (model, settings.prompts, config) if each])
    target = load_target(rescue_to, settings, output, rescue_dtype, force, keep_unverified)
    from qwen_precision.diagnose import diagnose  # torch

    with terminal.progress() as (progress, _):
        report = diagnose(
            model,
            settings,
            specs,
            revision,
            target,
            progress,
            terminal.note,
            lambda run: outcome.save(run, output),
            output.with_name(f"{output.name}.sweep"),
        )
    outcome.save(report.run, output)
    outcome.show(report, output, settings.fail_on, rescue_asked=target is not None)
