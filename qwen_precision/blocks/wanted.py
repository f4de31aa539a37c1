"""What the plans of a folder ask of each checkpoint, and what of it no record holds.

A plan that was given up (a prompt was corrected, blocks were made larger) stays in its folder: what a newer plan asks
for too is asked for once, and what only an older one asks for is named with the file that asks.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from qwen_precision.blocks.folder import Damage, Kept
from qwen_precision.blocks.plan import Block, Item, prompts_said
from qwen_precision.blocks.tally import Group, Tally

_NAMED = 6
"""Stretches of missing prompts that are named."""


class Asked(NamedTuple):
    """A block that a plan asks for."""

    kept: Kept
    source: str
    """The checkpoint, as the plan has it."""
    block: Block


@dataclass
class Wanted:
    """What plans ask of a checkpoint."""

    weights: str = ""
    """Empty where nobody has met them yet."""
    sources: list[str] = field(default_factory=list)
    """What it is called in the plans."""
    plans: list[tuple[Kept, str]] = field(default_factory=list)
    """Each with the name it has there, the oldest first."""
    asked: list[Asked] = field(default_factory=list)
    """Of the newest plan all blocks, of older ones those with a prompt that is in no newer one."""
    prompts: int = 0
    """In all of them."""
    newest: Kept | None = None
    """Of the plans that are about this checkpoint, with whatever settings."""


def wanted(
    plans: Sequence[Kept], found: Mapping[Group, Tally], known: Mapping[tuple[str, str | None], str]
) -> dict[Group, Wanted]:
    """What is asked for, by weights and settings, in the order of the plans and of their checkpoints.

    Args:
        plans: the oldest first.
        found: what there is.
        known: the weights of a name and revision, where they were met.
    """
    made: dict[Group, Wanted] = {}
    for kept in plans:
        for source in kept.plan.sources:
            place = (source, kept.plan.revision)
            for each in _weights(place, kept.plan.settings_digest, found, known):
                # Without weights it is a checkpoint of its own.
                key = Group(each or repr(place), kept.plan.settings_digest)
                mine = made.setdefault(key, Wanted(each))
                mine.sources += [source] if source not in mine.sources else []
                mine.plans.append((kept, source))
    for mine in made.values():
        mine.newest = next(kept for kept in reversed(plans) if not set(mine.sources).isdisjoint(kept.plan.sources))
        _ask(mine)
    return made


def _weights(
    place: tuple[str, str | None],
    settings: str,
    found: Mapping[Group, Tally],
    known: Mapping[tuple[str, str | None], str],
) -> list[str]:
    """Weights that a name and revision stand for; an empty word where nobody can tell.

    As they were met, else as records of these settings call them, or of others; else another spelling of the name.
    """
    if place in known:
        return [known[place]]
    source, revision = place
    every = [group for group, tally in found.items() if source in tally.sources]
    mine = [group.weights for group in every if group.settings == settings] or [group.weights for group in every[:1]]
    path = os.path.normpath(source)
    other = [weights for (name, its), weights in known.items() if (os.path.normpath(name), its) == (path, revision)]
    return mine or other[-1:] or [""]


def _ask(mine: Wanted) -> None:
    several = len({kept.name for kept, _ in mine.plans}) > 1
    claimed: set[str] = set()
    digests: set[str] = set()
    swept = ""
    for kept, source in reversed(mine.plans):
        for block in kept.plan.blocks:
            if block.digest in digests or (block.kind == "sweep" and swept not in ("", kept.name)):
                continue  # of two sweeps the newer one counts
            swept = kept.name if block.kind == "sweep" else swept
            digests.add(block.digest)
            keys = block.keys if several else []
            if several and keys and claimed.issuperset(keys):
                continue
            mine.prompts += len(set(keys) - claimed) if several else block.count if block.kind == "prompts" else 0
            claimed.update(keys)
            mine.asked.append(Asked(kept, source, block))


class Lack(NamedTuple):
    """What is missing of a block."""

    asked: Asked
    places: Sequence[int]
    """Of its prompts; of a part of a sweep none."""
    shard: str
    """The option that measures it, where there were several ranks."""


def lacking(mine: Wanted, tally: Tally, ranks: "Counter[int]") -> list[Lack]:
    """What no record holds.

    Args:
        mine: what is asked for.
        tally: what there is.
        ranks: how many there were, for how many records: most of them tell whose a block was.
    """
    seen: set[str] | None = None
    found: list[tuple[Asked, Sequence[int]]] = []
    for each in mine.asked:
        block = each.block
        if block.digest in tally.blocks and not tally.unfit:
            continue
        if block.kind == "sweep":
            found += [(each, ())] if block.digest not in tally.blocks else []
            continue
        if seen is None:
            seen = {key for there, _ in tally.blocks.values() for key in there.keys} - tally.unfit.keys()
        places = [place for place, key in enumerate(block.keys) if key not in seen]
        found += [(each, places)] if places else []
    of = max(ranks, key=lambda count: (ranks[count], count), default=1)
    owner = {kept.name: kept.plan.owner(of) for kept, _ in mine.plans} if found and of > 1 else {}
    return [Lack(each, places, _shard(owner, each, of)) for each, places in found]


def _shard(owner: Mapping[str, Mapping[Item, int]], asked: Asked, of: int) -> str:
    number = owner.get(asked.kept.name, {}).get(Item(asked.source, asked.block))
    return f", --shard {number + 1}/{of}" if number is not None else ""


class Unseen(NamedTuple):
    """What is missing, in words."""

    stopped: str | None
    missing: tuple[str, ...]
    blocks: int
    do: tuple[str, ...]


def in_words(mine: Wanted, tally: Tally, lacks: Sequence[Lack], damaged: Sequence[Damage]) -> Unseen:
    """What is missing of a checkpoint, and how to come by it.

    Args:
        mine: what is asked for.
        tally: what there is.
        lacks: of ``lacking``.
        damaged: files of the folder that cannot be read; one that would hold a block of these is known by its name.
    """
    words = _stretches(lacks, tally, mine.newest.name if mine.newest is not None else "")
    blocks = {each.kept.plan.key(mine.weights, each.block) for each, _, _ in lacks}
    other = [each.key for each in damaged if each.key not in blocks]
    words = words[:_NAMED] + ([f"and {len(words) - _NAMED} more stretches"] if len(words) > _NAMED else [])
    words += [f"what is in {key}.json" for key in other[:_NAMED]]
    prompts, parts = sum(len(lack.places) for lack in lacks), sum(not lack.places for lack in lacks)
    counted = [f"{prompts:,} of {mine.prompts:,} prompts"] if prompts else []
    counted += [f"{parts} parts of a sweep"] if parts else []
    counted += [f"{len(other)} damaged {'file' if len(other) == 1 else 'files'}"] if other else []
    said = f"not seen: {' and '.join(counted)} ({', '.join(words)})" if words else None
    do = [*_remedies(mine, tally, lacks), *(f"{each.said}." for each in damaged)]
    do = do[:_NAMED] + ([f"And {len(do) - _NAMED} more files."] if len(do) > _NAMED else [])
    return Unseen(said, tuple(words), len(lacks), tuple(do))


def _stretches(lacks: Sequence[Lack], tally: Tally, newest: str) -> list[str]:
    """Neighbours together; a prompt that the checkpoint does not take stands alone, with why."""
    found: list[tuple[str, int, int, str]] = []
    for asked, places, shard in lacks:
        plan = f" of {asked.kept.name}" if asked.kept.name != newest else ""
        if asked.block.kind == "sweep":
            found.append((asked.block.said, 0, 0, f"{shard}{plan}"))
        keys = asked.block.keys
        for place in places:
            first, why = asked.block.first + place, tally.unfit.get(keys[place])
            tail = f" ({why}){plan}" if why else f"{shard}{plan}"
            if found and not why and found[-1] == ("", first - found[-1][2], found[-1][2], tail):
                found[-1] = "", found[-1][1], found[-1][2] + 1, tail
            else:
                found.append(("", first, 1, tail))
    return [f"{said or prompts_said(first, count)}{tail}" for said, first, count, tail in found]


def _remedies(mine: Wanted, tally: Tally, lacks: Sequence[Lack]) -> Iterator[str]:
    """A sentence a plan: its command again, or without its file."""
    newest = mine.newest
    for name, kept in {lack.asked.kept.name: lack.asked.kept for lack in lacks}.items():
        here = [lack for lack in lacks if lack.asked.kept.name == name]
        keys = [lack.asked.block.keys[place] for lack in here for place in lack.places]
        begun = f"begun {datetime.fromtimestamp(kept.when, UTC):%Y-%m-%d %H:%M} UTC"
        if keys and all(key in tally.unfit for key in keys):
            yield f"Correct these rows or take them out, give the command, and remove {kept.name} ({begun})."
        elif newest is None or name == newest.name:
            shards = sorted({lack.shard.removeprefix(", ") for lack in here})
            how = f"given with {shards[0]}" if shards[0] and len(shards) == 1 else "given again"
            how += " for each of these shares" if len(shards) > 1 else ""
            yield f"The command that began {kept.name} ({begun}), {how}, measures what is missing and no more."
        else:
            unlike = "; ".join(newest.plan.unlike(kept.plan)) or "as the newest"
            yield (
                f"{kept.name} ({begun}; {unlike}) asks for it and no newer plan does: give its command again, or "
                "remove that file."
            )
