"""Runs of the same weights with the same settings as one: what a process would have measured that ran all prompts.

Joining is associative. ``_JOINED`` has a row a field: what two runs say becomes what both say together.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from types import NoneType
from typing import Any, get_args, get_origin

from qwen_precision.record.explanation import Explanation, Sweep, Swept
from qwen_precision.record.logits import LogitsCost
from qwen_precision.record.parts import Site
from qwen_precision.record.run import Choice, Model, Pass, Prompt, Run, Weight, WeightTotals

WORST = 20
"""First tokens or texts that are kept of a sweep."""


def joined(runs: Iterable[Run]) -> Run:
    """One run of all prompts, in the order given; a prompt that is there twice counts once.

    Args:
        runs: one at least, all of one checkpoint, one verb and one list of dtypes; generations are not joined.

    Raises:
        ValueError: they cannot be one run.
    """
    given = list(runs)
    if not given or any(run.generation is not None or list(run.dtypes) != list(given[0].dtypes) for run in given):
        raise ValueError("only probes with the same dtypes are one run")
    if len(given) == 1:
        return given[0]
    sites = reduce(_merged_sites, ([_key(site) for site in run.sites] for run in given))
    numbers = {key: number for number, key in enumerate(sites)}
    known: dict[str, Prompt] = {}
    parts = [_in_common(run, numbers, known) for run in given]
    together = {
        name: reduce(rule, (getattr(part, name) for part in parts[1:]), getattr(parts[0], name))
        for name, rule in _JOINED.items()
    }
    return Run.model_construct(**together)


def renamed(run: Run, names: Sequence[str]) -> Run:
    """A run whose prompts have these names, in their order."""
    called = {prompt.name: name for prompt, name in zip(run.prompts, names, strict=True)}
    prompts = [prompt.model_copy(update={"name": called[prompt.name]}) for prompt in run.prompts]
    return run.model_copy(update={"prompts": prompts, "explanation": _renamed(run.explanation, called)})


def unmeasured(model: Model, settings: dict[str, Any], dtypes: list[str], tool: str) -> Run:
    """A probe of a checkpoint that nothing was measured of: every list and table of it is empty."""
    told = {"tool": tool, "verb": "probe", "created": "", "model": model, "settings": settings, "dtypes": dtypes}
    empty = {name: _nothing(field.annotation) for name, field in Run.model_fields.items() if name != "schema_"}
    return Run.model_validate({**empty, **told})


def _nothing(kind: Any) -> Any:
    if NoneType in get_args(kind):
        return None
    return {list: [], dict: {}, bool: False}.get(get_origin(kind) or kind, "")


_Key = tuple[int | None, str, str, int]


def _key(site: Site) -> _Key:
    return site.layer, site.module, site.op, site.call


def _merged_sites(ours: list[_Key], theirs: list[_Key]) -> list[_Key]:
    """Both lists as one; what only the second has stands behind what it has before it."""
    known, behind = set(ours), dict[_Key | None, list[_Key]]()
    before: _Key | None = None
    for each in theirs:
        if each in known:
            before = each
        else:
            behind.setdefault(before, []).append(each)
    merged = list(behind.get(None, []))
    for each in ours:
        merged += [each, *behind.get(each, [])]
    return merged


# -- one run in the numbers and names that all have in common -----------------------------------------------------


def _in_common(run: Run, numbers: dict[_Key, int], known: dict[str, Prompt]) -> Run:
    """The same run, its sites and prompts numbered and named as in all of them; prompts that are known are left out.

    Args:
        numbers: place of each site.
        known: prompts by name so far; those of the run are added.
    """
    place = [numbers[_key(site)] for site in run.sites]
    names, fresh = _names(run.prompts, known)
    first = len(known)
    known.update({names[number]: run.prompts[number].model_copy(update={"name": names[number]}) for number in fresh})
    prompts = {number: first + position for position, number in enumerate(fresh)}
    renamed = {prompt.name: name for prompt, name in zip(run.prompts, names, strict=True)}
    return run.model_copy(
        update={
            "sites": [Site(layer=key[0], module=key[1], op=key[2], call=key[3]) for key in numbers],
            "prompts": [known[names[number]] for number in fresh],
            "wider": {dtype: {place[site]: name for site, name in row.items()} for dtype, row in run.wider.items()},
            "casts": {place[site]: place[source] for site, source in run.casts.items()},
            "passes": [
                _placed(each, place, len(numbers), prompts[each.prompt])
                for each in run.passes
                if each.prompt in prompts
            ],
            "explanation": _renamed(run.explanation, renamed),
        }
    )


def _names(prompts: Sequence[Prompt], known: dict[str, Prompt]) -> tuple[list[str], list[int]]:
    """A name of its own for every prompt, and the numbers of those that are not known yet."""
    names, fresh = [], []
    for number, prompt in enumerate(prompts):
        name, count = prompt.name, 1
        while name in known and not _same(known[name], prompt):
            count += 1
            name = f"{prompt.name} ({count})"
        names.append(name)
        if name not in known:
            fresh.append(number)
    return names, fresh


def _same(one: Prompt, other: Prompt) -> bool:
    rows = [[(list(row.ids), row.padding, row.text) for row in each.rows] for each in (one, other)]
    return rows[0] == rows[1]


def _placed(each: Pass, place: list[int], sites: int, prompt: int) -> Pass:
    column: list[float | None] = [None] * sites
    for number, value in zip(place, each.abs_max, strict=True):
        column[number] = value
    events = [event.model_copy(update={"site": place[event.site]}) for event in each.events]
    return each.model_copy(
        update={
            "prompt": prompt,
            "abs_max": column,
            "events": sorted(events, key=lambda event: (event.site, event.row or 0, event.expert or 0)),
        }
    )


def _renamed(made: Explanation | None, names: dict[str, str]) -> Explanation | None:
    if made is None or all(name == new for name, new in names.items()):
        return made
    controls = [each.model_copy(update={"prompt": names.get(each.prompt, each.prompt)}) for each in made.controls]
    matches = [each.model_copy(update={"prompt": names.get(each.prompt, each.prompt)}) for each in made.continuations]
    return made.model_copy(update={"controls": controls, "continuations": matches})


# -- two of a field as one ----------------------------------------------------------------------------------------


def _first(ours: Any, theirs: Any) -> Any:
    return ours if ours is not None else theirs


def _both(ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
    return [*ours, *theirs]


def _once(ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
    return [*ours, *(each for each in theirs if each not in ours)]


def _also(ours: dict[Any, Any], theirs: dict[Any, Any]) -> dict[Any, Any]:
    return {**theirs, **ours}


def _tables(ours: dict[str, dict[int, str]], theirs: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    return {name: {**theirs.get(name, {}), **ours.get(name, {})} for name in {**ours, **theirs}}


def _choices(ours: Sequence[Choice], theirs: Sequence[Choice]) -> list[Choice]:
    """One of a kind but for prompts left out: of those every one."""
    many = "prompts left out"
    there = {each.what for each in ours}
    return [*ours, *(each for each in theirs if each.what not in there or (each.what == many and each not in ours))]


def _in_neither(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    return [each for each in ours if each in set(theirs)]


def _weights(ours: Sequence[Weight], theirs: Sequence[Weight]) -> list[Weight]:
    known = {each.name for each in ours}
    return [*ours, *(each for each in theirs if each.name not in known)]


def _totals(ours: Sequence[WeightTotals], theirs: Sequence[WeightTotals]) -> list[WeightTotals]:
    """Whoever looked at more."""
    other = {each.dtype: each for each in theirs}
    return [max(each, other.get(each.dtype, each), key=lambda total: total.elements) for each in ours]


def _seconds(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {name: round(ours.get(name, 0.0) + theirs.get(name, 0.0), 3) for name in {**ours, **theirs}}


def joined_logits(ours: LogitsCost | None, theirs: LogitsCost | None) -> LogitsCost | None:
    """That of the largest prompt; timed over the prompts of both."""
    if ours is None or theirs is None:
        return ours or theirs
    return max(ours, theirs, key=lambda cost: cost.whole_prompt_bytes).model_copy(
        update={
            "upcast_seconds": round(float(ours.upcast_seconds) + float(theirs.upcast_seconds), 6),
            "steps": ours.steps + theirs.steps if ours.steps is not None and theirs.steps is not None else None,
            "held": max((each.held for each in (ours, theirs) if each.held is not None), default=None),
        }
    )


def _explained(ours: Explanation | None, theirs: Explanation | None) -> Explanation | None:
    if ours is None or theirs is None:
        return ours or theirs
    return Explanation(
        budget=ours.budget + theirs.budget,
        controls=[*ours.controls, *theirs.controls],
        left_out=_once(ours.left_out, theirs.left_out),
        hashes={**theirs.hashes, **ours.hashes},
        continuations=[*ours.continuations, *theirs.continuations],
    )


def _swept(ours: Sweep | None, theirs: Sweep | None) -> Sweep | None:
    """Two parts of a search over first tokens; of the lengths of a prompt only one can be told."""
    if ours is None or theirs is None or ours.kind != "first-token":
        return ours or theirs
    return ours.model_copy(
        update={
            "tried": ours.tried + theirs.tried,
            "total": max(ours.total, theirs.total),
            "over": ours.over + theirs.over,
            "worst": sorted([*ours.worst, *theirs.worst], key=worst_first)[:WORST],
            "seconds": round(float(ours.seconds) + float(theirs.seconds), 3),
        }
    )


def worst_first(each: Swept) -> tuple[bool, float, list[int]]:
    """What fails comes first, then what is largest; of equals the lower ids."""
    return not each.fails, -float(each.magnitude), list(each.ids)


_JOINED: dict[str, Callable[[Any, Any], Any]] = {
    "schema_": _first,
    "tool": _first,
    "verb": _first,
    "created": max,
    "stopped": _first,
    "unfinished": _first,
    "model": _first,
    "environment": _first,
    "settings": _first,
    "choices": _choices,
    "prompts": _both,
    "redacted": lambda ours, theirs: ours or theirs,
    "dtypes": _first,
    "reference": lambda ours, theirs: ours and theirs,
    "sites": _first,
    "wider": _tables,
    "casts": _also,
    "not_run": _in_neither,
    "passes": _both,
    "weights": _weights,
    "weight_totals": _totals,
    "scale_faults": _once,
    "seconds": _seconds,
    "logits": joined_logits,
    "generation": _first,
    "rescue": lambda ours, theirs: None,  # the plan of some prompts is none for all
    "explanation": _explained,
    "sweep": _swept,
}
