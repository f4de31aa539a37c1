"""Records on disk: written whole, read back from strangers, old ones made new. Nowhere else is one saved or loaded."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_precision.errors import QprecError
from qwen_precision.files import Unreadable, read_small, write_atomically
from qwen_precision.record.packing import pack_column, pack_list, plain_json, unpack_all
from qwen_precision.record.parts import in_words
from qwen_precision.record.references import misfit
from qwen_precision.record.run import SCHEMA, Run
from qwen_precision.record.upgrades import upgraded

MAX_BYTES = 64 * 1024 * 1024
"""A record larger than this is not a qprec record: refused before it is parsed. Packed, the largest have 13 MiB."""


_EXPECTED = "give the file that `qprec probe -o` or `qprec generate -o` wrote"


def to_json(run: Run) -> str:
    """The record as JSON text, without half characters; the same run always gives the same text."""
    plain = run.model_dump(by_alias=True)
    plain["sites"] = pack_list(plain["sites"])
    for each in plain["passes"]:
        each["abs_max"] = pack_column(each["abs_max"])
    plain = in_words(plain)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def save(run: Run, path: Path) -> None:
    """Write the record, atomically."""
    write_atomically(path, to_json(run))


def is_record(path: Path) -> bool:
    """Whether a file is a saved run, by how it begins; it is not read whole."""
    if not os.path.isfile(path):
        return False  # what is read from a pipe is gone
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False


_BEGINS = b'{"schema":'


def load(path: Path, prompts: Collection[int] | None = None) -> Run:
    """Read a record.

    Args:
        path: of the file.
        prompts: numbers of those that are wanted; nothing is made of the others. None for all.

    Raises:
        QprecError: no such file, not JSON, not a qprec record, or one of a newer schema; the message
            names the offending key.
    """
    return parse(read(path), str(path), prompts)


def read(path: Path) -> bytes:
    """The bytes of a record or a bundle of them.

    Raises:
        QprecError: it is no regular file, is too large, or cannot be read.
    """
    try:
        return read_small(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}.") from error
    except Unreadable as error:
        raise QprecError(f"{path}: cannot be read ({error}); {_EXPECTED}.") from error


def parse(text: str | bytes, path: str, prompts: Collection[int] | None = None) -> Run:
    """The record that a JSON text holds; ``path`` is its name in messages. Else as ``load``."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = plain_json(text)
    except (ValueError, RecursionError) as error:
        raise QprecError(f"{path}: is not JSON; {_EXPECTED}.") from error
    if _SURROGATE.search(text):
        data = _whole_characters(data)
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise QprecError(f"{path}: has no `schema` number, so it is not a qprec record.")
    if data["schema"] < 1:
        raise QprecError(f"{path}: has schema {data['schema']}, but the first was 1; it is not a qprec record.")
    if data["schema"] > SCHEMA:
        raise QprecError(
            f"{path}: has schema {data['schema']}, this qprec reads up to {SCHEMA}; upgrade qprec to read it."
        )
    data = upgraded(data, SCHEMA)
    return _validated(data if prompts is None else _only(data, prompts), path)


def _only(data: dict[str, Any], wanted: Collection[int]) -> dict[str, Any]:
    """A record's data with some of its prompts, and the passes over them."""
    prompts, passes = data.get("prompts"), data.get("passes")
    if not isinstance(prompts, list) or not isinstance(passes, list):
        return data
    place = {number: position for position, number in enumerate(sorted(set(wanted) & set(range(len(prompts)))))}
    kept = [
        {**each, "prompt": place[each["prompt"]]}
        for each in passes
        if isinstance(each, dict) and isinstance(each.get("prompt"), int) and each["prompt"] in place
    ]
    names = {prompts[number].get("name") for number in place if isinstance(prompts[number], dict)}
    why = data.get("explanation")
    if isinstance(why, dict) and isinstance(why.get("controls"), list):
        mine = [each for each in why["controls"] if not isinstance(each, dict) or each.get("prompt") in names]
        data = {**data, "explanation": {**why, "controls": mine}}
    return {**data, "prompts": [prompts[number] for number in place], "passes": kept}


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _whole_characters(value: Any) -> Any:
    """Without half characters (lone surrogates), which no file could be written with."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return [_whole_characters(item) for item in value] if isinstance(value, list) else value


def _validated(data: dict[str, Any], path: str) -> Run:
    try:
        run = Run.model_validate(unpack_all(data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise QprecError(f"{path}: is nested too deeply to be a qprec record.") from error
        if not isinstance(error, ValidationError):
            raise QprecError(f"{path}: not a valid qprec record: {error}.") from error
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise QprecError(f"{path}: not a valid qprec record: {key}: {first['msg'].lower()}.") from error
    wrong = misfit(run)
    if wrong is not None:
        raise QprecError(f"{path}: not a valid qprec record: {wrong} does not fit the lists it points into.")
    return run
