"""Token ids run once more in one dtype, all together: what control runs and searches for triggers need."""

from collections.abc import Sequence

from qwen_precision.dtypes import REFERENCE
from qwen_precision.probe import Job, job_for, measure
from qwen_precision.progress import Progress
from qwen_precision.record import Prompt, Row, Run
from qwen_precision.settings import as_text


def run_again(
    job: Job,
    dtype: str,
    ids: Sequence[Sequence[int]],
    progress: Progress,
    attention: str | None = None,
    arithmetic: str | None = None,
) -> Run:
    """A run of these rows, each a prompt of its own, without the reference: only whether it stays finite is asked.

    Args:
        job: whose checkpoint, device and memory mode are used.
        dtype: to run in.
        ids: token ids of each row.
        progress: as for ``probe``.
        attention: another implementation than the job's.
        arithmetic: another than the job's.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    tokenizer = job.checkpoint.tokenizer
    prompts = [
        Prompt(
            name=str(n),
            rows=[Row(text="", ids=list(row), tokens=[as_text(i, tokenizer) for i in row], padding=0)],
            failed=None,
        )
        for n, row in enumerate(ids)
    ]
    return run_prompts(job, dtype, prompts, progress, attention, arithmetic)


def run_prompts(
    job: Job,
    dtype: str,
    prompts: list[Prompt],
    progress: Progress,
    attention: str | None = None,
    arithmetic: str | None = None,
) -> Run:
    """The same of whole prompts, batches with their padding; arguments and errors as for ``run_again``."""
    settings = job.settings.model_copy(
        update={
            "dtypes": [dtype],
            "reference": dtype == REFERENCE,
            "memory": "resident" if job.resident else "streamed",
            "attention": attention or job.settings.attention,
            "arithmetic": arithmetic or job.settings.arithmetic,
            "explain": False,
        }
    )
    store = job.store and job.store.checked_before()
    run = measure(job_for(job.checkpoint, job.source, settings, prompts, store=store), progress)
    if run.stopped == "interrupted":
        raise KeyboardInterrupt
    return run


def outcomes(run: Run) -> dict[int, bool]:
    """By row: whether every operation was finite; rows that were not finished are left out."""
    if run.stopped is not None:
        return {}
    return {each.prompt: not each.failed for each in run.passes}
