"""Which sweep is wanted, of what, and what it adds to the run."""

import time
from collections.abc import Sequence
from pathlib import Path

from qwen_precision.diagnose.again import outcomes, run_again
from qwen_precision.diagnose.firsttokens import first_tokens
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError
from qwen_precision.judge import Report, asked
from qwen_precision.probe import Job
from qwen_precision.progress import Announce, Progress
from qwen_precision.record import Choice, Run, Sweep


def swept(
    job: Job,
    report: Report,
    run: Run,
    texts: Sequence[str],
    state_file: Path | None,
    progress: Progress,
    announce: Announce,
) -> Run:
    """The run with the search for triggers that its settings ask for."""
    kind = job.settings.sweep
    if kind is None or run.stopped is not None:
        return run
    dtype = next((name for name in run.dtypes if name != REFERENCE), REFERENCE)
    try:
        if kind == "first-token":
            limit = job.settings.sweep_limit
            found = first_tokens(job, dtype, limit, texts, state_file, progress, announce)
        else:
            each = next((each for each in asked(report) if each.position is not None), None)
            if each is None:
                reason = "no prompt fails at a token of its own: there is no length to look for"
                nothing = Choice(what="sweep", value="not run", reason=reason)
                return run.model_copy(update={"choices": [*run.choices, nothing]})
            finding = each.finding
            found = lengths(job, finding.dtype, str(finding.place.prompt), each.row.ids, progress)
    except KeyboardInterrupt:
        more = "; the same command takes it up again" if state_file is not None and state_file.exists() else ""
        return run.model_copy(update={"unfinished": f"interrupted during the sweep{more}"})
    except QprecError as error:
        return run.model_copy(update={"unfinished": f"the sweep: {str(error).rstrip('.')}"})
    return run.model_copy(update={"sweep": found})


_SECTIONS = 7
"""Lengths tried together: all go through the layers at once."""


def lengths(job: Job, dtype: str, prompt: str, ids: Sequence[int], progress: Progress) -> Sweep:
    """The shortest prefix of a failing row that fails, and the longest that is clean, taking failure to be monotone.

    Args:
        job, dtype: to run in.
        prompt: its name.
        ids: of the row.
        progress: as for ``probe``.

    Raises:
        QprecError: a pass could not be finished.
    """
    started = time.perf_counter()
    clean, failing, tried = 0, len(ids) + 1, 0
    while failing - clean > 1:
        gap = failing - clean
        steps = sorted({clean + max(1, gap * part // (_SECTIONS + 1)) for part in range(1, _SECTIONS + 1)})
        if not tried:
            steps = sorted({*steps, len(ids)})  # alone, without its batch, the row may not fail at all
        run = run_again(job, dtype, [ids[:length] for length in steps], progress)
        if run.stopped is not None:
            raise QprecError(run.stopped)
        result, tried = outcomes(run), tried + len(steps)
        failing = next((length for n, length in enumerate(steps) if not result[n]), failing)
        clean = max([clean, *(length for n, length in enumerate(steps) if result[n] and length < failing)])
    fails = failing <= len(ids)
    return Sweep(
        kind="length",
        dtype=dtype,
        tried=tried,
        total=tried,
        layers=0,
        over=0,
        worst=[],
        prompt=prompt,
        shortest_failing=failing if fails else None,
        longest_clean=clean,
        seconds=round(time.perf_counter() - started, 3),
    )
