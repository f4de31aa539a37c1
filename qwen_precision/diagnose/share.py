"""A rank's share of a plan: what is not there yet is measured, a block at a time, each saved whole or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from qwen_precision.blocks import Block, Folder, Plan, for_block, weights_id
from qwen_precision.diagnose.explain import explained
from qwen_precision.diagnose.firsttokens import first_tokens
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError
from qwen_precision.judge import judge
from qwen_precision.model import Checkpoint, locate
from qwen_precision.probe import OUT_OF_MEMORY, Job, measure, opened, prepared
from qwen_precision.progress import Announce, Progress, said, untold
from qwen_precision.record import Run, joined
from qwen_precision.settings import Corpus, ProbeSettings, PromptBlock, PromptSpec, Rank, texts_of


@dataclass
class Done:
    """What came of a share."""

    measured: int = 0
    there: int = 0
    """Blocks that were measured before."""
    busy: int = 0
    """Blocks that another process holds."""
    failed: int = 0
    errors: list[QprecError] = field(default_factory=list)
    """Of what could not be measured, each sentence once."""

    def note(self, error: QprecError, blocks: int, announce: Announce) -> None:
        """Blocks that could not be measured, and why."""
        self.failed += blocks
        if str(error) not in map(str, self.errors):
            self.errors.append(error)
            announce(str(error))


def measured_share(
    plan: Plan,
    corpus: Corpus,
    settings: ProbeSettings,
    rank: Rank,
    folder: Folder,
    force: bool,
    progress: Progress,
    announce: Announce,
) -> Done:
    """Measure what a rank has to and is not there.

    Args:
        plan: of all ranks.
        corpus: its prompts.
        settings: of the probe.
        rank: whose share it is.
        folder: where records go; it is there.
        force: measure what is there anew.
        progress: as for ``probe``.
        announce: called with a sentence where something could not be measured.

    Raises:
        QprecError: a record cannot be written; what was is whole.
        KeyboardInterrupt: it was interrupted; the block it was at is not there.
    """
    done, texts = Done(), texts_of(settings.sweep_texts)
    mine = plan.share(rank.number, rank.of)
    work = _Work(plan, corpus, _on_card(settings, rank), settings, texts, progress, announce)
    for source, items in groupby(mine, key=lambda item: item.source):
        blocks = [item.block for item in items]
        try:
            path, _ = locate(source, plan.revision)
            weights = weights_id(path)
            work.checkpoint = None
        except QprecError as error:
            done.note(error, len(blocks), announce)
            continue
        for number, block in enumerate(blocks):
            work.told = f"{source}, {block.said} (block {number + 1} of {len(blocks)})"
            _one(work, source, weights, block, folder, rank, force, done)
    return done


def _one(
    work: "_Work", source: str, weights: str, block: Block, folder: Folder, rank: Rank, force: bool, done: Done
) -> None:
    key, share = work.plan.key(weights, block), (rank.number, rank.of)
    with folder.claim(key) as free:
        if not free:
            done.busy += 1
            return
        if not force and folder.is_done(key, share):
            done.there += 1
            return
        try:
            run = work.measured(source, block)
        except QprecError as error:
            done.note(error, 1, work.announce)
            return
        folder.save(key, judge(for_block(run, weights, work.plan, block)), share)
        done.measured += 1


@dataclass
class _Work:
    """How a block is measured."""

    plan: Plan
    corpus: Corpus
    settings: ProbeSettings
    asked: ProbeSettings
    """As they were asked for, whatever the card."""
    texts: Sequence[str]
    progress: Progress
    announce: Announce
    told: str = ""
    checkpoint: Checkpoint | None = None
    """Of the block before, opened; its tokenizer takes a second to read."""

    def measured(self, source: str, block: Block) -> Run:
        """The run of a block.

        Raises:
            QprecError: it could not be measured whole.
            KeyboardInterrupt: it was interrupted.
        """
        specs = self._specs(block)
        run = self._swept(source, specs, block) if block.kind == "sweep" else self._probed(source, specs)
        return run.model_copy(update={"settings": self.asked.model_dump()})

    @cached_property
    def _listed(self) -> dict[int, PromptBlock]:
        """Blocks of the corpus by their first prompt; of thousands, each is asked for once."""
        return {each.first: each for each in self.corpus.blocks}

    def _specs(self, block: Block) -> list[PromptSpec]:
        if block.kind == "sweep":
            return self.corpus.prompts(self._listed[0])[:1]
        return self.corpus.prompts(self._listed[block.first])

    def _probed(self, source: str, specs: list[PromptSpec]) -> Run:
        """All prompts together, or the two halves where they need more memory than there is."""
        settings = self.settings.model_copy(update={"sweep": None, "sweep_limit": None, "sweep_texts": None})
        job = self._job(source, settings, specs)
        measured = measure(job, self._shown())
        if (measured.stopped or "").startswith(OUT_OF_MEMORY) and len(specs) > 1:
            half = len(specs) // 2
            del job, measured
            return joined([self._probed(source, specs[:half]), self._probed(source, specs[half:])])
        run = explained(job, judge(_whole(measured, self.told)), measured, self._shown(), untold)
        return _whole(run, self.told)

    def _swept(self, source: str, specs: list[PromptSpec], block: Block) -> Run:
        job = self._job(source, self.settings.model_copy(update={"explain": False}), specs)
        run = _whole(measure(job, self._shown()), self.told)
        dtype = next((name for name in run.dtypes if name != REFERENCE), REFERENCE)
        limit, part = self.settings.sweep_limit, (block.first, block.count)
        found = first_tokens(job, dtype, limit, self.texts, None, self._shown(), untold, part)
        return run.model_copy(update={"sweep": found})

    def _job(self, source: str, settings: ProbeSettings, specs: list[PromptSpec]) -> Job:
        if self.checkpoint is None:
            self.checkpoint = opened(source, self.plan.revision)
        return prepared(self.checkpoint, source, settings, specs)

    def _shown(self) -> Progress:
        return said(self.told, self.progress)


def _whole(run: Run, told: str) -> Run:
    """The run, if nothing of it is missing."""
    why = run.stopped or run.unfinished
    if why is not None and why.startswith("interrupted"):
        raise KeyboardInterrupt
    if why is not None:
        raise QprecError(f"{told}: {why.rstrip('.')}.")
    return run


def cards() -> int:
    """How many graphics cards of CUDA's this machine has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _on_card(settings: ProbeSettings, rank: Rank) -> ProbeSettings:
    """Where a launcher numbers the processes of a machine, each takes a card of its own, as far as there are cards."""
    if rank.local is None or settings.device not in ("auto", "cuda") or not cards():
        return settings
    return settings.model_copy(update={"device": f"cuda:{rank.local % cards()}"})
