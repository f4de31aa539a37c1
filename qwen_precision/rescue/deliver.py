"""Carry a rescue out: prove it, write it, probe what was written, and keep it only if it is what was promised."""

import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwen_precision.dtypes import REFERENCE, RESCUED
from qwen_precision.judge import Headroom, Report, answer_of, judge
from qwen_precision.probe import Job, encoded, measure, prepare, vocabulary_rows
from qwen_precision.progress import Progress, said, silent
from qwen_precision.qwen3 import name_of, placed
from qwen_precision.record import Exported, Rescue, Run, in_words, rounded
from qwen_precision.rescue.export import NOTE, Exporter, beside
from qwen_precision.rescue.plan import can_plan, with_plan
from qwen_precision.rescue.proof import Finals, prove
from qwen_precision.settings import PromptSpec, Target
from qwen_precision.torch_dtypes import widened
from qwen_precision.version import __version__

_MOST_ERROR = 0.02
"""Relative error of the last answers, where bf16's was not measured: some ten times fp16's on a healthy model."""
_SLACK = 0.99
"""Of the margin: rounding the weights to fp16 moves a magnitude a little."""


def delivered(
    job: Job,
    run: Run,
    before: Finals,
    specs: Sequence[PromptSpec],
    target: Target,
    progress: Progress = silent,
) -> Run:
    """Export the rescaled checkpoint, if that is possible and needed.

    Args:
        job: that the run was made with.
        run: the probe.
        before: what came out of it.
        specs: its prompts.
        target: where to, and how.
        progress: as for ``probe``.

    Raises:
        QprecError: the folder cannot be written.
    """
    if can_plan(run) and run.rescue is None:
        run = with_plan(run, job.checkpoint, job.settings.rescue_margin, progress)
    plan = run.rescue
    if plan is None or plan.rescaling.changes_nothing or not (plan.possible or target.keep):
        return run
    try:
        exported = _carry_out(job, run, plan, before, specs, target, progress)
    except KeyboardInterrupt:
        why = "interrupted while the rescue was carried out; nothing was exported"
        return run.model_copy(update={"unfinished": why})
    return run.model_copy(update={"rescue": plan.model_copy(update={"exported": exported})})


def _carry_out(
    job: Job, run: Run, plan: Rescue, before: Finals, specs: Sequence[PromptSpec], target: Target, progress: Progress
) -> Exported:
    identical, compared = prove(
        job.checkpoint,
        plan.rescaling,
        encoded(job),
        before,
        job.settings.attention,
        job.resident,
        vocabulary_rows(job),
        said("proving", progress),
    )
    exporter = Exporter(job.checkpoint, plan.rescaling, target.dtype, progress)
    with beside(target.folder, target.force) as (folder, finish):
        hashes = exporter.write(folder)
        after = Finals()
        again = prepare(str(folder), job.settings.model_copy(update={"dtypes": [RESCUED], "reference": True}), specs)
        checked = measure(again, said("probing the export", progress), after)
        if checked.stopped == "interrupted":
            raise KeyboardInterrupt
        errors = _errors(run, before, after)
        exported = _judged(run, plan, judge(checked), identical, compared, errors)
        exported = exported.model_copy(
            update={
                "folder": target.folder.name,
                "dtype": target.dtype,
                "bytes": exporter.bytes,
                "kept": exported.verified or target.keep,
            }
        )
        if exported.kept:
            _write_note(folder / NOTE, run, plan, exported, hashes)
            finish()
    return exported


def _judged(
    run: Run, plan: Rescue, report: Report, identical: bool, compared: int, errors: dict[str, float | None]
) -> Exported:
    """Whether what was written keeps the promise."""
    rows = report.headroom.get(RESCUED, [])
    where = _where(report, rows[0]) if rows else ""
    stuck = {(each.layer, each.name) for each in plan.stuck}
    short = next((row for row in rows if row.headroom < plan.margin * _SLACK and _key(report, row) not in stuck), None)
    why = None
    if not identical:
        why = "in fp32 the rescaled model does not equal the original bit for bit"
    elif report.run.stopped:
        why = f"the probe of the exported folder stopped: {report.run.stopped}"
    elif report.verdict[RESCUED] == "fail":
        first = next(each for each in report.findings if each.dtype == RESCUED and each.severity == "error")
        why = f"the exported folder still fails in fp16: {placed(first.place.layer, first.place.name)} ({first.kind})"
    elif short is not None:
        why = f"{_where(report, short)} has {short.headroom:.3g}x headroom, less than {plan.margin:g}x"
    else:
        why = _too_far(errors, answer_of(report.run))
    least = rows[0].headroom if rows and math.isfinite(rows[0].headroom) else None
    return Exported(
        folder="",
        dtype="",
        bytes=0,
        identical=identical,
        compared=compared,
        verdict=report.verdict[RESCUED],
        headroom=least,
        where=where,
        logit_error=errors,
        verified=why is None,
        why=why,
        kept=False,
    )


def _too_far(errors: dict[str, float | None], what: str) -> str | None:
    """Whether the rescued model is further from fp32 than bf16 is, or than any fp16 model should be."""
    after, other = errors["after"], errors.get("bf16")
    if after is None:
        return f"the {what} of the exported folder cannot be compared with fp32's" if len(errors) > 1 else None
    if other is not None and after > other:
        return f"its {what} are {after:.3g} from fp32's, those of bf16 only {other:.3g}: run it in bf16"
    if other is None and after > _MOST_ERROR:
        return f"its {what} are {after:.3g} from fp32's, more than {_MOST_ERROR:g}"
    return None


def _key(report: Report, row: Headroom) -> tuple[int | None, str]:
    site = report.run.sites[row.site]
    return site.layer, name_of(site.module, site.op, site.call)


def _where(report: Report, row: Headroom) -> str:
    return placed(*_key(report, row))


def _errors(run: Run, before: Finals, after: Finals) -> dict[str, float | None]:
    """Relative root mean square error of the last answers (``Finals``) against the original's in fp32."""
    replaced = {each.dtype for each in run.passes if each.reseeded}
    own = [dtype for dtype in run.dtypes if dtype != REFERENCE]
    errors = {dtype: None if dtype in replaced else _error(before, before, dtype) for dtype in own}
    return {**errors, "after": _error(before, after, RESCUED)}


def _error(before: Finals, finals: Finals, dtype: str) -> float | None:
    wrong = total = 0.0
    for (name, prompt), wanted in before.answers.items():
        if name == REFERENCE and (dtype, prompt) in finals.answers:
            wrong += float((widened(finals.answers[dtype, prompt]) - widened(wanted)).square().sum())
            total += float(widened(wanted).square().sum())
    return rounded(math.sqrt(wrong / total)) if total and math.isfinite(wrong) else None


def _write_note(path: Path, run: Run, plan: Rescue, exported: Exported, hashes: dict[str, dict[str, str]]) -> None:
    """What was done, beside the weights; no prompt and no path is in it."""
    note: dict[str, Any] = {
        "tool": f"qprec {__version__}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": {
            "name": run.model.source if run.model.revision else Path(run.model.source).name,
            "revision": run.model.revision,
            "sha256": hashes["source"],
        },
        "margin": plan.margin,
        "rescaling": {**plan.rescaling.model_dump(), "new_eps": plan.rescaling.new_eps},
        "losses": [each.model_dump() for each in plan.losses],
        "verification": exported.model_dump(exclude={"folder", "kept"}),
        "sha256": hashes["written"],
    }
    path.write_text(json.dumps(in_words(note), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
