"""The header of a GGUF file: its keys, and where its tensors lie; no weight is read.

Everything comes from strangers, so a length is compared with the file before anything is made of it. The library
``gguf`` believes lengths, and makes two NumPy arrays of every token: of Gemma's vocabulary that takes twenty seconds.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_precision.errors import QprecError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _COUNT = 8, 9, 4
_DIMENSIONS = 4  # GGML_MAX_DIMS
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_VOCABULARY = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    kind: int
    """Its format, by ggml's number."""
    file: str
    start: int
    """Byte offset in the file."""


@dataclass(frozen=True)
class Header:
    """What stands before the weights, of all parts of a split file."""

    keys: dict[str, Any]
    raw: dict[str, bytes]
    """The keys as the file spells them, without the arrays of the tokenizer."""
    tensors: tuple[Stored, ...]
    sizes: dict[str, int]
    """Bytes of each file."""

    @property
    def architecture(self) -> str:
        """Of the model, in llama.cpp's words."""
        return str(self.keys["general.architecture"])

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.keys[_VOCABULARY])


def read_header(path: Path) -> Header:
    """The header of a GGUF file; of one that was split, that of its first part with the tensors of all.

    Raises:
        QprecError: it is truncated, no GGUF, or a part is missing; the message names the file.
    """
    names = parts_of(path.name)
    count = len(names)
    parts = [_read(path.with_name(name), f"part of {path.name}" if count > 1 else "file") for name in names]
    keys = parts[0].keys
    if keys.get("split.count", count) not in (0, count):
        raise QprecError(
            f"{path}: is one of {keys['split.count']} parts of a model, and was renamed; give all of them back the "
            f"names they had (…-00001-of-{keys['split.count']:05}.gguf)."
        )
    if not isinstance(keys.get("general.architecture"), str) or not isinstance(keys.get(_VOCABULARY), list):
        raise QprecError(f"{path}: holds no language model with its vocabulary (an adapter, a projector?).")
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    if len({tensor.name for tensor in tensors}) < len(tensors) or not tensors:
        raise QprecError(f"{path}: holds no tensors, or one twice; download it again.")
    return Header(keys, parts[0].raw, tensors, {name: size for part in parts for name, size in part.sizes.items()})


def first_part(path: Path) -> Path:
    """Where a GGUF file is a part of a split one, the first of its parts; else itself."""
    return path.with_name(parts_of(path.name)[0])


def parts_of(name: str) -> list[str]:
    """The names of all files of one model."""
    part = _PART.fullmatch(name)
    count = int(part[3]) if part else 0
    if part is None or not 0 < int(part[2]) <= count:
        return [name]
    return [f"{part[1]}-{number:05}-of-{part[3]}{part[4]}" for number in range(1, count + 1)]


def without_weights(header: Header) -> bytes:
    """A GGUF file of the same keys and names, without vocabulary and numbers, for transformers to make a config of."""
    size = struct.pack("<I", _COUNT) + struct.pack("<I", header.vocabulary)
    raw = {f"{header.architecture}.vocab_size": size, **header.raw}
    raw.pop("general.alignment", None)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(raw))
    keys = b"".join(_spelled(key) + value for key, value in raw.items())
    # One float32 each, all of them the same.
    names = b"".join(_spelled(tensor.name) + struct.pack("<IQIQ", 1, 1, 0, 0) for tensor in header.tensors)
    return head + keys + names + bytes(64)


def _spelled(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _read(path: Path, missing: str) -> Header:
    """The header of one file."""
    broken = f"{path}: truncated or not a GGUF file; download it again."
    try:
        with path.open("rb") as file:
            return _Cursor(file, path.name).header()
    except FileNotFoundError as error:
        raise QprecError(f"{path}: this {missing} is missing; download it too.") from error
    except OSError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror}).") from error
    except _Version as error:
        raise QprecError(f"{path}: is GGUF of version {error}; qprec reads 2 and 3, little-endian.") from error
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        raise QprecError(broken) from error


class _Version(Exception):
    """Of a file that is not read."""


class _Cursor:
    """Walks through a header; raises ValueError where it would go beyond the file."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._at = file, name, 0
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        """All of it; offsets are checked against the file only where the sizes of formats are known."""
        if self._take(4) != b"GGUF":
            raise ValueError
        version = self._number("I")
        if version not in (2, 3):
            raise _Version(version)
        count, pairs = self._number("Q"), self._number("Q")
        keys: dict[str, Any] = {}
        raw: dict[str, bytes] = {}
        for _ in range(pairs):
            key, begin = self._string(), self._at
            keys[key] = self._value(self._number("I"))
            if not (key.startswith("tokenizer.") and isinstance(keys[key], list)):
                raw[key] = os.pread(self._file.fileno(), self._at - begin, begin)
        found = list(self._tensors(count))
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError
        base = math.ceil(self._at / alignment) * alignment
        tensors = tuple(Stored(name, shape, kind, self._name, base + offset) for name, shape, kind, offset in found)
        return Header(keys, raw, tensors, {self._name: self._size})

    def _tensors(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for _ in range(count):
            name, dimensions = self._string(), self._number("I")
            if not 0 < dimensions <= _DIMENSIONS:
                raise ValueError
            shape = self._numbers("Q", dimensions)[::-1]  # ggml names the fastest first
            yield name, shape, self._number("I"), self._number("Q")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise ValueError
        self._at += count
        data = self._file.read(count)
        if len(data) < count:  # it shrank
            raise ValueError
        return data

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        if count > self._size:
            raise ValueError
        return struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}")))

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_code(kind))
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._numbers(_code(inner), count))


def _code(kind: int) -> str:
    if kind not in _NUMBERS:  # an array of arrays, which no writer makes
        raise ValueError
    return _NUMBERS[kind]
