"""Old records, made into new ones: an ordered table of named steps, each from one schema number to the next."""

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


UPGRADES: list[Callable[[Record], Record]] = [_generations_and_precision_came_in]
"""The step at index 0 makes schema 2 of schema 1, and so on: a new schema is a function and a row here."""


def upgraded(data: Record, schema: int) -> Record:
    """A record of any earlier schema as one of ``schema``; nothing is checked here."""
    for number in range(data["schema"], schema):
        data = {**UPGRADES[number - 1](data), "schema": number + 1}
    return data
