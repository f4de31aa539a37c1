"""``qprec probe`` into a folder: a rank's share of many checkpoints and prompts, or all ranks of a machine."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

from qwen_precision import report as reporting
from qwen_precision.blocks import Folder, Plan, plan_for
from qwen_precision.cli import terminal
from qwen_precision.cli.signals import follow_launcher, taking_along
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.parents import PARENT, follows
from qwen_precision.render import count
from qwen_precision.settings import BLOCK_PROMPTS, Corpus, ProbeSettings, Rank, texts_of

_STDIN = "-"
_TORCHRUN = "qwen_precision.diagnose.launch"
"""torchrun, as it is started here."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    models: list[str]
    revision: str | None
    settings: ProbeSettings
    texts: list[str]
    """Of ``--prompt``."""
    prompts: str | None
    """Of ``--prompts``."""
    block: int | None
    rank: Rank
    force: bool


@dataclass(frozen=True)
class Shown:
    """How the merged report is shown."""

    format: str | None
    full: bool

    @property
    def name(self) -> str:
        """Of the format."""
        if self.full and self.format:
            raise UsageError("--full and --format: give one of the two.")
        name = self.format or ("table" if self.full else "screen")
        return reporting.format_for(name, None)


def folder_for(output: str | None) -> Path | None:
    """The folder that ``-o`` names: one that is there, or what ends as only a folder does."""
    if output is None or output == _STDIN:
        return None
    is_one = output.endswith(("/", os.sep)) or os.path.isdir(output)
    return Path(output) if is_one else None


def check_alone(flags: Mapping[str, object]) -> None:
    """Options that are about one checkpoint and one record.

    Raises:
        UsageError: one was given.
    """
    given = next((flag for flag, value in flags.items() if value), None)
    if given is not None:
        raise UsageError(f"{given}: is for one checkpoint, probed as a whole; give a file with -o, not a folder.")


def check_one(models: Sequence[str], flags: Mapping[str, object], environment: Mapping[str, str]) -> None:
    """That nothing asks for many where a single record is written.

    Raises:
        UsageError: several checkpoints, an option for ranks, or ranks that would write the same file.
    """
    given = next((flag for flag, value in flags.items() if value is not None), None)
    if given is not None:
        raise UsageError(f"{given}: is for records in a folder; add -o FOLDER/, like -o runs/.")
    if len(models) > 1:
        raise UsageError(f"MODEL: {len(models)} were given, which need a folder for their records; add -o runs/.")
    if environment.get("RANK") and environment.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"-o: {environment['WORLD_SIZE']} ranks would write one file; give a folder, like -o runs/.")


def run(asked: Asked, path: Path, jobs: str | None, shown: Shown, dry: bool, words: Sequence[str]) -> NoReturn:
    """Measure a rank's share into a folder; alone, or as the parent of all ranks, show what they found together.

    Args:
        asked: what is measured.
        path: of the folder.
        jobs: of ``--jobs``.
        shown: how it is shown.
        dry: only say what it would be.
        words: of the command line, for the ranks.

    Raises:
        QprecError: nothing could be measured, or a file not be written.
        typer.Exit: always, else, with the exit code.
    """
    name, rank, settings = shown.name, asked.rank, asked.settings
    source = settings.prompts if not asked.texts or asked.prompts else None
    if (rank.of > 1 or jobs) and _STDIN in (source, *asked.texts):
        raise UsageError("-: only one of several ranks could read standard input; give a file with --prompts.")
    jobs_asked = _jobs(jobs, rank)
    corpus = Corpus(asked.texts, source, asked.block or BLOCK_PROMPTS, settings.max_tokens)
    plan = plan_for(asked.models, asked.revision, settings, corpus, texts_of(settings.sweep_texts))
    folder = Folder(path)
    folder.check()
    if dry:
        _tell(plan, asked, folder)
        raise typer.Exit
    follow_launcher()
    if not folder.holds(plan):
        from qwen_precision.diagnose import check_there  # torch

        check_there(plan.sources, plan.revision)
    folder.prepare()
    folder.keep(plan)
    try:
        if jobs_asked > 1:
            _launch(jobs_asked, words)
        else:
            _measure(asked, plan, corpus, folder)
    except KeyboardInterrupt as error:
        if not follows():
            terminal.error(f"interrupted; the same command goes on from what is in {path}.")
        raise typer.Exit(3) from error
    view = reporting.view([path], settings.fail_on, None, False, [])
    if not terminal.quiet():
        terminal.result(str(terminal.render(view, name)))
    raise typer.Exit(view.exit_code)


def _measure(asked: Asked, plan: Plan, corpus: Corpus, folder: Folder) -> None:
    """This rank's share; one of several ends here, for what they found together is not its to say."""
    rank = asked.rank
    with terminal.progress() as (progress, _):
        from qwen_precision.diagnose import measured_share  # torch

        done = measured_share(plan, corpus, asked.settings, rank, folder, asked.force, progress, terminal.note)
    held = f", {done.busy} held by another process" if done.busy else ""
    failed = f", {done.failed} could not be measured" if done.failed else ""
    terminal.note(f"{rank.said}: {count(done.measured, 'block')} measured, {done.there} were there{held}{failed}")
    if done.errors and not done.measured and not done.there and rank.of == 1:
        raise done.errors[0]
    if rank.of > 1:
        # torchrun ends every rank as soon as one ends with anything but 0.
        raise typer.Exit(3 if done.failed and not rank.launched else 0)


# -- all ranks of this machine ------------------------------------------------------------------------------------


def _jobs(asked: str | None, rank: Rank) -> int:
    """How many ranks to launch; 1 for none."""
    if asked is None:
        return 1
    if rank.launched:
        raise UsageError("--jobs: launches the ranks of a machine, and a launcher runs this one; leave it out.")
    if asked == "auto":
        from qwen_precision.diagnose import cards  # torch

        found = cards()
        if found == 0:
            terminal.note("--jobs auto: no graphics card is here, so one process measures; --jobs N takes more of them")
        return max(1, found)
    if not asked.isdigit() or not 1 <= int(asked) <= 1024:
        raise UsageError(f"--jobs {asked}: expected auto, or how many ranks.")
    return int(asked)


def _launch(ranks: int, words: Sequence[str]) -> None:
    """The same command under torchrun, as so many ranks; it returns when all have ended."""
    kept = _without(words, "--jobs")
    command = [sys.executable, "-m", _TORCHRUN, "--standalone", "--nproc-per-node", str(ranks)]
    terminal.note(f"{ranks} ranks under torchrun")
    threads = str(max(1, (os.cpu_count() or 1) // ranks))  # torchrun would give each rank one
    environment = {"OMP_NUM_THREADS": threads, **os.environ, PARENT: str(os.getpid())}
    child = subprocess.Popen([*command, "-m", "qwen_precision", *kept], start_new_session=True, env=environment)
    with taking_along(child.pid):  # `wait` gives a child some time before it raises, in which a second signal may come
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
    if code:
        raise QprecError("a rank ended early; what was measured is kept, and the same command goes on from there.")


def _without(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    kept: list[str] = []
    value = False
    for word in words:
        if value or word.startswith(f"{option}="):
            value = False
        elif word == option:
            value = True
        else:
            kept.append(word)
    return kept


# -- what it would be ---------------------------------------------------------------------------------------------


def _tell(plan: Plan, asked: Asked, folder: Folder) -> None:
    """The plan, and of each checkpoint of this rank's share what it would take."""
    from qwen_precision.diagnose import check_there, share_told  # torch

    terminal.result(_told(plan, asked.rank, folder))
    with terminal.progress() as (progress, _):
        progress(0, 0, "looking at the checkpoints")
        check_there(plan.sources, plan.revision)
        rows = list(share_told(plan, asked.settings, asked.rank))
    terminal.result(terminal.labelled(rows, 12))


def _told(plan: Plan, rank: Rank, folder: Folder) -> str:
    """The plan, a line each."""
    mine = plan.share(rank.number, rank.of)
    tokens = sum(block.tokens for block in plan.blocks if block.kind == "prompts")
    prompts = [block for block in plan.blocks if block.kind == "prompts"]
    parts = len(plan.blocks) - len(prompts)
    said = f"{rank.said}: {len(mine):,} of {count(len(plan.sources) * len(plan.blocks), 'block')}"
    there = len(folder.records()) if folder.path.is_dir() else 0
    lines = {
        "models": ", ".join(plan.sources[:4]) + (f" and {len(plan.sources) - 4} more" if len(plan.sources) > 4 else ""),
        "prompts": f"{plan.prompts:,} in {count(len(prompts), 'block')}, about {tokens:,} tokens",
        **({"sweep": f"{parts} parts"} if parts else {}),
        "share": f"{said}; first {mine[0].source}, {mine[0].block.said}" if mine else f"{said}: nothing to do",
        "there": f"{count(there, 'record')} in {folder.path}",
    }
    return terminal.labelled(lines.items(), 12)
