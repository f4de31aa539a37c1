"""A rank's share of a plan: what is not there yet is measured, a block at a time, each saved whole or not at all."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from qwen_precision.blocks import Block, Folder, Plan, Told, for_block, weights_id
from qwen_precision.diagnose.explain import explained
from qwen_precision.diagnose.firsttokens import first_tokens
from qwen_precision.dtypes import REFERENCE
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.judge import judge
from qwen_precision.model import Checkpoint, asked_once, download_bytes, is_here, locate
from qwen_precision.probe import OUT_OF_MEMORY, Job, Load, dry_run, measure, opened, prepared
from qwen_precision.progress import Announce, Progress, said, untold
from qwen_precision.record import Run, joined
from qwen_precision.render import count
from qwen_precision.settings import (
    Corpus,
    ProbeSettings,
    PromptBlock,
    PromptSpec,
    Rank,
    has_template,
    is_counted,
    texts_of,
    tokenise,
)


def check_there(sources: Sequence[str], revision: str | None) -> None:
    """That all checkpoints can be found, before any is measured: a typo is to cost nothing and leave nothing behind.

    Nothing is downloaded; of one on the hub, its list of files is asked for.

    Raises:
        QprecError: one cannot be found.
    """
    for source in sources:
        if not is_here(source, revision):
            with asked_once():
                download_bytes(source, revision)
            continue
        path, _ = locate(source, revision)
        if path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf")):
            raise QprecError(f"{source}: holds no config.json and no GGUF file; is this the right folder?")


def share_told(plan: Plan, settings: ProbeSettings, rank: Rank) -> Iterator[tuple[str, str]]:
    """What a rank's share would take: a name and a sentence each, checkpoint by checkpoint; no weight is read.

    Raises:
        QprecError: as ``dry_run`` does.
    """
    plain = settings.model_copy(update={"sweep": None, "sweep_limit": None, "sweep_texts": None})
    for source, items in groupby(plan.share(rank.number, rank.of), key=lambda item: item.source):
        every = [item.block for item in items]
        blocks = [block for block in every if block.kind == "prompts"]
        parts = len(every) - len(blocks)
        prompts, tokens = sum(block.count for block in blocks), sum(block.tokens for block in blocks)
        told = f"{count(prompts, 'prompt')} in {count(len(blocks), 'block')}" if blocks else ""
        more = f"{count(parts, 'part')} of the sweep, whose time is not told" if parts else ""
        yield "model", f"{source}: {', '.join(each for each in (told, more) if each)}"
        load = Load(prompts, tokens, len(every))
        for key, what in dry_run(source, plain, [_ANY], plan.revision, load):
            if key in _TOLD:
                yield f"  {key}", what


_TOLD = ("download", "device", "memory", "memory and time", "time")
_ANY = PromptSpec(name="any", text="a")
"""What stands for all prompts where none is run."""


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
        except QprecError as error:
            done.note(error, len(blocks), announce)
            continue
        folder.remember(source, plan.revision, weights)
        work.begin(source, weights, set() if force else folder.seen(plan, weights))
        for number, block in enumerate(blocks):
            work.told = f"{source}, {block.said} (block {number + 1} of {len(blocks)})"
            _one(work, block, folder, rank, force, done)
    return done


def _one(work: "_Work", block: Block, folder: Folder, rank: Rank, force: bool, done: Done) -> None:
    share = (rank.number, rank.of)
    if not force and folder.is_done(work.plan.key(work.weights, block), share):
        done.there += 1
        return
    places = [place for place, key in enumerate(block.keys) if key not in work.seen]
    if block.kind == "prompts" and not places:
        done.there += 1  # each of its prompts is in a block of another plan
        return
    part = block.part(places) if block.kind == "prompts" else block
    key = work.plan.key(work.weights, part)
    with folder.claim(key) as free:
        if not free:
            done.busy += 1
            return
        if not force and folder.is_done(key, share):
            done.there += 1
            return
        try:
            run = work.measured(block, part, places)
        except QprecError as error:
            done.note(error, 1, work.announce)
            return
        folder.save(key, judge(run), share)
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
    source: str = ""
    weights: str = ""
    seen: Set[str] = frozenset()
    """Hashes of prompts that records of other plans hold."""
    checkpoint: Checkpoint | None = None
    """Of the block before, opened; its tokenizer takes a second to read."""

    def begin(self, source: str, weights: str, seen: Set[str]) -> None:
        """Go on with another checkpoint."""
        self.source, self.weights, self.seen, self.checkpoint = source, weights, seen, None

    def measured(self, block: Block, part: Block, places: Sequence[int]) -> Run:
        """The run of a block, or of the prompts at these places of it, which says so.

        Raises:
            QprecError: it could not be measured whole.
            KeyboardInterrupt: it was interrupted.
        """
        listed = self._listed[0 if block.kind == "sweep" else block.first]
        specs = self.corpus.prompts(listed)
        keys = Block(kind="prompts", first=0, count=listed.count, tokens=0, digest="", hashes=listed.hashes).keys
        told = {
            spec.name: Told(key, is_counted(spec.name, number))
            for number, (spec, key) in enumerate(zip(specs, keys, strict=True), listed.first + 1)
        }
        if block.kind == "sweep":
            run, unfit = self._swept(self.source, specs[:1], block), dict[str, str]()
        else:
            run, unfit = self._fitting(block, [specs[place] for place in places])
        run = run.model_copy(update={"settings": self.asked.model_dump()})
        return for_block(run, self.weights, self.plan, part, told, {told[name].key: unfit[name] for name in unfit})

    @cached_property
    def _listed(self) -> dict[int, PromptBlock]:
        """Blocks of the corpus by their first prompt; of thousands, each is asked for once."""
        return {each.first: each for each in self.corpus.blocks}

    def _fitting(self, block: Block, specs: list[PromptSpec]) -> tuple[Run, dict[str, str]]:
        """The run of those prompts that the checkpoint takes, and by name why it does not take the others."""
        try:
            return self._probed(self.source, specs), {}
        except UsageError:
            unfit = self._unfit(specs)
            fit = [spec for spec in specs if spec.name not in unfit]
            if not unfit or not fit:
                raise
        for name, why in unfit.items():
            where = self.corpus.where(self._listed[block.first], name)
            self.announce(f"{self.source}: {where}{name} is left out, it {why}")
        return self._probed(self.source, fit), unfit

    def _unfit(self, specs: Sequence[PromptSpec]) -> dict[str, str]:
        """By name: why a prompt alone is not taken. A chat prompt without a template is left out anyway."""
        checkpoint, found = self._opened(self.source), {}
        config, tokenizer = checkpoint.text_config, checkpoint.tokenizer
        for spec in specs:
            try:
                if not spec.templated or has_template(tokenizer):
                    tokenise([spec], tokenizer, config.vocab_size, checkpoint.context, self.settings.max_tokens)
            except UsageError as error:
                found[spec.name] = str(error).removeprefix(f"prompt {spec.name!r}: ").rstrip(".")
        return found

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
        return prepared(self._opened(source), source, settings, specs)

    def _opened(self, source: str) -> Checkpoint:
        if self.checkpoint is None:
            self.checkpoint = opened(source, self.plan.revision)
        return self.checkpoint

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
