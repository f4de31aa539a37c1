"""The whole of `qprec probe`: measure, explain, search for triggers, rescue; each as far as it was asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_precision.diagnose.explain import explained
from qwen_precision.diagnose.firsttokens import held_state
from qwen_precision.diagnose.triggers import swept
from qwen_precision.errors import UsageError
from qwen_precision.judge import Report, judge, with_engines
from qwen_precision.probe import measure, prepare
from qwen_precision.progress import Announce, Progress, silent
from qwen_precision.record import Run
from qwen_precision.rescue import Finals, check_folder, delivered, unsupported, wanted, with_plan
from qwen_precision.settings import ProbeSettings, PromptSpec, Target, texts_of


def diagnose(
    source: str,
    settings: ProbeSettings,
    specs: Sequence[PromptSpec],
    revision: str | None = None,
    target: Target | None = None,
    progress: Progress = silent,
    announce: Announce = lambda sentence: None,
    on_measured: Callable[[Run], object] = lambda run: None,
    sweep_file: Path | None = None,
) -> Report:
    """Probe a checkpoint, tell why it fails, and rescue it.

    What was measured is judged once; the plan of a rescue, the controls and the search for triggers all start from
    that report. Only what they add to the run is judged again.

    Args:
        source, settings, specs, revision, progress: as for ``probe``.
        target: where to write a rescaled checkpoint; None for nowhere.
        announce: called with a sentence before what the user did not ask for by name.
        on_measured: called with the run whenever there is more of it, so that it can be saved.
        sweep_file: where an unfinished sweep is kept, to be taken up again.

    Where fp16 fails or is at risk, the report has a verdict for every engine that is known.

    Raises:
        QprecError: as ``probe`` does; or the folder cannot be written.
    """
    texts = texts_of(settings.sweep_texts)
    if settings.sweep is not None:
        held_state(sweep_file)  # a file of the user's in its place is found out now
    job = prepare(source, settings, specs, revision, progress)
    if target is not None:
        if job.checkpoint.only_read is not None:
            raise UsageError(f"--rescue-to {target.folder}: {unsupported(job.checkpoint)}.")
        check_folder(target.folder, job.checkpoint.folder, target.force)
    before = Finals()
    measured = judge(measure(job, progress, before if target is not None else None, announce))
    run = measured.run
    on_measured(run)
    if wanted(measured):
        run = with_plan(run, job.checkpoint, settings.rescue_margin, progress)
        on_measured(run)
    run = explained(job, measured, run, progress, announce)
    if settings.sweep is not None and run.unfinished is None:
        on_measured(run)
        run = swept(job, measured, run, texts, sweep_file, progress, announce)
    if target is not None and run.unfinished is None:
        on_measured(run)
        run = delivered(job, run, before, specs, target, progress)
    return with_engines(measured if run is measured.run else judge(run))
