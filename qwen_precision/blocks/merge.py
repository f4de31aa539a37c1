"""A folder of records as one report a checkpoint: judged from its tally and from the prompts that are worst somewhere,
which alone are opened again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qwen_precision.blocks.folder import Damage, Folder
from qwen_precision.blocks.names import Called, names_of, once
from qwen_precision.blocks.plan import that_matter
from qwen_precision.blocks.summary import block_of, without_block
from qwen_precision.blocks.tally import Tally, tallies
from qwen_precision.blocks.wanted import Wanted, in_words, lacking, wanted
from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import QprecError
from qwen_precision.judge import SHARES, Across, Bought, Corpus, Report, Sums, judge, together
from qwen_precision.record import Model, Run, joined, load, renamed, unmeasured
from qwen_precision.settings import SEVERITIES, numbered

_OPENED = 256
"""Prompts that are opened again at most: those of findings first."""


def reports(folder: Folder) -> list[Report]:
    """A report for every checkpoint of a folder's plans, by the order of the plans; also for what was not seen at all.

    Raises:
        QprecError: the folder cannot be read, or holds nothing of the kind.
    """
    plans, damaged = folder.plans()
    found, broken = tallies(folder)
    damaged += broken
    asked = wanted(plans, found, folder.known())
    replaced = Counter[str]()
    current, named = {one.weights for one in asked.values()}, {name for one in asked.values() for name in one.sources}
    for group in sorted(found.keys() - asked.keys(), key=lambda group: (min(found[group].sources), group)):
        if group.weights not in current and named.issuperset(found[group].sources):
            replaced.update(dict.fromkeys(found[group].sources, len(set(found[group].prompts))))
        else:
            asked[group] = Wanted(group.weights, sorted(found[group].sources))
    if not asked:
        said = "; ".join(each.said for each in damaged[:3])
        why = f"holds nothing that can be read: {said}." if damaged else "holds no records of a `qprec probe -o FOLDER`"
        raise QprecError(f"{folder.path}: {why}" if damaged else f"{folder.path}: {why}; give the folder it wrote.")
    mine = {each.kept.plan.key(one.weights, each.block): group for group, one in asked.items() for each in one.asked}
    made = []
    for group, one in asked.items():
        ranks = sum((each.ranks for other, each in found.items() if other.settings == group.settings), Counter[int]())
        wrong = [each for each in damaged if mine.get(each.key, group) == group]
        before = sum(replaced[name] for name in one.sources)
        made.append(_report(one, found.get(group, Tally()), ranks, wrong, before))
    called = [
        Called(one.sources[0], one.weights, that_matter(report.run.settings), report.run.tool)
        for one, report in zip(asked.values(), made, strict=True)
    ]
    return [replace(report, name=name) for report, name in zip(made, names_of(called), strict=True)]


def _report(one: Wanted, tally: Tally, ranks: "Counter[int]", damaged: Sequence[Damage], replaced: int) -> Report:
    lacks = lacking(one, tally, ranks)
    unseen = in_words(one, tally, lacks, damaged)
    standing = _standing(tally)
    numbers = _numbers(one)
    runs = list(_opened(one, tally, standing[:_OPENED], numbers))
    try:
        run = without_block(joined(runs)) if runs else _unseen(one)
    except ValueError as error:
        raise QprecError(
            f"{standing[0].path}: does not belong to the records beside it ({error}); remove it."
        ) from error
    total = _summed(tally)
    corpus = Corpus(
        prompts=len(set(tally.prompts)),
        asked=one.prompts,
        blocks=len(one.asked) if one.asked else len(tally.blocks),
        missing=unseen.missing,
        missing_blocks=unseen.blocks,
        do=unseen.do,
        across=tuple(_across(tally, numbers)),
        record=standing[0].path if standing else "",
        sums=total.sums,
        bought=total.bought,
        left_out=len(standing[_OPENED:]),
        replaced=replaced,
        sources=once([*one.sources, *sorted(tally.sources)]),
        settings=_digest(run.settings),
    )
    told: dict[str, Any] = {"stopped": unseen.stopped, "seconds": {}, "logits": tally.logits}
    return judge(run.model_copy(update=told), corpus=corpus)


class _Total(NamedTuple):
    """Over all prompts, by dtype."""

    sums: dict[str, Sums]
    bought: dict[str, Bought]


def _summed(tally: Tally) -> _Total:
    """What precision is made of, and what float32 logits are worth: of blocks that share a prompt the largest counts
    alone, and of equal ones the first in the corpus."""
    seen, sums, found = set[int](), dict[str, Sums](), dict[str, list[Bought]]()
    for digest in sorted(tally.sums, key=lambda each: (-len(tally.sums[each][0]), tally.blocks[each][0].first, each)):
        prompts, ours, bought = tally.sums[digest]
        if seen.isdisjoint(prompts):
            seen.update(prompts)
            sums |= {dtype: sums[dtype] + each if dtype in sums else each for dtype, each in ours.items()}
            for dtype, one in bought.items():
                found.setdefault(dtype, []).append(one)
    return _Total(sums, {dtype: together(each) for dtype, each in found.items()})


class _Stands(NamedTuple):
    """A prompt that is worst in something."""

    first: int
    """First prompt of its block."""
    path: str
    """Of its record."""
    prompt: int
    """Its number there."""


def _standing(tally: Tally) -> list[_Stands]:
    """Those of findings come first."""
    ordered = sorted(tally.best.items(), key=lambda item: (item[0].partition(" ")[0] not in SEVERITIES, item[1]))
    return list(dict.fromkeys(_Stands(best.first, best.path, best.prompt) for _, best in ordered))


def _numbers(one: Wanted) -> dict[int, int]:
    """By hash: the number that a prompt has in the newest corpus that holds it, from 1.

    A prompt without a name is called by it, and a row more moves all behind it, whose records stay.
    """
    found: dict[int, int] = {}
    for kept, _ in one.plans:
        for block in kept.plan.blocks:
            found.update((int(key, 16), number) for number, key in enumerate(block.keys, block.first + 1))
    return found


def _opened(one: Wanted, tally: Tally, standing: Sequence[_Stands], numbers: Mapping[int, int]) -> Iterator[Run]:
    """Records with these prompts alone, in the order of the corpus; every part of a sweep, a record after another."""
    places: dict[tuple[int, str], set[int]] = {}
    for first, path, prompt in standing:
        places.setdefault((first, path), set()).add(prompt)
    parts = {each.block.digest for each in one.asked if each.block.kind == "sweep"}
    sweep = {
        (block.first, path)
        for digest, (block, path) in tally.blocks.items()
        if block.kind == "sweep" and (digest in parts or not one.asked)
    }
    for place in sorted({*places, *sweep}):
        prompts = places.get(place, set())
        try:
            yield _as_numbered(load(Path(place[1]), prompts), sorted(prompts), numbers)
        except (ValueError, IndexError, TypeError) as error:
            raise QprecError(f"{place[1]}: is not what its summary was made from; remove both.") from error


def _as_numbered(run: Run, prompts: Sequence[int], numbers: Mapping[int, int]) -> Run:
    """A run of these prompts of its record, called as the newest corpus counts them."""
    about = block_of(run)
    keys = [int(about["prompts"][number], 16) for number in prompts]
    names = [
        numbered(numbers[key]) if number in about["counted"] and key in numbers else prompt.name
        for number, key, prompt in zip(prompts, keys, run.prompts, strict=True)
    ]
    return renamed(run, names)


def _unseen(one: Wanted) -> Run:
    """A run of a checkpoint of which nothing was measured."""
    kept, source = one.plans[-1]
    plan = kept.plan
    asked = plan.settings.get("dtypes")
    dtypes = [each for each in asked if each in DTYPES] if isinstance(asked, list) else []
    model = Model(
        source=source,
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


def _across(tally: Tally, numbers: Mapping[int, int]) -> Iterator[Across]:
    """What came of all prompts, each counted once."""
    first = {key: place for place, key in reversed(list(enumerate(tally.prompts)))}
    places_of = {place: name for name, place in tally.names.items()}

    def called(key: int, name: str) -> str:
        return numbered(numbers[key]) if key in tally.counted and key in numbers else name

    for dtype, rooms in tally.rooms.items():
        places = Counter(tally.places[dtype][place] for place in first.values())
        fine = places.pop(-1, 0)
        ordered = sorted(places.items(), key=lambda item: (-item[1], places_of[item[0]]))
        told = sorted(rooms[place] for place in first.values() if rooms[place] == rooms[place])
        worst = {called(key, name): room for _, room, key, name in reversed(tally.worst[dtype])}
        fail = sorted(
            (numbers.get(key, 0) or begin + at + 1, begin, at, key, name) for begin, at, key, name in tally.fails[dtype]
        )
        yield Across(
            dtype=dtype,
            failing=len(first) - fine,
            places=tuple((places_of[place], count) for place, count in ordered),
            quantiles=tuple((share, told[min(len(told) - 1, int(share * len(told)))]) for share in SHARES if told),
            worst=tuple(reversed(worst.items())),
            fail=tuple({key: called(key, name) for _, _, _, key, name in fail}.values()),
        )


def _digest(settings: Mapping[str, Any]) -> str:
    told = json.dumps(that_matter(settings), sort_keys=True, default=str)
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()[:16]
