"""A folder of records as one report a checkpoint. Records are told by their summaries, one at a time; only the prompts
that are worst somewhere are opened again.

A ``Tally`` of some records and one of others make the tally of all: it does not matter which are taken first.
"""

import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from qwen_precision.blocks.folder import Folder, summarised
from qwen_precision.blocks.plan import Block, Item, Plan
from qwen_precision.blocks.summary import Summary, read_summary, without_block
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.judge import SHARES, Across, Bought, Corpus, Report, Sums, judge, together
from qwen_precision.record import LogitsCost, Model, Run, joined, joined_logits, load, unmeasured
from qwen_precision.settings import SEVERITIES

_OPENED = 256
"""Prompts that are opened again at most: those of findings first."""
_WORST = 10
"""Prompts that are named of a dtype."""
_NAMED = 6
"""Stretches of missing blocks that are named."""


class Group(NamedTuple):
    """What is merged: records of the same weights and settings."""

    source: str
    revision: str | None
    weights: str
    settings: str


class Best(NamedTuple):
    """The prompt that is worst in something; of equals the first of the corpus."""

    score: float
    first: int
    prompt: int
    path: str


class Numbers(NamedTuple):
    """What a block says of numbers that are added up over prompts, or of the largest."""

    prompts: list[int]
    """A hash of each."""
    sums: dict[str, Sums]
    """By dtype: what precision is made of."""
    bought: dict[str, Bought]
    """By dtype: what a softmax in float32 is worth."""
    logits: LogitsCost | None


@dataclass
class Tally:
    """What some records of a group say together: a number a prompt and dtype, and whose prompts stand for all."""

    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    """A hash of each; one that is in two records is there twice."""
    rooms: "dict[str, array[float]]" = field(default_factory=dict)
    """By dtype: least headroom; NaN where there is none."""
    places: "dict[str, array[int]]" = field(default_factory=dict)
    """By dtype: where it fails first, a number of ``names``; -1 where it does not."""
    names: dict[str, int] = field(default_factory=dict)
    best: dict[str, Best] = field(default_factory=dict)
    worst: dict[str, list[tuple[bool, float, int, str]]] = field(default_factory=dict)
    """By dtype: not failing, headroom, hash and name of the worst few."""
    blocks: dict[str, tuple[Block, str]] = field(default_factory=dict)
    """By digest of its prompts: each block, and the path of its record."""
    numbers: dict[str, Numbers] = field(default_factory=dict)
    """By digest of a block."""
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
            told = zip(rows, rooms, summary.prompts, summary.names, strict=True)
            few = sorted((not row.fails, room, key, name) for row, room, key, name in told if room == room)
            made.worst[dtype] = few[:_WORST]
        for key, score, prompt in summary.standing:
            made.best[key] = Best(score, summary.block.first, prompt, str(path))
        made.blocks[summary.block.digest] = summary.block, str(path)
        made.numbers[summary.block.digest] = Numbers(
            list(summary.prompts), dict(summary.sums), dict(summary.bought), summary.logits
        )
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
            self.worst[dtype] = sorted(few)[:_WORST]
        for key, best in other.best.items():
            self.best[key] = min(self.best.get(key, best), best)
        for digest, found in other.blocks.items():
            self.blocks[digest] = min(self.blocks.get(digest, found), found, key=lambda each: each[1])
        self.numbers = {**other.numbers, **self.numbers}
        self.ranks.update(other.ranks)


def tallies(folder: Folder, passed_over: Collection[tuple[str, str]] = ()) -> dict[Group, Tally]:
    """What the records of a folder say, by group. A record without a summary that fits is opened, which takes longer.

    Args:
        folder: of records.
        passed_over: digests of settings and of blocks that do not count.

    Raises:
        QprecError: the folder cannot be read.
    """
    found: dict[Group, Tally] = {}
    for path in folder.records():
        summary = read_summary(path) or summarised(path)
        if summary is not None and (summary.settings, summary.block.digest) not in passed_over:
            group = Group(summary.source, summary.revision, summary.weights, summary.settings)
            found.setdefault(group, Tally()).take(Tally.of(summary, path))
    return found


def reports(folder: Folder) -> list[Report]:
    """A report for every checkpoint of a folder's plans, by the order of the plans; also for what was not seen at all.

    Raises:
        QprecError: the folder cannot be read, or holds nothing of the kind.
    """
    plans = folder.plans()
    outgrown = {(plan.settings_digest, digest) for plan in plans for digest in _outgrown(plan, plans)}
    found = tallies(folder, outgrown)
    made: list[tuple[str, Report]] = []
    for source, digest in {(source, plan.settings_digest): None for plan in plans for source in plan.sources}:
        groups = [group for group in found if (group.source, group.settings) == (source, digest)]
        about = [plan for plan in plans if source in plan.sources and plan.settings_digest == digest]
        blocks = {
            block.digest: block for plan in about for block in plan.blocks if (digest, block.digest) not in outgrown
        }
        wanted = _Wanted(source, about, blocks)
        made += [(source, _report(wanted, found.pop(group))) for group in groups] or [
            (source, _report(wanted, Tally()))
        ]
    made += [(group.source, _report(_Wanted(group.source, [], {}), tally)) for group, tally in found.items()]
    if not made:
        raise QprecError(f"{folder.path}: holds no records of a `qprec probe -o FOLDER`; give the folder it wrote.")
    return _named(made)


def _outgrown(plan: Plan, plans: Iterable[Plan]) -> Iterator[str]:
    """Digest of the last block of a plan whose corpus has grown since: a fuller block stands in its place."""
    mine = [block for block in plan.blocks if block.kind == "prompts"]
    for other in plans:
        same = plan.settings_digest == other.settings_digest and set(plan.sources) <= set(other.sources)
        theirs = other.blocks[len(mine) - 1 : len(mine)] if same else []
        if mine and any(block.kind == "prompts" and block.begins_with(mine[-1]) for block in theirs):
            yield mine[-1].digest


class _Wanted(NamedTuple):
    """What plans ask of a checkpoint."""

    source: str
    plans: list[Plan]
    blocks: dict[str, Block]
    """By digest."""


def _named(made: list[tuple[str, Report]]) -> list[Report]:
    """Each with a name of its own: the checkpoint, and where that is there twice, which."""
    count, seen = Counter(source for source, _ in made), Counter[str]()
    named = []
    for source, report in made:
        seen[source] += 1
        named.append(replace(report, name=source if count[source] == 1 else f"{source} ({seen[source]})"))
    return named


def _report(wanted: _Wanted, tally: Tally) -> Report:
    missing = _missing(wanted, tally)
    blocks = {*wanted.blocks, *tally.blocks}
    words = _in_words(missing)
    stopped = f"not seen: {len(missing)} of {len(blocks)} blocks ({', '.join(words)})" if missing else None
    standing = _standing(tally)
    runs = list(_opened(tally, standing[:_OPENED]))
    try:
        run = without_block(joined(runs)) if runs else _unseen(wanted)
    except ValueError as error:
        raise QprecError(f"{standing[0][1]}: does not belong to the records beside it ({error}); remove it.") from error
    numbers = _summed(tally)
    corpus = Corpus(
        prompts=len(set(tally.prompts)),
        blocks=len(blocks),
        missing=tuple(words),
        missing_blocks=len(missing),
        across=tuple(_across(tally)),
        record=standing[0][1] if standing else "",
        sums=numbers.sums,
        bought=numbers.bought,
        left_out=len(standing[_OPENED:]),
    )
    return judge(run.model_copy(update={"stopped": stopped, "seconds": {}, "logits": numbers.logits}), corpus=corpus)


def _summed(tally: Tally) -> Numbers:
    """Those of all prompts: of blocks that share a prompt the first in the corpus counts alone."""
    seen, sums, logits = set[int](), dict[str, Sums](), None
    bought: dict[str, list[Bought]] = {}
    for digest in sorted(tally.numbers, key=lambda digest: (tally.blocks[digest][0].first, digest)):
        each = tally.numbers[digest]
        if not seen.isdisjoint(each.prompts):
            continue
        seen.update(each.prompts)
        sums |= {dtype: sums[dtype] + more if dtype in sums else more for dtype, more in each.sums.items()}
        for dtype, found in each.bought.items():
            bought.setdefault(dtype, []).append(found)
        logits = joined_logits(logits, each.logits)
    return Numbers([], sums, {dtype: together(found) for dtype, found in bought.items()}, logits)


def _standing(tally: Tally) -> list[tuple[int, str, int]]:
    """First prompt of the block, path of the record and number of each prompt that is worst in something; those of
    findings come first."""
    ordered = sorted(tally.best.items(), key=lambda item: (item[0].partition(" ")[0] not in SEVERITIES, item[1]))
    return list(dict.fromkeys((best.first, best.path, best.prompt) for _, best in ordered))


def _opened(tally: Tally, standing: list[tuple[int, str, int]]) -> Iterator[Run]:
    """Records with these prompts alone, in the order of the corpus; every part of a sweep, a record after another."""
    wanted: dict[tuple[int, str], set[int]] = {}
    for first, path, prompt in standing:
        wanted.setdefault((first, path), set()).add(prompt)
    parts = {
        (block.first, block.count): (block.first, path)
        for block, path in tally.blocks.values()
        if block.kind == "sweep"
    }
    for place in sorted({*wanted, *parts.values()}):
        yield load(Path(place[1]), wanted.get(place, set()))


def _unseen(wanted: _Wanted) -> Run:
    """A run of a checkpoint of which nothing was measured."""
    plan = wanted.plans[0]
    asked = plan.settings.get("dtypes")
    dtypes = [each for each in asked if each in DTYPES] if isinstance(asked, list) else []
    model = Model(
        source=wanted.source,
        revision=plan.revision,
        architecture="not seen",
        layers=0,
        hidden_size=0,
        vocabulary=0,
        parameters=0,
        weight_bytes=0,
        source_dtype="weights not seen",
        tied_embeddings=False,
        files=[],
    )
    return unmeasured(model, plan.settings, dtypes, f"qprec {plan.version}")


def _across(tally: Tally) -> Iterator[Across]:
    """What came of all prompts, each counted once."""
    first = {key: place for place, key in reversed(list(enumerate(tally.prompts)))}
    names = {place: name for name, place in tally.names.items()}
    for dtype, rooms in tally.rooms.items():
        places = Counter(tally.places[dtype][place] for place in first.values())
        fine = places.pop(-1, 0)
        ordered = sorted(places.items(), key=lambda item: (-item[1], names[item[0]]))
        told = sorted(rooms[place] for place in first.values() if rooms[place] == rooms[place])
        yield Across(
            dtype=dtype,
            failing=len(first) - fine,
            places=tuple((names[place], count) for place, count in ordered),
            quantiles=tuple((share, told[min(len(told) - 1, int(share * len(told)))]) for share in SHARES if told),
            worst=tuple((name, room) for _, room, _, name in tally.worst[dtype]),
        )


def _missing(wanted: _Wanted, tally: Tally) -> list[tuple[Block, str]]:
    """Blocks of the plans without a record, and the rank that would have measured them, as most others were."""
    left = {digest: block for digest, block in wanted.blocks.items() if digest not in tally.blocks}
    of = max(tally.ranks, key=lambda count: (tally.ranks[count], count), default=1)
    if not left or of == 1:
        return [(block, "") for block in left.values()]
    owner = {item: number for plan in wanted.plans for item, number in plan.owner(of).items()}
    said = {block: owner.get(Item(wanted.source, block)) for block in left.values()}
    return [(block, f", share {number + 1} of {of}" if number is not None else "") for block, number in said.items()]


def _in_words(missing: list[tuple[Block, str]]) -> list[str]:
    """Neighbours together."""
    stretches: list[tuple[Block, str]] = []
    for block, share in missing:
        last, by = stretches[-1] if stretches else (None, "")
        beside = last is not None and last.kind == block.kind == "prompts" and last.first + last.count == block.first
        if last is not None and beside and by == share:
            stretches[-1] = last.model_copy(update={"count": last.count + block.count}), share
        else:
            stretches.append((block, share))
    words = [f"{block.said}{share}" for block, share in stretches[:_NAMED]]
    return words + ([f"and {len(stretches) - _NAMED} more stretches"] if len(stretches) > _NAMED else [])
