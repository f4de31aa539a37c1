"""The whole of `qprec probe`: measure, explain, search for triggers, rescue; each as far as it was asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_precision.diagnose.explain import explained
from qwen_precision.diagnose.firsttokens import held_state
from qwen_precision.diagnose.triggers import swept, texts_of
from qwen_precision.probe.run import measure, prepare
from qwen_precision.record.run import Run
from qwen_precision.rescue.deliver import Target, delivered
from qwen_precision.rescue.export import check_folder
from qwen_precision.rescue.plan import Finals
from qwen_precision.settings.config import ProbeSettings
from qwen_precision.settings.prompts import PromptSpec

Progress = Callable[[int, int, str], None]


def diagnose(
    source: str, settings: ProbeSettings, specs: Sequence[PromptSpec], revision: str | None = None,
    target: Target | None = None, progress: Progress = lambda done, total, what: None,
    announce: Callable[[str], None] = lambda sentence: None, on_measured: Callable[[Run], None] = lambda run: None,
    sweep_file: Path | None = None,
) -> Run:  # fmt: skip
    """Probe a checkpoint, tell why it fails, and rescue it.

    Args:
        source, settings, specs, revision, progress: as for ``probe``.
        target: where to write a rescaled checkpoint; None for nowhere.
        announce: called with a sentence before what the user did not ask for by name.
        on_measured: called with the run whenever there is more of it, so that it can be saved.
        sweep_file: where an unfinished sweep is kept, to be taken up again.

    Raises:
        QprecError: as ``probe`` does; or the folder cannot be written.
    """
    texts = texts_of(settings.sweep_texts)
    if settings.sweep is not None:
        held_state(sweep_file)  # a file of the user's in its place is found out now
    job = prepare(source, settings, specs, revision)
    if target is not None:
        check_folder(target.folder, job.checkpoint.folder, target.force)
    before = Finals()
    run = measure(job, progress, before if target is not None else None)
    on_measured(run)
    run = explained(job, run, progress, announce)
    if settings.sweep is not None and run.unfinished is None:
        on_measured(run)
        run = swept(job, run, texts, sweep_file, progress, announce)
    if target is not None and run.unfinished is None:
        on_measured(run)
        run = delivered(job, run, before, specs, target, progress)
    return run
