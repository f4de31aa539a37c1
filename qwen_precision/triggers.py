"""Which sweep is wanted, of what, and what it adds to the run."""

from collections.abc import Callable
from pathlib import Path

from qwen_precision.checks import judge
from qwen_precision.controls import failing_rows
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.probe import Job
from qwen_precision.record import Choice, Run
from qwen_precision.sweep import first_tokens, lengths

Progress = Callable[[int, int, str], None]
Announce = Callable[[str], None]


def swept(job: Job, run: Run, state_file: Path | None, progress: Progress, announce: Announce) -> Run:
    """The run with the search for triggers that its settings ask for; interrupted, the same command takes it up again.

    Raises:
        UsageError: a file of texts that cannot be read.
    """
    kind = job.settings.sweep
    if kind is None or run.stopped is not None:
        return run
    dtype = next((name for name in run.dtypes if name != REFERENCE), REFERENCE)
    try:
        if kind == "first-token":
            texts = _texts(job.settings.sweep_texts)
            found = first_tokens(job, dtype, job.settings.sweep_limit, texts, state_file, progress, announce)
        else:
            row = next(iter(failing_rows(judge(run))), None)
            if row is None:
                nothing = Choice(
                    what="sweep", value="not run", reason="no prompt fails: there is no length to look for"
                )
                return run.model_copy(update={"choices": [*run.choices, nothing]})
            found = lengths(job, *row, progress)
    except KeyboardInterrupt:
        return run.model_copy(update={"stopped": "interrupted during the sweep; the same command takes it up again"})
    except QprecError as error:
        if isinstance(error, UsageError):
            raise
        return run.model_copy(update={"stopped": f"the sweep could not go on: {error}"})
    return run.model_copy(update={"sweep": found})


def _texts(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--sweep-texts: cannot read {file} ({why}); expected a text a line.") from error
    if not lines:
        raise UsageError(f"--sweep-texts: {file} is empty; expected a text a line.")
    return lines
