"""After a failure: the control runs that tell its causes apart, and what else was asked for. What it means is judged.

All controls of one dtype and attention go through the layers together, so a streamed checkpoint is read once for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby

import torch

from qwen_precision.diagnose.again import outcomes, run_again, run_prompts
from qwen_precision.diagnose.replays import run_replays
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError
from qwen_precision.files import sha256_of
from qwen_precision.judge import Candidate, Report, asked, candidates, starts_at
from qwen_precision.model import REDUCED_SUMS, Models, encode, out_of_memory
from qwen_precision.probe import Job
from qwen_precision.progress import Announce, Progress, said
from qwen_precision.record import REPLAYS, Control, ControlKind, Explanation, GreedyMatch, Run
from qwen_precision.settings import PromptSpec, has_template, tokenise
from qwen_precision.watcher import computing

NEW_TOKENS = 16
"""Length of the greedy continuations that are compared."""
_PROMPTS = 4
"""Prompts that are continued."""


def explained(job: Job, report: Report, run: Run, progress: Progress, announce: Announce) -> Run:
    """The run with what tells its causes apart, as its settings ask: after a failure unless told not to.

    Args:
        job: that the run was made with.
        report: what was measured, judged; one that stopped early is not looked into.
        run: the same with what has been added to it since.
        progress: as for ``probe``.
        announce: called with a sentence before controls run.
    """
    wish = job.settings.explain
    if wish is False or run.stopped is not None:
        return run
    wanted = candidates(report, _templates(job, report))
    damaged = sorted({weight.file for weight in run.weights if weight.nan or weight.inf})
    if not wish and not wanted and not damaged:
        return run
    affordable, left_out = wanted[: job.settings.budget], wanted[job.settings.budget :]
    made = Explanation(
        budget=job.settings.budget,
        controls=[],
        hashes={},
        continuations=[],
        left_out=[f"{each.dtype}: {each.what}: beyond --budget {job.settings.budget}" for each in left_out],
    )
    unfinished = run.unfinished
    try:
        if affordable:
            announce(_told(affordable))
        for each in affordable:
            if each.what == "same again":
                _run_same(job, each, report, made, progress)
        run_replays(job, [each for each in affordable if each.what in REPLAYS], made, progress)
        changed = [each for each in affordable if each.what != "same again" and each.what not in REPLAYS]
        _run_controls(job, changed, made, progress)
        made.hashes.update({file: _hash(job, file, progress) for file in damaged})
        if wish:
            made.continuations.extend(_continuations(job, made.left_out, progress))
    except KeyboardInterrupt:
        unfinished = "interrupted while causes were told apart"
    return run.model_copy(update={"explanation": made, "unfinished": unfinished})


def _told(controls: Sequence[Candidate]) -> str:
    names = ", ".join(dict.fromkeys(each.what for each in controls))
    forwards = "forward" if len(controls) == 1 else "forwards"
    return f"telling causes apart with {len(controls)} more {forwards}: {names} (--no-explain leaves them out)"


def _templates(job: Job, report: Report) -> list[Candidate]:
    """For each failing row: the same text with the chat template, or without it."""
    found: list[Candidate] = []
    if not has_template(job.checkpoint.tokenizer):
        return found
    for each in asked(report):
        row = each.row
        if not row.text:
            continue  # ids that no text gives
        plain, chat = PromptSpec(name="x", text=row.text), PromptSpec(name="x", chat=row.text)
        kinds: tuple[tuple[PromptSpec, ControlKind], ...] = (
            (plain, "without the template"),
            (chat, "with the template"),
        )
        for spec, what in kinds:
            ids = _ids_of(job, spec)
            if ids and ids[: len(row.ids)] != row.ids and row.ids[: len(ids)] != ids:
                found.append(
                    Candidate(
                        what,
                        each.finding.dtype,
                        str(each.finding.place.prompt),
                        each.number,
                        tuple(ids),
                        f"the same text {what.replace('the', 'the chat')}",
                    )
                )
    return found


def _ids_of(job: Job, spec: PromptSpec) -> list[int]:
    """Token ids; none where the text has none, or the template fails: that tells nothing."""
    tokenizer, vocabulary = job.checkpoint.tokenizer, job.checkpoint.text_config.vocab_size
    try:
        prompts, _ = tokenise([spec], tokenizer, vocabulary, job.checkpoint.context, job.settings.max_tokens)
    except QprecError:
        return []
    return prompts[0].rows[0].ids


def _run_same(job: Job, each: Candidate, report: Report, made: Explanation, progress: Progress) -> None:
    """Run all failing prompts of a dtype as they were; note of each row whether it fails at the same place again."""
    rows = {(one.finding.place.prompt, one.number): one for one in asked(report) if one.finding.dtype == each.dtype}
    prompts = [prompt for prompt in job.prompts if prompt.name in {name for name, _ in rows}]
    try:
        run = run_prompts(job, each.dtype, prompts, said("controls", progress))
    except QprecError as error:
        made.left_out.append(f"{each.dtype}: {each.what}: {error}")
        return
    if run.stopped is not None:
        made.left_out.append(f"{each.dtype}: {each.what}: {run.stopped}")
        return
    for (prompt, row), one in rows.items():
        was, now = (starts_at(which, each.dtype, str(prompt), row) for which in (report.run, run))
        detail = "the same batch, run again" if one.batched else "the same row, run again"
        if was != now:
            at = f"{now.bad} bad elements first in {now.site.op} of {now.site.module}" if now else "is clean"
            detail = f"{detail}, {at}"
        made.controls.append(
            Control(
                what=each.what if was == now else "same again, otherwise",
                dtype=each.dtype,
                prompt=str(prompt),
                row=row,
                tokens=len(one.row.ids),
                position=None,
                clean=now is None,
                detail=detail,
                began=now.site if now is not None else None,
            )
        )


def _run_controls(job: Job, controls: Sequence[Candidate], made: Explanation, progress: Progress) -> None:
    """Run them, those of one dtype and attention together; each is noted as it is done."""
    for (dtype, attention, full), group in groupby(sorted(controls, key=lambda each: each.job), lambda each: each.job):
        members = list(group)
        # Where sums are kept in fp16 on purpose, no flag of torch's has a part in them.
        wide = "tensor-core" if full and job.settings.arithmetic == "fp16-accumulate" else None
        ids, shown = [each.ids for each in members], said("controls", progress)
        try:
            with _full_reduction() if full else nullcontext():
                run = run_again(job, dtype, ids, shown, attention or None, wide)
        except QprecError as error:
            made.left_out.extend(f"{dtype}: {each.what}: {error}" for each in members)
            continue
        clean = outcomes(run)
        for number, each in enumerate(members):
            if number not in clean:
                made.left_out.append(f"{dtype}: {each.what}: {run.stopped}")
                continue
            start = starts_at(run, dtype, str(number), 0)
            made.controls.append(
                Control(
                    what=each.what,
                    dtype=dtype,
                    prompt=each.prompt,
                    row=each.row,
                    tokens=len(each.ids),
                    position=each.position,
                    clean=clean[number],
                    detail=each.detail,
                    began=start.site if start is not None else None,
                )
            )


@contextmanager
def _full_reduction() -> Iterator[None]:
    """Matrix products on a GPU add up in fp32 throughout; as it was before, afterwards."""
    flags = torch.backends.cuda.matmul
    names = [name for name in REDUCED_SUMS if hasattr(flags, name)]
    before = [getattr(flags, name) for name in names]
    for name in names:
        setattr(flags, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)


def _hash(job: Job, file: str, progress: Progress) -> str:
    """SHA-256 of a damaged shard, to be compared with the one the hub shows."""
    progress(0, 0, f"hashing {file}")
    return sha256_of(job.checkpoint.folder / file)


def _continuations(job: Job, left_out: list[str], progress: Progress) -> list[GreedyMatch]:
    """A few greedy tokens of single-row prompts in every dtype, against those of fp32."""
    if not job.resident:
        left_out.append("greedy continuations: need all weights in memory (--memory resident)")
        return []
    prompts = [prompt for prompt in job.prompts if len(prompt.rows) == 1][:_PROMPTS]
    models = Models(job.checkpoint, job.device, job.settings.attention)
    texts: dict[tuple[str, str], list[int]] = {}
    for dtype in dict.fromkeys([REFERENCE, *job.settings.dtypes]):
        try:
            model = models.get(dtype)
        except QprecError as error:
            left_out.append(f"greedy continuations: {error}")
            return []
        for number, prompt in enumerate(prompts):
            progress(number, len(prompts), f"continuing {NEW_TOKENS} tokens in {dtype}")
            given = encode(prompt, job.checkpoint, job.device)
            try:
                with torch.inference_mode(), computing(job.settings.arithmetic):
                    out = model.generate(
                        given.ids, attention_mask=given.mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
                    )
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                left_out.append(f"greedy continuations: out of memory in {dtype}")
                return []
            texts[dtype, prompt.name] = out[0, given.ids.shape[1] :].tolist()
        models.release(dtype)
    return [
        GreedyMatch(
            dtype=dtype, prompt=name, tokens=len(ours), first_difference=_difference(ours, texts[REFERENCE, name])
        )
        for (dtype, name), ours in texts.items()
        if dtype != REFERENCE
    ]


def _difference(ours: list[int], theirs: list[int]) -> int | None:
    pairs = zip([*ours, None], [*theirs, None], strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), None)
