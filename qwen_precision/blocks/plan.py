"""What is to be measured, in blocks, and whose they are. Pure: every rank comes to the same by itself.

A block is some prompts of the corpus (or some first tokens of a sweep) on one checkpoint; all of them together are a
list, checkpoint by checkpoint. A share of it is a stretch, so that as few ranks as can be read the same weights.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qwen_precision.errors import UsageError
from qwen_precision.record import Many
from qwen_precision.settings import DIGITS, SWEEPS, Corpus, ProbeSettings
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
    hashes: str = ""
    """Of a block of prompts: see ``settings.PromptBlock``."""

    @model_validator(mode="after")
    def _complete(self) -> "Block":
        if len(self.hashes) != (DIGITS * self.count if self.kind == "prompts" else 0):
            raise ValueError("has not a hash for each prompt")
        return self

    @property
    def keys(self) -> list[str]:
        """Hash of each prompt; none of a part of a sweep."""
        return [self.hashes[at : at + DIGITS] for at in range(0, len(self.hashes), DIGITS)]

    def part(self, places: Sequence[int]) -> "Block":
        """Some of its prompts, by their places: a block of their own, unless they are all of them."""
        if len(places) == self.count:
            return self
        keys = self.keys
        hashes = "".join(keys[place] for place in places)
        told = {"count": len(places), "hashes": hashes, "digest": _hash(hashes)[:32]}
        return self.model_copy(
            update={**told, "first": self.first + places[0], "tokens": self.tokens * len(places) // self.count}
        )

    @property
    def said(self) -> str:
        """In words."""
        if self.kind == "sweep":
            return f"part {self.first + 1} of {self.count} of the sweep"
        return prompts_said(self.first, self.count)


def prompts_said(first: int, count: int) -> str:
    """So many prompts, from the ``first``-th (from 0) on, in words."""
    return f"prompt {first + 1}" if count == 1 else f"prompts {first + 1} to {first + count}"


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
        return [item for item, rank in self._ranks(of) if rank == number]

    def owner(self, of: int) -> dict[Item, int]:
        """The rank of every block, where there are so many."""
        return dict(self._ranks(of))

    def _ranks(self, of: int) -> Iterator[tuple[Item, int]]:
        total, before = len(self.sources) * sum(max(1, block.tokens) for block in self.blocks), 0
        for item in self.items():
            cost = max(1, item.block.tokens)
            yield item, (2 * before + cost) * of // (2 * total)  # by its middle
            before += cost

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

    def unlike(self, other: "Plan") -> list[str]:
        """In what another plan differs from this one, in words."""
        keys = sorted({*self.settings, *other.settings})
        pairs = {key: (self.settings.get(key), other.settings.get(key)) for key in keys}
        told = [f"{key} {in_short(theirs)}" for key, (ours, theirs) in pairs.items() if ours != theirs]
        if self.version != other.version:
            told.insert(0, f"made by qprec {other.version}")
        if self.revision != other.revision:
            told.append(f"revision {other.revision or 'of none'}")
        gone = [source for source in other.sources if source not in self.sources]
        told += [f"of {', '.join(gone[:3])}{' and others' if len(gone) > 3 else ''}"] if gone else []
        if [block.digest for block in self.blocks] != [block.digest for block in other.blocks]:
            told.append(f"of {other.prompts:,} prompts in other blocks")
        return told


def in_short(value: object) -> str:
    """The value of a setting in a few words."""
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)[:60]


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
    _check_once(sources)
    if settings.sweep == SWEEPS[1]:
        raise UsageError(f"--sweep {settings.sweep}: is about one prompt; give a file with -o, not a folder.")
    blocks = [
        Block(kind="prompts", **{key: getattr(each, key) for key in ("first", "count", "tokens", "digest", "hashes")})
        for each in corpus.blocks
    ]
    told = that_matter(settings.model_dump(mode="json"))
    if settings.sweep is not None:
        blocks += _parts(settings, blocks[0], texts)
    return Plan(sources=list(sources), revision=revision, settings=told, prompts=corpus.count, blocks=blocks)


def _check_once(sources: Sequence[str]) -> None:
    """That none is there twice, whatever its spelling: ``./A``, ``A/`` and a link to it are one folder."""
    places: dict[str, int] = {}
    for number, source in enumerate(sources):
        path = os.path.expanduser(source)
        is_path = source != "demo" and os.path.exists(path)
        before = places.setdefault(os.path.realpath(path) if is_path else source, number)
        if before != number:
            same = f" ({sources[before]} is the same)" if sources[before] != source else ""
            raise UsageError(f"MODEL: {source} is there twice{same}; give each checkpoint once.")


_NO_MATTER = {"prompts", "fail_on", "memory", "sweep", "sweep_limit", "sweep_texts", "block"}
"""Settings that change no number of a block of prompts; those of a sweep are in the digest of its parts."""


def that_matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's settings those that change what is measured."""
    told = {name: value for name, value in settings.items() if name not in _NO_MATTER}
    # Which card it was makes no difference.
    return {**told, "device": str(settings.get("device", "")).partition(":")[0]}


def _parts(settings: ProbeSettings, block: Block, texts: Sequence[str]) -> Iterator[Block]:
    """Parts of a sweep: each is probed on the first prompt, which tells what computes in which format, and swept."""
    known = len(texts) or settings.sweep_limit
    count = min(_PARTS, max(1, known // _LEAST)) if known else _PARTS
    for number in range(count):
        told = [block.keys[0], "sweep", settings.sweep_limit, list(texts), number, count]
        yield Block(kind="sweep", first=number, count=count, tokens=_PART_TOKENS, digest=_hash(json.dumps(told))[:32])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
