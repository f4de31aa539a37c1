"""A checkpoint, prompts and dtypes in; a Run out. Judging it is somebody else's work (``checks.py``)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import MappingProxyType

import torch
import transformers
from torch import nn

from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import ENDS, QprecError, UsageError, is_ours
from qwen_precision.model import (
    Checkpoint,
    Encoded,
    Models,
    NotLayerwise,
    WeightCheck,
    WeightStore,
    arranged,
    attention_used,
    cache_argument,
    choose_device,
    choose_memory,
    decoder_layers,
    encode,
    environment,
    exact_float32,
    fault,
    foreign_faults,
    layers_of,
    locate,
    model_part,
    move_buffers,
    open_checkpoint,
    out_of_memory,
    outline,
    weight_files,
)
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.shadow import Shadow
from qwen_precision.probe.task import FinalHook, Task
from qwen_precision.probe.whole import Whole
from qwen_precision.progress import Announce, Progress, silent, untold
from qwen_precision.record import Choice, Prompt, Run
from qwen_precision.settings import ProbeSettings, PromptSpec, tokenise
from qwen_precision.version import __version__

SLICE_BYTES = 256 * 1024 * 1024
"""Streamed, lm_head takes as many vocabulary rows at once as fit into this in fp32."""

OUT_OF_MEMORY = "out of memory"
"""How the reason begins, of a run that stopped for it."""


@dataclass
class Job:
    """Everything a probe has put together before it runs."""

    source: str
    checkpoint: Checkpoint
    model: nn.Module
    settings: ProbeSettings
    device: torch.device
    resident: bool
    store: WeightStore | None
    """Where a model that runs layer by layer has its weights from; None for one that runs whole."""
    prompts: list[Prompt]
    choices: list[Choice]
    passes: list[str]
    check: WeightCheck
    collector: Collector = field(default_factory=Collector)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the model runs as transformers loads it, and not layer by layer."""
        return self.store is None


def probe(
    source: str,
    settings: ProbeSettings,
    specs: Sequence[PromptSpec],
    revision: str | None = None,
    progress: Progress = silent,
    on_final: FinalHook | None = None,
) -> Run:
    """Measure a checkpoint.

    Args:
        source: a hub id, a folder, or ``demo``.
        settings: dtypes, device, memory and limits.
        specs: the prompts.
        revision: of a hub id.
        progress: called with (steps done, steps in all, what is being done).
        on_final: see ``task.FinalHook``.

    Raises:
        QprecError: nothing could be measured. What dies later (Ctrl-C, memory, a broken shard) gives a Run
            with ``stopped`` set, holding all that was measured before.
    """
    return measure(prepare(source, settings, specs, revision, progress), progress, on_final)


def prepare(
    source: str,
    settings: ProbeSettings,
    specs: Sequence[PromptSpec],
    revision: str | None = None,
    progress: Progress = silent,
) -> Job:
    """Open the checkpoint and tokenise the prompts; for the arguments and errors see ``probe``."""
    return prepared(opened(source, revision, progress), source, settings, specs)


def opened(source: str, revision: str | None = None, progress: Progress = silent) -> Checkpoint:
    """A checkpoint, found or fetched, and checked. Several jobs can be made of it; raises as ``probe`` does."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    folder, commit = locate(source, revision, progress)
    return open_checkpoint(folder, source, commit)


def prepared(checkpoint: Checkpoint, source: str, settings: ProbeSettings, specs: Sequence[PromptSpec]) -> Job:
    """``prepare`` with a checkpoint that is open already."""
    with foreign_faults(checkpoint.folder):
        return _prepared(checkpoint, source, settings, specs)


def _prepared(checkpoint: Checkpoint, source: str, settings: ProbeSettings, specs: Sequence[PromptSpec]) -> Job:
    theirs = sorted({str(spec.checkpoint) for spec in specs if spec.failed and spec.checkpoint not in (None, source)})
    prompts, left_out = tokenise(
        [spec.model_copy(update={"failed": None}) if spec.checkpoint in theirs else spec for spec in specs],
        checkpoint.tokenizer,
        checkpoint.text_config.vocab_size,
        checkpoint.context,
        settings.max_tokens,
    )
    job = job_for(checkpoint, source, settings, prompts, left_out)
    reason = f"the prompts are from a generation of {', '.join(theirs)}"
    job.choices.extend([Choice(what="steps that failed", value="not made again", reason=reason)] if theirs else [])
    return job


_NONE: Mapping[str, str] = MappingProxyType({})


def job_for(
    checkpoint: Checkpoint,
    source: str,
    settings: ProbeSettings,
    prompts: list[Prompt],
    left_out: Mapping[str, str] = _NONE,
    store: WeightStore | None = None,
) -> Job:
    """A job of prompts that are token ids already.

    Args:
        checkpoint, source, settings: as for ``probe``.
        prompts: as token ids.
        left_out: prompts that could not be, and why.
        store: whose tensors are used, of another job of the same checkpoint and memory mode; None to read them.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    device, device_choice = choose_device(settings.device)
    model, why = arranged(checkpoint.config, settings.attention)
    # Asked for as a dtype, fp32 is run anyway, and then it serves as the reference too.
    reference = settings.reference or REFERENCE in settings.dtypes
    passes = ([REFERENCE] if reference else []) + [name for name in settings.dtypes if name != REFERENCE]
    resident, check = True, WeightCheck(passes)
    if why is None:
        resident, memory = choose_memory(settings.memory, device, checkpoint.given_out, working_bytes(model))
        try:
            store = store or WeightStore(checkpoint, model, device, resident, check)
        except NotLayerwise as error:
            model, why = outline(checkpoint.config, settings.attention), str(error)
    if why is not None:
        resident, memory, store = True, _whole(settings.memory, model, why), None
    ways = [device_choice, memory, attention_used(model, settings.attention), *_arithmetic(settings)]
    choices = [*ways, *_notes(checkpoint, left_out, store is not None), *_padding(model, prompts)]
    return Job(source, checkpoint, model, settings, device, resident, store, prompts, choices, passes, check)


def _padding(model: nn.Module, prompts: Sequence[Prompt]) -> Iterator[Choice]:
    """BERT's kin answer from the first token of a row; what generates, or pools by its padding's id, from the last."""
    classifies = type(model).__name__.endswith("ForSequenceClassification") and cache_argument(model) is None
    if classifies and any(row.padding for prompt in prompts for row in prompt.rows):
        reason = "short rows of a batch are answered from their padding; give each text as a prompt of its own"
        yield Choice(what="padding", value="on the left", reason=reason)


def measure(
    job: Job, progress: Progress = silent, on_final: FinalHook | None = None, announce: Announce = untold
) -> Run:
    """Run a job. What it found is not judged here; ``announce`` is told how long many prompts will take."""
    started = time.perf_counter()
    hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qprec-hash")
    with hashing as beside, exact_float32(job.device) as choices:
        beside.submit(weight_files, job.checkpoint)  # loading leaves cores idle; the record finds the hashes made
        job.choices.extend(choices)
        stopped = _run(job, progress, on_final, announce)
    job.seconds["total"] = time.perf_counter() - started
    return _record(job, stopped)


def _whole(memory: str, model: nn.Module, why: str) -> Choice:
    """What is said of a model that runs as a whole."""
    name = type(model).__name__
    if memory == "streamed":
        raise UsageError(f"--memory streamed: {name} is not run layer by layer, but whole ({why}); leave it out.")
    reason = f"{name} is run as transformers loads it, one dtype after another, not layer by layer: {why}"
    return Choice(what="memory", value="whole", reason=reason)


_COMPUTED = {
    "tensor-core": "asked for: products of 16-bit operands are summed in fp32 and rounded once",
    "fp16-accumulate": "asked for: sums of fp16 products are kept in fp16",
}
"""What is said of an arithmetic that is not the machine's own."""


def _arithmetic(settings: ProbeSettings) -> list[Choice]:
    value = settings.arithmetic
    reason = _COMPUTED.get(value)
    return [Choice(what="arithmetic", value=value, reason=reason)] if reason is not None else []


def working_bytes(model: nn.Module) -> int:
    """Bytes of the cast copies that exist at once: the largest layer in fp32 and a 16-bit dtype, or lm_head."""
    _, layers = decoder_layers(model)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    largest: int = max(sum(parameter.numel() for parameter in part.parameters()) for part in (*layers, head))
    return 8 * largest


def _notes(checkpoint: Checkpoint, left_out: Mapping[str, str], layerwise: bool) -> list[Choice]:
    notes = [*checkpoint.notes]
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, why in left_out.items() if why == reason)
        notes.append(Choice(what="prompts left out", value=names, reason=reason))
    if checkpoint.bare and layerwise:
        notes.append(_BARE)
    return notes


_BARE = Choice(what="lm_head", value="not run", reason="the checkpoint has none: a bare model")


def _run(job: Job, progress: Progress, on_final: FinalHook | None, announce: Announce) -> str | None:
    """Run all passes; gives why they stopped early, or None."""
    near = max(job.settings.near_overflow, job.settings.rescue_margin)  # a plan asks where the extreme is
    task = Task(job.passes, near, vocabulary_rows(job), job.settings.arithmetic, job.settings.explain is True)
    passes = (_as_a_whole if job.whole else _layer_by_layer)(job, task, progress, on_final, announce)
    try:
        passes.run()
    except KeyboardInterrupt:
        return "interrupted"
    except QprecError as error:
        return str(error)
    except ENDS:
        raise
    except BaseException as error:
        if out_of_memory(error):
            return f"{OUT_OF_MEMORY} on {job.device}; try --memory streamed, fewer prompts or --max-tokens"
        if is_ours(error):
            raise
        return fault(job.checkpoint.folder, error)
    finally:
        job.seconds.update(passes.seconds)
        if isinstance(passes, Whole) and passes.without_head:
            job.choices.append(_BARE)
    return None


def _layer_by_layer(job: Job, task: Task, progress: Progress, on_final: FinalHook | None, announce: Announce) -> Shadow:
    store = job.store
    assert store is not None
    unused = store.unused(job.model)
    if unused:
        value = unused[0] + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
        job.choices.append(Choice(what="tensors not used", value=value, reason="config.json asks for no such tensor"))
    move_buffers(job.model, job.device)
    return Shadow(job.model, store, encoded(job), task, job.collector, progress, on_final, announce)


def _as_a_whole(job: Job, task: Task, progress: Progress, on_final: FinalHook | None, announce: Announce) -> Whole:
    models = Models(job.checkpoint, job.device, job.settings.attention, headless=True)
    models.check()
    kept = {name for name, _ in job.model.named_buffers()}  # limits may be infinite there, and are no weights
    for number, name in enumerate(job.checkpoint.tensors):
        progress(number, len(job.checkpoint.tensors), "checking the weights")
        if name not in kept:
            models.look(name, job.check)
    return Whole(models, encoded(job), task, job.collector, progress, on_final, announce)


def encoded(job: Job) -> list[Encoded]:
    """The prompts as tensors."""
    return [encode(prompt, job.checkpoint, job.device) for prompt in job.prompts]


def vocabulary_rows(job: Job) -> int:
    """Rows of the vocabulary that lm_head takes at once; 0 for all."""
    return 0 if job.resident else max(1, SLICE_BYTES // (4 * job.checkpoint.text_config.hidden_size))


def _not_run(job: Job) -> list[str]:
    """Modules with weights of their own that no operation was seen in."""
    ran = {module for module, _, _ in job.collector.sites}
    return [path for path, module in job.model.named_modules() if module._parameters and path not in ran]


def _unsteady(job: Job) -> list[Choice]:
    dtypes = [name for name in job.passes if name in job.collector.unsteady]
    reason = f"{' and '.join(dtypes)} gave other numbers when a layer was run again: a place named there may be wrong"
    return [Choice(what="second look", value="differs", reason=reason)] if dtypes else []


def _record(job: Job, stopped: str | None) -> Run:
    checkpoint = job.checkpoint
    return Run(
        tool=f"qprec {__version__}",
        verb="probe",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        stopped=stopped,
        unfinished=None,
        model=model_part(checkpoint, job.source, type(job.model).__name__, len(layers_of(job.model)[1])),
        environment=environment(job.device),
        settings=job.settings.model_dump(),
        choices=[*job.choices, *_unsteady(job)],
        prompts=job.prompts,
        redacted=False,
        dtypes=job.settings.dtypes,
        reference=REFERENCE in job.passes,
        sites=job.collector.site_parts(),
        wider=job.collector.wider,
        casts=job.collector.casts,
        not_run=_not_run(job),
        passes=job.collector.passes(),
        weights=job.check.weights(),
        weight_totals=job.check.totals(),
        scale_faults=job.check.scale_faults(),
        seconds={name: round(value, 3) for name, value in job.seconds.items()},
        logits=job.collector.logits,
        generation=None,
        rescue=None,
        explanation=None,
        sweep=None,
    )
