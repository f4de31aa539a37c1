"""``qprec generate``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qwen_precision.cli import options, outcome, terminal
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import UsageError
from qwen_precision.judge import judge
from qwen_precision.settings import ON_FAILURE, GenerateSettings, load_generate_settings, load_guards, read_prompts

DEFAULT_PROMPT = "上海有个非常出名的地方，"
"""What is continued when nothing else is given: the prompt of the first bug reports."""


def generate(
    context: typer.Context,
    model: options.ModelArgument,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype to generate in. Default: fp16.",
            metavar="|".join(DTYPES),
            callback=options.dtypes,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; repeatable: they make one batch; - reads standard input.", metavar="TEXT"),
    ] = None,
    prompts: options.PromptsOption = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put each prompt into the chat template, or take it as it is.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.", metavar="N")] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Draw each token, or take the likeliest.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.", metavar="X")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability.", metavar="X")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many of the likeliest tokens; 0 for all.", metavar="N")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens of this share of the likeliest's.", metavar="X")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 for none.", metavar="X")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers. Default: 0.", metavar="N")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    guards: Annotated[
        str | None,
        typer.Option(help="A guard profile, by name (default, strict, observe, off) or file.", metavar="NAME"),
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
    probe_run: Annotated[
        Path | None, typer.Option(help="A probe of the same checkpoint, for advice.", metavar="FILE")
    ] = None,
    device: options.DeviceOption = None,
    attn: options.AttentionOption = None,
    revision: options.RevisionOption = None,
    text: Annotated[bool, typer.Option("--text", help="Print the text alone.")] = False,
    output: options.OutputOption = None,
    format: options.FormatOption = None,
    full: options.FullOption = False,
    quiet: options.QuietOption = False,
    force: options.ForceOption = False,
    fail_on: options.FailOnOption = "fail",
) -> None:
    """Generate text in one dtype, with guards against NaN and overflow; says what they saw and did.

    Sampling options default to the checkpoint's generation_config.json.
    """
    settings = load_generate_settings(options.given(context, GenerateSettings), no_guards)
    chosen = load_guards(settings.guards, settings.on_failure)
    specs = read_prompts(prompt, prompts, instead=[DEFAULT_PROMPT], again=True)
    reads = (model, prompts, str(probe_run) if probe_run else None, guards if guards and Path(guards).suffix else None)
    wanted = outcome.output_for(output, format, "qprec-gen.json", full, force, reads)
    if text and (stream or full or format):
        raise UsageError("--text: prints nothing else; leave out --stream, --full and --format.")
    with terminal.streaming() if stream else terminal.progress() as (progress, on_token):
        from qwen_precision.generate import generate as decode  # torch

        run = decode(model, settings, chosen, specs, revision, probe_run, progress, on_token, terminal.note)
    record = outcome.keep(run, wanted)
    if text and run.generation is not None:
        terminal.result("".join(f"{row.text}\n" for row in run.generation.rows))
        wanted = replace(wanted, shown=None)
    outcome.show(judge(run, record=record), wanted, fail_on)
