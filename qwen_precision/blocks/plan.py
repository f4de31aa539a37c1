"""What is to be measured, in blocks, and whose they are. Pure: every rank comes to the same by itself.

A block is some prompts of the corpus (or some first tokens of a sweep) on one checkpoint; all of them together are a
list, checkpoint by checkpoint. A share of it is a stretch, so that as few ranks as can be read the same weights.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qwen_precision.errors import UsageError
from qwen_precision.record import Many
from qwen_precision.settings import PREFIX, SWEEPS, Corpus, ProbeSettings
from qwen_precision.version import __version__

_PARTS = 64
"""Into which a whole vocabulary is cut."""
_LEAST = 16
"""First tokens (or texts) of a part, where it is known how many there are."""
_PART_TOKENS = 4096
"""What a part of a sweep counts as, where shares are made."""

_Count = Annotated[int, Field(ge=0, le=2**53)]


class Block(BaseModel):
    """What one record holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prompts", "sweep"]
    first: _Count
    """Number of the first prompt, from 0; of a sweep, which part it is."""
    count: Annotated[int, Field(ge=1, le=2**53)]
    """How many prompts; of a sweep, how many parts there are."""
    tokens: _Count
    """Roughly what it costs."""
    digest: str = Field(max_length=64)
    """Of its prompts."""
    prefixes: str = ""
    """Of a block of prompts: see ``settings.PromptBlock``."""

    def begins_with(self, other: "Block") -> bool:
        """Whether the prompts of another block are its first ones, and not all of them."""
        at = PREFIX * other.count
        return other.count < self.count and self.prefixes[at - PREFIX : at] == other.digest[:PREFIX]

    @property
    def said(self) -> str:
        """In words."""
        if self.kind == "sweep":
            return f"part {self.first + 1} of {self.count} of the sweep"
        last = self.first + self.count
        return f"prompt {last}" if self.count == 1 else f"prompts {self.first + 1} to {last}"


class Item(NamedTuple):
    """A block on a checkpoint."""

    source: str
    block: Block


class Plan(BaseModel):
    """All of it; written into the folder, so that it can be told what is missing there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Literal[1] = 1
    """Version of this form."""
    version: str = __version__
    sources: Many[str]
    revision: str | None
    settings: dict[str, Any]
    """Those that change what is measured."""
    prompts: _Count
    blocks: Many[Block]

    def items(self) -> Iterator[Item]:
        """The whole list, checkpoint by checkpoint."""
        return (Item(source, block) for source in self.sources for block in self.blocks)

    def share(self, number: int, of: int) -> list[Item]:
        """The stretch of the list that is one rank's; all stretches cost about the same, and none overlap.

        Args:
            number: of the rank, from 0.
            of: how many ranks there are.
        """
        total, before, mine = len(self.sources) * sum(max(1, block.tokens) for block in self.blocks), 0, []
        for item in self.items():
            cost = max(1, item.block.tokens)
            if (2 * before + cost) * of // (2 * total) == number:  # by its middle
                mine.append(item)
            before += cost
        return mine

    def owner(self, of: int) -> dict[Item, int]:
        """The rank of every block, where there are so many."""
        return {item: number for number in range(of) for item in self.share(number, of)}

    def text(self) -> str:
        """As it is written: the same plan always gives the same text."""
        return json.dumps(self.model_dump(), ensure_ascii=False, sort_keys=True, indent=1) + "\n"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"plan-{_hash(self.text())[:16]}.json"

    def key(self, weights: str, block: Block) -> str:
        """Name of a record: a hash of weights, prompts, settings and version."""
        return _hash(json.dumps([weights, block.digest, self.settings, self.version], sort_keys=True))[:24]

    @property
    def settings_digest(self) -> str:
        """Of settings and version: records with another one are not merged with these."""
        return _hash(json.dumps([self.settings, self.version], sort_keys=True))[:16]


def plan_for(
    sources: Sequence[str], revision: str | None, settings: ProbeSettings, corpus: Corpus, texts: Sequence[str] = ()
) -> Plan:
    """The plan of a command.

    Args:
        sources: checkpoints as they were typed.
        revision: of hub ids.
        settings: of the probe.
        corpus: its prompts.
        texts: of ``--sweep-texts``.

    Raises:
        UsageError: a checkpoint twice, or a sweep over the lengths of a prompt, which cannot be shared.
    """
    twice = next((source for place, source in enumerate(sources) if source in sources[:place]), None)
    if twice is not None:
        raise UsageError(f"MODEL: {twice} is there twice; give each checkpoint once.")
    if settings.sweep == SWEEPS[1]:
        raise UsageError(f"--sweep {settings.sweep}: is about one prompt; give a file with -o, not a folder.")
    blocks = [
        Block(kind="prompts", **{key: getattr(each, key) for key in ("first", "count", "tokens", "digest", "prefixes")})
        for each in corpus.blocks
    ]
    told = _that_matter(settings)
    if settings.sweep is not None:
        blocks += _parts(settings, blocks[0], texts)
    return Plan(sources=list(sources), revision=revision, settings=told, prompts=corpus.count, blocks=blocks)


_NO_MATTER = {"prompts", "fail_on", "memory", "sweep", "sweep_limit", "sweep_texts"}
"""Settings that change no number of a block of prompts; those of a sweep are in the digest of its parts."""


def _that_matter(settings: ProbeSettings) -> dict[str, Any]:
    told = {name: value for name, value in settings.model_dump(mode="json").items() if name not in _NO_MATTER}
    return {**told, "device": settings.device.partition(":")[0]}  # which card it was makes no difference


def _parts(settings: ProbeSettings, block: Block, texts: Sequence[str]) -> Iterator[Block]:
    """Parts of a sweep: each is probed on the first prompt, which tells what computes in which format, and swept."""
    known = len(texts) or settings.sweep_limit
    count = min(_PARTS, max(1, known // _LEAST)) if known else _PARTS
    for number in range(count):
        told = [block.prefixes[:PREFIX], "sweep", settings.sweep_limit, list(texts), number, count]
        yield Block(kind="sweep", first=number, count=count, tokens=_PART_TOKENS, digest=_hash(json.dumps(told))[:32])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
