"""Which sweep is wanted, of what, and what it adds to the run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_precision.diagnose.firsttokens import first_tokens, lengths
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.judge.controls import asked
from qwen_precision.probe.run import Job
from qwen_precision.record.run import Choice, Run

Progress = Callable[[int, int, str], None]
Announce = Callable[[str], None]


def swept(
    job: Job, run: Run, texts: Sequence[str], state_file: Path | None, progress: Progress, announce: Announce
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
            each = next((each for each in asked(judge(run)) if each.position is not None), None)
            if each is None:
                reason = "no prompt fails at a token of its own: there is no length to look for"
                nothing = Choice(what="sweep", value="not run", reason=reason)
                return run.model_copy(update={"choices": [*run.choices, nothing]})
            finding = each.finding
            found = lengths(job, finding.dtype, str(finding.prompt), each.row.ids, progress)
    except KeyboardInterrupt:
        more = "; the same command takes it up again" if state_file is not None and state_file.exists() else ""
        return run.model_copy(update={"unfinished": f"interrupted during the sweep{more}"})
    except QprecError as error:
        return run.model_copy(update={"unfinished": f"the sweep: {str(error).rstrip('.')}"})
    return run.model_copy(update={"sweep": found})


def texts_of(file: str | None) -> list[str]:
    """Texts to sweep over, a line each; none where there is no file.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
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
