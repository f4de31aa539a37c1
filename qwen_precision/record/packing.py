"""Large columns of a record, small on disk: a record of a big model has millions of numbers.

A small record is plain JSON that a person can read. From ``LARGE`` entries on, a column of magnitudes becomes one
string: float32 (seven digits; readings have six), its four bytes sorted into planes, because the exponents of
neighbours are alike, then zlib and base64. The list of sites, full of repetition, becomes its JSON under zlib. 94
layers of 1,000 operations, three dtypes and ten prompts take 13 MB so, and 31 MB in plain.
"""

import base64
import binascii
import json
import sys
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 20_000
"""Entries from which on a list is packed."""

MOST = 8_000_000
"""Numbers that all packed columns of a record may hold together: 94 layers, three dtypes and ten prompts make three."""

_MOST_TEXT = 32 * 1024 * 1024  # bytes that the packed list of sites may have as JSON
_MOST_PARTS = 4_000_000
"""Values that a JSON text may hold: each takes up to a hundred bytes once it is an object."""
_WIDEST = 250_000
"""Keys of one object: each that is wrong is an error of its own."""

_NOTHING = -1.0  # magnitudes are not negative
_COLUMN, _LIST = "f32:", "json:"


def pack_column(values: list[Any]) -> Any:
    """A column of magnitudes (null, or a number that is not negative), packed if it is large."""
    if len(values) < LARGE:
        return values
    numbers = array("f", [_NOTHING if value is None else value for value in values])
    if sys.byteorder == "big":
        numbers.byteswap()
    data = numbers.tobytes()
    return _COLUMN + _packed(b"".join(data[plane::4] for plane in range(4)))


def unpack_all(data: dict[str, Any]) -> dict[str, Any]:
    """A record with nothing packed any more; nothing else of it is looked at.

    A few bytes of zlib can stand for gigabytes, so a column is unpacked no further than there are sites, and all
    columns together no further than ``MOST`` entries.

    Raises:
        ValueError: damaged, or larger than a record may be; the message begins with the key.
    """
    sites, passes = data.get("sites"), data.get("passes")
    if isinstance(sites, str):
        with _named("sites"):
            sites = plain_json(_unpacked(sites, _LIST, _MOST_TEXT).decode("utf-8"))
    if not isinstance(passes, list):
        return {**data, "sites": sites}
    packed = [each for each in passes if isinstance(each, dict) and isinstance(each.get("abs_max"), str)]
    count = len(sites) if isinstance(sites, list) else 0
    if count * len(packed) > MOST:
        raise ValueError(f"passes: are {count * len(packed):,} packed numbers; a record may hold {MOST:,}")
    whole = []
    for number, each in enumerate(passes):
        if isinstance(each, dict) and isinstance(each.get("abs_max"), str):
            with _named(f"passes.{number}.abs_max"):
                each = {**each, "abs_max": unpack_column(each["abs_max"], count)}
        whole.append(each)
    return {**data, "sites": sites, "passes": whole}


def plain_json(text: str) -> Any:
    """What a JSON text of a stranger holds; how much that is is counted before any of it is made.

    Raises:
        ValueError: it is no JSON, or more than a record can be; RecursionError: it is nested too deeply.
    """
    check_count(text.encode("utf-8", "surrogatepass"), _MOST_PARTS)
    return json.loads(text, parse_int=_bounded, object_hook=_not_too_wide)


def check_count(data: bytes, most: int) -> None:
    """Count the values of a JSON text before any of them is made.

    Raises:
        ValueError: there are more.
    """
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if parts > most:
        raise ValueError(f"{parts:,} values")


def _bounded(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _not_too_wide(found: dict[str, Any]) -> dict[str, Any]:
    if len(found) > _WIDEST:
        raise ValueError(f"an object of {len(found):,} keys")
    return found


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts the key in front of what is wrong."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {error}") from error


def unpack_column(text: str, count: int) -> list[float | None]:
    """A packed column of ``count`` entries.

    Raises:
        ValueError: damaged, or of another length.
    """
    data = _unpacked(text, _COLUMN, 4 * count)
    if len(data) != 4 * count:
        raise ValueError(f"is a packed column of {len(data) // 4} entries for {count} sites")
    whole = bytearray(len(data))
    for plane in range(4):
        whole[plane::4] = data[plane * count : (plane + 1) * count]
    numbers = array("f", bytes(whole))
    if sys.byteorder == "big":
        numbers.byteswap()
    return [None if number < 0 else number for number in numbers]


def pack_list(values: list[Any]) -> Any:
    """Any list of plain values, packed if it is large."""
    if len(values) < LARGE:
        return values
    return _LIST + _packed(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def _unpacked(text: str, kind: str, most: int) -> bytes:
    if not text.startswith(kind):
        raise ValueError(f"should be a list, or a packed one ({kind}…)")
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text[len(kind) :], validate=True), most + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError("is a packed list that is damaged") from error
    if len(data) > most or not stream.eof or stream.unused_data:
        raise ValueError("is a packed list that is damaged, or larger than a record may hold")
    return data
