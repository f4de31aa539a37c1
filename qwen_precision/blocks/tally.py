"""What the records of a folder say, told by their summaries, one at a time.

A ``Tally`` of some records and one of others make the tally of all: it does not matter which are taken first.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qwen_precision.blocks.folder import Damage, Folder, damage, summarised
from qwen_precision.blocks.plan import Block
from qwen_precision.blocks.summary import Summary, read_summary
from qwen_precision.judge import Bought, Sums
from qwen_precision.record import LogitsCost, joined_logits

WORST = 10
"""Prompts that are named of a dtype."""


class Group(NamedTuple):
    """What is merged: records of the same weights, whatever they were called, and the same settings."""

    weights: str
    settings: str


class Best(NamedTuple):
    """The prompt that is worst in something; of equals the first of the corpus."""

    score: float
    first: int
    prompt: int
    path: str


@dataclass
class Tally:
    """What some records of a group say together: a number a prompt and dtype, and whose prompts stand for all."""

    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of each; one that is in two records is there twice."""
    sources: "Counter[str]" = field(default_factory=Counter)
    """What the weights were called, in how many records."""
    rooms: "dict[str, array[float]]" = field(default_factory=dict)
    """By dtype: least headroom; NaN where there is none."""
    places: "dict[str, array[int]]" = field(default_factory=dict)
    """By dtype: where it fails first, a number of ``names``; -1 where it does not."""
    names: dict[str, int] = field(default_factory=dict)
    best: dict[str, Best] = field(default_factory=dict)
    worst: dict[str, list[tuple[bool, float, int, str]]] = field(default_factory=dict)
    """By dtype: not failing, headroom, hash and name of the worst few."""
    fails: dict[str, list[tuple[int, int, int, str]]] = field(default_factory=dict)
    """By dtype: of each prompt that fails the first of its block, its place there, its hash and name."""
    counted: set[int] = field(default_factory=set)
    """Hashes of those among ``worst`` and ``fails`` whose name only counts."""
    unfit: dict[str, str] = field(default_factory=dict)
    """By hash: prompts that the checkpoint does not take, and why."""
    blocks: dict[str, tuple[Block, str]] = field(default_factory=dict)
    """By digest of its prompts: each block, and the path of its record."""
    sums: dict[str, tuple[list[int], dict[str, Sums], dict[str, Bought]]] = field(default_factory=dict)
    """By digest of a block: its prompts, and by dtype what precision is made of and what float32 logits are worth."""
    logits: LogitsCost | None = None
    """What they take."""
    ranks: "Counter[int]" = field(default_factory=Counter)
    """Under how many ranks they were measured."""

    @classmethod
    def of(cls, summary: Summary, path: Path) -> "Tally":
        """Of one record."""
        made = cls(array("Q", summary.prompts))
        for dtype, rows in summary.rows.items():
            rooms = [math.nan if row.room is None else math.inf if row.room < 0 else row.room for row in rows]
            made.rooms[dtype] = array("d", rooms)
            made.places[dtype] = array(
                "q", [made.names.setdefault(row.where, len(made.names)) if row.fails else -1 for row in rows]
            )
            told = list(zip(rows, rooms, summary.prompts, summary.names, strict=True))
            few = sorted((not row.fails, room, key, name) for row, room, key, name in told if room == room)
            made.worst[dtype] = few[:WORST]
            failing = [(at, key, name) for at, (row, _, key, name) in enumerate(told) if row.fails]
            made.fails[dtype] = [(summary.block.first, at, key, name) for at, key, name in failing]
        for key, score, prompt in summary.standing:
            made.best[key] = Best(score, summary.block.first, prompt, str(path))
        made.blocks[summary.block.digest] = summary.block, str(path)
        named = {key for few in made.worst.values() for _, _, key, _ in few}
        named |= {key for few in made.fails.values() for _, _, key, _ in few}
        made.counted = named & {summary.prompts[number] for number in summary.counted}
        made.unfit, made.logits = dict(summary.unfit), summary.logits
        made.sums[summary.block.digest] = list(summary.prompts), dict(summary.sums), dict(summary.bought)
        made.sources[summary.source] += 1
        made.ranks[summary.share[1]] += 1
        return made

    def take(self, other: "Tally") -> None:
        """Become the tally of both."""
        number = {place: self.names.setdefault(name, len(self.names)) for name, place in other.names.items()}
        before = len(self.prompts)
        self.prompts.extend(other.prompts)
        for dtype, rooms in other.rooms.items():
            if dtype not in self.rooms:
                self.rooms[dtype], self.places[dtype] = array("d", [math.nan] * before), array("q", [-1] * before)
            self.rooms[dtype].extend(rooms)
            self.places[dtype].extend(number.get(place, -1) for place in other.places[dtype])
            few = {*self.worst.get(dtype, ()), *other.worst[dtype]}
            self.worst[dtype] = sorted(few)[:WORST]
            self.fails.setdefault(dtype, []).extend(other.fails[dtype])
        for key, best in other.best.items():
            self.best[key] = min(self.best.get(key, best), best)
        for digest, found in other.blocks.items():
            self.blocks[digest] = min(self.blocks.get(digest, found), found, key=lambda each: each[1])
        self.sums.update((digest, other.sums[digest]) for digest in other.sums if digest not in self.sums)
        self.counted |= other.counted
        self.unfit.update(other.unfit)
        self.logits = joined_logits(self.logits, other.logits)
        self.sources.update(other.sources)
        self.ranks.update(other.ranks)


def tallies(folder: Folder) -> tuple[dict[Group, Tally], list[Damage]]:
    """What the records of a folder say, by group, and those that cannot be read. A record without a summary that fits
    is opened, which takes longer.

    Raises:
        QprecError: the folder cannot be read.
    """
    found: dict[Group, Tally] = {}
    damaged = []
    for path in folder.records():
        summary = read_summary(path) or summarised(path)
        if summary is not None:
            found.setdefault(Group(summary.weights, summary.settings), Tally()).take(Tally.of(summary, path))
        elif (wrong := damage(path)) is not None:
            damaged.append(wrong)
    return found, damaged
