"""A checkpoint, prompts, one dtype and guards in; a Run out. What it means is judged elsewhere (``checks.py``)."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_precision.dtypes import DTYPES, RESCUED
from qwen_precision.errors import ENDS, QprecError, UsageError, in_one_line, is_ours
from qwen_precision.generate.decode import Decoder, Session
from qwen_precision.generate.pace import paced
from qwen_precision.generate.rescaler import Rescaler
from qwen_precision.generate.rows import continuation
from qwen_precision.generate.sampling import generation_config, looks_like_a_base_model, options
from qwen_precision.judge import judge
from qwen_precision.model import (
    Checkpoint,
    Models,
    attention_used,
    cache_argument,
    choose_device,
    encode,
    environment,
    fault,
    foreign_faults,
    locate,
    model_part,
    not_decoded,
    open_checkpoint,
    out_of_memory,
)
from qwen_precision.progress import Announce, Progress, silent, untold
from qwen_precision.qwen3 import name_of, placed
from qwen_precision.record import Choice, Generation, ProbeSummary, Prompt, Rescue, Run, load
from qwen_precision.rescue import unsupported
from qwen_precision.settings import (
    GenerateSettings,
    GuardSettings,
    PromptSpec,
    as_batch,
    has_template,
    rendered,
    tokenise,
)
from qwen_precision.version import __version__

OnToken = Callable[[Any, int, int], None]
"""Called with the tokenizer, the row and the id of each token that was accepted."""


_MANY = 100
"""Prompts from which on it is said how many they are: each holds memory for as long as the batch lives."""


@dataclass
class _Job:
    """Everything a generation has put together before it runs."""

    checkpoint: Checkpoint
    source: str
    settings: GenerateSettings
    guards: GuardSettings
    device: torch.device
    prompt: Prompt
    inputs: list[str]
    config: Any
    choices: list[Choice]
    probe: ProbeSummary | None


def generate(
    source: str,
    settings: GenerateSettings,
    guards: GuardSettings,
    specs: Sequence[PromptSpec],
    revision: str | None = None,
    probe_run: Path | None = None,
    progress: Progress = silent,
    on_token: OnToken = lambda tokenizer, row, token: None,
    announce: Announce = untold,
) -> Run:
    """Generate with the guards on.

    Args:
        source: a hub id, a folder, or ``demo``.
        settings: dtype, sampler, device.
        guards: what may intervene.
        specs: the prompts; all rows of all of them make one left-padded batch.
        revision: of a hub id.
        probe_run: the record of a probe of the same checkpoint, for advice.
        progress: called with (steps done, steps at most, what is being done).
        on_token: called with each token as it is accepted.
        announce: called with how much it is and how long it will take, where that is long.

    Raises:
        QprecError: nothing could be generated. What dies later (Ctrl-C, memory) gives a Run with ``stopped`` set,
            holding all that was generated before.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    job = _prepare(source, settings, guards, specs, revision, probe_run, progress)
    if len(job.prompt.rows) >= _MANY:
        tokens = sum(len(row.ids) for row in job.prompt.rows)
        announce(f"{len(job.prompt.rows):,} prompts, {tokens:,} tokens, go through the model as one batch")

    def tell(what: str) -> None:
        progress(0, 0, what)

    models = Models(job.checkpoint, job.device, settings.attention, tell)
    rescaler = Rescaler(models, job.checkpoint, settings.device, settings.attention, guards.recover.margin, tell)
    model = models.get(settings.dtype)
    _check_decodes(model)
    loaded = time.perf_counter()
    job.choices.insert(1, attention_used(model, settings.attention))
    decoder = Decoder(
        models,
        rescaler,
        settings.dtype,
        guards,
        paced(progress, announce, len(job.prompt.rows)),
        lambda row, token: on_token(job.checkpoint.tokenizer, row, token),
    )
    stopped = _run(job, model, decoder)
    ended = time.perf_counter()
    seconds = {"loading": loaded - started, "generating": ended - loaded, "total": ended - started}
    return _record(job, model, decoder.session, stopped, seconds, rescaler.plan)


def _prepare(
    source: str,
    settings: GenerateSettings,
    guards: GuardSettings,
    specs: Sequence[PromptSpec],
    revision: str | None,
    probe_run: Path | None,
    progress: Progress,
) -> _Job:
    device, device_choice = choose_device(settings.device)
    probed = load(probe_run) if probe_run else None
    folder, commit = locate(source, revision, progress)
    checkpoint = open_checkpoint(folder, source, commit)
    _check_rescale(guards, settings.dtype, checkpoint)
    with foreign_faults(folder):
        prompt, inputs = _tokenised(checkpoint, settings, specs)
        width = len(prompt.rows[0].ids) + prompt.rows[0].padding
        config, choices = generation_config(checkpoint, settings, width)
    summary = _summary(probed, probe_run, checkpoint, settings.dtype) if probed and probe_run else None
    return _Job(
        checkpoint,
        source,
        settings,
        guards,
        device,
        prompt,
        inputs,
        config,
        [device_choice, *checkpoint.notes, *choices],
        summary,
    )


def _tokenised(
    checkpoint: Checkpoint, settings: GenerateSettings, specs: Sequence[PromptSpec]
) -> tuple[Prompt, list[str]]:
    """All rows of all prompts as one batch, and the text of each."""
    if settings.chat:
        specs = [each for spec in specs for each in _turns(spec)]
    tokenizer = checkpoint.tokenizer
    without = [spec.name for spec in specs if spec.templated] if not has_template(tokenizer) else []
    if without:
        remedy = "use --raw" if settings.chat else "give it as text"
        raise UsageError(f"prompt {without[0]!r}: is a chat turn, but the tokenizer has no chat template; {remedy}.")
    prompts, left_out = tokenise(
        specs, tokenizer, checkpoint.text_config.vocab_size, checkpoint.context, None, cut_with=None
    )
    for name, why in left_out.items():
        raise QprecError(f"prompt {name!r}: {why}; use --raw, or give a text.")
    inputs = [each for spec, made in zip(specs, prompts, strict=True) for each in _inputs(spec, made, tokenizer)]
    return as_batch(prompts), inputs


def _turns(spec: PromptSpec) -> list[PromptSpec]:
    """Its texts as chat turns, under its name; ids of a saved run have the template in them already."""
    if spec.given_ids is not None or spec.messages is not None:
        return [spec]
    return [PromptSpec(name=spec.name, chat=text) for text in spec.texts()]


def _inputs(spec: PromptSpec, made: Prompt, tokenizer: Any) -> list[str]:
    """The texts that were tokenised; where ids were given, or cut, what those left spell."""
    if spec.given_ids is None and spec.max_tokens is None:
        return [rendered(spec, text, tokenizer) for text in spec.texts()]
    return [str(tokenizer.decode(row.ids)) for row in made.rows]


def _check_rescale(guards: GuardSettings, dtype: str, checkpoint: Checkpoint) -> None:
    if not guards.recover.enabled or guards.recover.on_failure != "rescale":
        return
    if dtype != RESCUED:
        raise UsageError(f"--on-failure rescale: works in {RESCUED}, not in {dtype}; choose fallback, or --dtype fp16.")
    # What takes the embedding's factor back in the logits is the final norm, which a bare model's rescue leaves alone.
    reason = "the checkpoint has no lm_head" if checkpoint.bare else unsupported(checkpoint)
    if reason is not None:
        raise UsageError(f"--on-failure rescale: {reason}; choose fallback or stop.")


def _summary(run: Run, path: Path, checkpoint: Checkpoint, dtype: str) -> ProbeSummary:
    """What a probe said of the dtype."""
    if run.verb != "probe":
        raise UsageError(f"--probe-run {path}: was made by `qprec {run.verb}`; give one that `qprec probe -o` saved.")
    if (run.model.parameters, run.model.vocabulary) != (checkpoint.parameters, checkpoint.text_config.vocab_size):
        raise UsageError(
            f"--probe-run {path}: is of {run.model.source} with {run.model.parameters:,} parameters, "
            f"this checkpoint has {checkpoint.parameters:,}; give a probe of the same one."
        )
    report = judge(run)
    if dtype not in report.verdict:
        probed = ", ".join(report.verdict)
        raise UsageError(f"--probe-run {path}: did not probe {dtype} (only {probed}); probe it with --dtype {dtype}.")
    rows = report.headroom[dtype]
    site = run.sites[rows[0].site] if rows else None
    return ProbeSummary(
        file=path.name,
        verdict=report.verdict[dtype],
        headroom=rows[0].headroom if rows else None,
        where=placed(site.layer, name_of(site.module, site.op, site.call)) if site is not None else "",
    )


def _check_decodes(model: Any) -> None:
    """A prompt is continued here, with a cache that grows by a token a step."""
    if cache_argument(model) is None:
        raise not_decoded(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise QprecError(
            f"{type(model).__name__}: has an encoder for the prompt, and `qprec generate` decodes without one; "
            "`qprec probe` finds where it overflows"
        )


def _run(job: _Job, model: Any, decoder: Decoder) -> str | None:
    """Generate; gives why it stopped early, or None."""
    encoded = encode(job.prompt, job.checkpoint, job.device)
    model.generation_config = job.config  # passed as an argument, some of its values would give way to the file's
    torch.manual_seed(job.settings.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say is in the choices, or has no effect here
            model.generate(encoded.ids, attention_mask=encoded.mask, custom_generate=decoder)
    except KeyboardInterrupt:
        if decoder.session is None:
            raise
        return "interrupted"
    except QprecError as error:
        if decoder.session is None or decoder.session.cost is None:
            raise
        return str(error)
    except ENDS:
        raise
    except BaseException as error:
        if out_of_memory(error):
            return f"out of memory on {job.device}; try a shorter prompt, fewer rows or fewer --max-new-tokens"
        if decoder.session is None and isinstance(error, (TypeError, ValueError)):
            raise QprecError(
                f"{job.checkpoint.folder / 'generation_config.json'}: transformers refuses these settings "
                f"({in_one_line(error)}); correct the file, or give the right ones as options."
            ) from error
        if is_ours(error):
            raise
        if decoder.session is None:
            raise not_decoded(model, error) from error
        return fault(job.checkpoint.folder, error)
    return None


def _record(
    job: _Job, model: Any, session: Session | None, stopped: str | None, seconds: dict[str, float], plan: Rescue | None
) -> Run:
    made = _generation(job, session)
    used = [job.settings.dtype, *(stretch.dtype for row in made.rows for stretch in row.stretches)]
    used += [trip.dtype for trip in made.trips]
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    return Run(
        tool=f"qprec {__version__}",
        verb="generate",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        stopped=stopped,
        unfinished=None,
        model=model_part(job.checkpoint, job.source, type(model).__name__, layers),
        environment=environment(job.device),
        settings=job.settings.model_dump(),
        choices=job.choices,
        prompts=[job.prompt],
        redacted=False,
        dtypes=[name for name in DTYPES if name in used],
        reference=False,
        sites=[],
        wider={},
        casts={},
        not_run=[],
        passes=[],
        weights=[],
        weight_totals=[],
        scale_faults=[],
        seconds={name: round(value, 3) for name, value in seconds.items()},
        logits=None,
        generation=made,
        rescue=plan,
        explanation=None,
        sweep=None,
    )


def _generation(job: _Job, session: Session | None) -> Generation:
    """What was decoded; nothing where memory ran out before the first step."""
    trips = session.trips if session is not None else []
    rows = session.rows if session is not None else []
    tokenizer = job.checkpoint.tokenizer
    return Generation(
        options=options(session.config if session is not None else job.config, job.settings.seed),
        guards=job.guards.model_dump(),
        chat=job.settings.chat,
        base_model=looks_like_a_base_model(job.checkpoint, job.config),
        rows=[continuation(state, job.inputs[state.row], trips, tokenizer) for state in rows],
        trips=trips,
        error=session.error if session is not None else None,
        logits=session.cost if session is not None else None,
        probe=job.probe,
    )
