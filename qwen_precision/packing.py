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
from typing import Any

LARGE = 20_000
"""Entries from which on a list is packed."""

MOST = 4_000_000
"""Entries that a packed list may hold; a stranger's zlib stream is not unpacked any further."""

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


def unpack_column(value: Any) -> Any:
    """What was packed; anything else as it is.

    Raises:
        ValueError: a string that is no packed column.
    """
    if not isinstance(value, str):
        return value
    data = _unpacked(value, _COLUMN, 4 * MOST)
    if len(data) % 4:
        raise ValueError("is a packed column of broken length")
    count = len(data) // 4
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


def unpack_list(value: Any) -> Any:
    """What was packed; anything else as it is.

    Raises:
        ValueError: a string that is no packed list.
    """
    return json.loads(_unpacked(value, _LIST, 400 * MOST)) if isinstance(value, str) else value


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def _unpacked(text: str, kind: str, most: int) -> bytes:
    if not text.startswith(kind):
        raise ValueError(f"should be a list, or a packed one ({kind}…)")
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text[len(kind) :], validate=True), most)
    except (binascii.Error, zlib.error) as error:
        raise ValueError("is a packed list that is damaged") from error
    if not stream.eof or stream.unused_data:
        raise ValueError("is a packed list that is damaged, or larger than a record may hold")
    return data
