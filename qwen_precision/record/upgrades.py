"""Old records, made into new ones: an ordered table of named steps, each from one schema number to the next."""

import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def _generations_and_precision_came_in(data: Record) -> Record:
    """Schema 2 holds what was generated, how far each pass is from the reference, and what never ran."""
    passes = data.get("passes")
    if isinstance(passes, list):
        passes = [{**each, "layer_error": [], "kl": []} if isinstance(each, dict) else each for each in passes]
        data = {**data, "passes": passes}
    return {**data, "generation": None, "not_run": []}


def _rescues_came_in(data: Record) -> Record:
    """Schema 3 holds rescues, stretches of a text computed with rescaled weights, and why something failed."""
    made = data.get("generation")
    if isinstance(made, dict) and isinstance(made.get("rows"), list):
        data = {**data, "generation": {**made, "rows": [_not_rescaled(row) for row in made["rows"]]}}
    passes = data.get("passes")
    if isinstance(passes, list):
        data = {**data, "passes": [_not_explained(each) for each in passes]}
    return {**data, "rescue": None, "explanation": None, "sweep": None, "unfinished": None}


def _not_explained(each: Any) -> Any:
    if not isinstance(each, dict):
        return each
    each = _events(each, lambda event: {**event, "closeup": None})
    return {**each, "massive": [], "local_error": [], "logprob_error": []}


def _not_rescaled(row: Any) -> Any:
    stretches = row.get("stretches") if isinstance(row, dict) else None
    if not isinstance(stretches, list):
        return row
    return {**row, "stretches": [{**s, "rescaled": False} if isinstance(s, dict) else s for s in stretches]}


def _harm_came_in(data: Record) -> Record:
    """Schema 4 holds whether an overflow made a difference, an extreme element in exact arithmetic, where a control
    failed, steps of a generation that are made again, what is wrong with the scales of quantised weights, which files
    the weights were in, whether its texts were taken out, whether q and k of a rescaled model have norms, and what the
    softmax is worth in float32."""
    data = {
        **data,
        "scale_faults": [],
        "redacted": _looks_redacted(data.get("prompts")),
        "model": _with(data.get("model"), files=[]),
        "rescue": _with_qk_norm(data.get("rescue")),
        "generation": _not_upcast(data.get("generation")),
        "logits": None,
    }
    prompts, passes, why = data.get("prompts"), data.get("passes"), data.get("explanation")
    if isinstance(prompts, list):
        data = {**data, "prompts": [_with(each, failed=None) for each in prompts]}
    if isinstance(why, dict) and isinstance(why.get("controls"), list):
        data = {**data, "explanation": {**why, "controls": [_with(each, began=None) for each in why["controls"]]}}
    if not isinstance(passes, list):
        return data
    return {**data, "passes": [_with(_events(each, _with_harm), upcast=[]) for each in passes]}


def _not_upcast(made: Any) -> Any:
    """A generation in which nobody looked at what a softmax in float32 is worth."""
    if not isinstance(made, dict):
        return made
    rows = [_with(row, **_unknown(row)) for row in _list(made.get("rows"))]
    cost = _with(made.get("logits"), steps=None, vocabulary=None, held=None)
    return {**made, "rows": rows if isinstance(made.get("rows"), list) else made.get("rows"), "logits": cost}


def _unknown(row: Any) -> Record:
    steps = len(_list(row.get("ids"))) if isinstance(row, dict) else 0
    return {name: [None] * steps for name in ("logprob", "logprob_error", "mass_lost", "ranks", "changed")}


def _with_qk_norm(rescue: Any) -> Any:
    """Only Qwen3 was rescaled then."""
    made = rescue.get("rescaling") if isinstance(rescue, dict) else None
    if not isinstance(made, dict):
        return rescue
    layers = [_with(each, query=0) for each in _list(made.get("layers"))]
    return {**rescue, "rescaling": {**made, "qk_norm": True, "layers": layers}}


_DIGEST = re.compile(r"\[\d+ characters, sha256 [0-9a-f]{12}\]")


def _looks_redacted(prompts: Any) -> bool:
    """Whether a text stands for another, or no token id has one: so it was before a record could say that it is."""
    rows = [row for each in _list(prompts) if isinstance(each, dict) for row in _list(each.get("rows"))]
    rows = [row for row in rows if isinstance(row, dict)]
    stands_in = any(_DIGEST.fullmatch(row["text"]) for row in rows if isinstance(row.get("text"), str))
    return stands_in or any(_list(row.get("tokens")) and not any(row["tokens"]) for row in rows)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _with(each: Any, **more: Any) -> Any:
    """A part with new keys; what is no part stays as it is."""
    return {**each, **more} if isinstance(each, dict) else each


def _events(each: Any, change: Callable[[Record], Record]) -> Any:
    """A pass with every event changed; what is no pass stays as it is."""
    if not isinstance(each, dict) or not isinstance(each.get("events"), list):
        return each
    return {**each, "events": [change(event) if isinstance(event, dict) else event for event in each["events"]]}


def _with_harm(event: Record) -> Record:
    look = event.get("closeup")
    return {**event, "harmless": None, "closeup": {**look, "exact": None} if isinstance(look, dict) else look}


UPGRADES: list[Callable[[Record], Record]] = [
    _generations_and_precision_came_in,
    _rescues_came_in,
    _harm_came_in,
]
"""The step at index 0 makes schema 2 of schema 1, and so on: a new schema is a function and a row here."""


def upgraded(data: Record, schema: int) -> Record:
    """A record of any earlier schema as one of ``schema``; nothing is checked here."""
    for number in range(data["schema"], schema):
        data = {**UPGRADES[number - 1](data), "schema": number + 1}
    return data
