"""``qprec probe``."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwen_precision.cli import many, options, outcome, terminal
from qwen_precision.dtypes import DTYPES
from qwen_precision.settings import (
    ARITHMETIC,
    FAIL_ON,
    MEMORY,
    ProbeSettings,
    PromptSpec,
    load_settings,
    load_target,
    rank_of,
    read_prompts,
)


def probe(
    context: typer.Context,
    model: options.ModelsArgument,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Dtype to try; repeatable, or with commas. Default: all three.",
            metavar="|".join(DTYPES),
            callback=options.dtypes,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; repeatable; - reads standard input. Default: a built-in set.", metavar="TEXT"),
    ] = None,
    prompts: options.PromptsOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut every prompt to so many tokens.", metavar="N")
    ] = None,
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
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="How 16-bit products are computed: by this machine's kernels (native, the default), summed in fp32 as "
            "a GPU does, or with sums in fp16.",
            metavar="|".join(ARITHMETIC),
            callback=options.choice_from(ARITHMETIC, "arithmetic"),
        ),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Leave the fp32 reference out: no headroom is predicted.")
    ] = False,
    config: Annotated[
        str | None, typer.Option(help="A YAML profile, by file or name. Flags win over it.", metavar="FILE")
    ] = None,
    revision: options.RevisionOption = None,
    output: options.PlaceOption = None,
    format: options.FormatOption = None,
    full: options.FullOption = False,
    quiet: options.QuietOption = False,
    force: options.ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take (download, memory, time), and stop.")
    ] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="What gives exit code 1. Default: fail.",
            metavar="|".join(FAIL_ON),
            callback=options.choice_from(FAIL_ON, "level"),
        ),
    ] = None,
    shard: options.ShardOption = None,
    jobs: options.JobsOption = None,
    block: options.BlockOption = None,
    explain: options.ExplainOption = None,
    budget: options.BudgetOption = None,
    sweep: options.SweepOption = None,
    sweep_limit: options.SweepLimitOption = None,
    sweep_texts: options.SweepTextsOption = None,
    rescue_to: options.RescueToOption = None,
    rescue_margin: options.RescueMarginOption = None,
    rescue_dtype: options.RescueDtypeOption = None,
    keep_unverified: options.KeepOption = False,
) -> None:
    """Find the operation that overflows first, in which layer, at which token and channel.

    Runs the checkpoint in fp32, and in each dtype beside it, with every operation watched.

    Where fp16 fails, it ends with the plan of an exact rescaling that makes it safe; --rescue-to carries it out.
    """
    settings = load_settings(config, options.given(context, ProbeSettings))
    folder = many.folder_for(output)
    if folder is not None:
        many.check_alone(
            {"--rescue-to": rescue_to, "--rescue-dtype": rescue_dtype, "--keep-unverified": keep_unverified}
        )
        asked = many.Asked(model, revision, settings, prompt or [], prompts, block, rank_of(shard, os.environ), force)
        many.run(asked, folder, jobs, many.Shown(format, full), dry_run, context.obj or sys.argv[1:])
    many.check_one(model, {"--shard": shard, "--jobs": jobs, "--block": block}, os.environ)
    specs = read_prompts(prompt, settings.prompts if not prompt or prompts else None)
    place = Path(output) if output is not None else None
    wanted = outcome.output_for(place, format, "qprec-run.json", full, force, (model[0], settings.prompts, config))
    record = wanted.record or Path("qprec-run.json")
    target = load_target(rescue_to, settings, record, rescue_dtype, force, keep_unverified)
    if dry_run:
        _tell(model[0], settings, specs, revision)
        raise typer.Exit
    with terminal.progress() as (progress, _):
        from qwen_precision.diagnose import diagnose  # torch

        report = diagnose(
            model[0],
            settings,
            specs,
            revision,
            target,
            progress,
            terminal.note,
            lambda run: outcome.keep(run, wanted),
            record.with_name(f"{record.name}.sweep"),
        )
    outcome.show(report, wanted, settings.fail_on, rescue_asked=target is not None)


def _tell(model: str, settings: ProbeSettings, specs: list[PromptSpec], revision: str | None) -> None:
    """What a probe would take, a line each."""
    with terminal.progress() as (progress, _):
        from qwen_precision.probe import dry_run as told  # torch

        progress(0, 0, "looking at the checkpoint")
        rows = list(told(model, settings, specs, revision))
    terminal.result(terminal.labelled(rows, 10))
