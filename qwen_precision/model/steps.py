"""The steps of a tokenizer.json, counted before it is loaded: it is a program, which Rust runs and nothing interrupts.

A step that makes two characters of one is harmless; forty of them in a row make a terabyte of a word. So what each can
make of a character is multiplied along a list, and real tokenizers are far below the bound.
"""

import base64
import binascii
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_precision.errors import QprecError
from qwen_precision.model.index import read_json

MOST_BYTES = 256 << 20
"""Of a tokenizer's file."""
MOST_VALUES = 6_000_000
"""Of one: Gemma's has 262,000 words and twice as many merges, three values each."""
_MOST_STEPS = 64
_MOST_PIECES = 64  # of a template of special tokens, and ids of one of them
_MOST_GROWTH = 4096
"""Characters for one. XLNet's list, the longest known, comes to 1,296: two full normalisations, few replacements."""

_LISTS = (("normalizer", "pre_tokenizer"), ("decoder",), ("post_processor",))
"""Keys whose steps run on each other's results."""

_GROWTH = {
    "ByteLevel": 2,  # a character for each byte: of a character that it made itself, two
    "Metaspace": 2,
    "Lowercase": 2,
    "NFC": 3,
    "NFD": 4,
    "BertNormalizer": 6,  # spaces round a character, and lowercase
    "NFKC": 18,
    "NFKD": 18,
}
"""Most characters that a step of this type makes of one, where that is not one and no value of the step tells it."""


def check_steps(folder: Path) -> None:
    """Refuse a tokenizer whose steps could make more of a text than memory holds.

    Args:
        folder: of the checkpoint; a tokenizer.json of each version of transformers may lie there.

    Raises:
        QprecError: a file of it is refused; the message names the key.
    """
    for path in sorted(folder.glob("tokenizer*.json")):
        if path.name == "tokenizer_config.json" or not path.is_file():
            continue
        data = read_json(path, "", MOST_BYTES, MOST_VALUES)
        for keys in _LISTS:
            _check_list(path, data, keys)


def _check_list(path: Path, data: dict[str, Any], keys: tuple[str, ...]) -> None:
    growth = count = 1
    for key in keys:
        for step in _steps(data.get(key)):
            count += 1
            growth *= _growth(step)
            if count > _MOST_STEPS or growth > _MOST_GROWTH:
                what = f"more than {_MOST_STEPS} steps" if count > _MOST_STEPS else "steps that multiply a text"
                raise QprecError(f"{path}: {key}: holds {what}; compare it with the hub's.")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Every step, at any depth; lists of them are named differently in each part."""
    stack = [part]
    while stack:
        each = stack.pop()
        if isinstance(each, dict):
            if "type" in each:
                yield each
            stack.extend(each.values())
        elif isinstance(each, list):
            stack.extend(each)


def _growth(step: dict[str, Any]) -> int:
    """Most characters that a step makes of one."""
    kind = step["type"]
    if kind == "Replace":
        return _replaced(step)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if kind == "Precompiled":
        return _longest(step)
    if kind == "TemplateProcessing":
        return _pieces(step)
    return _GROWTH.get(kind, 1) if isinstance(kind, str) else 1


def _replaced(step: dict[str, Any]) -> int:
    pattern, content = step.get("pattern"), len(str(step.get("content")))
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1, -(-content // len(text)))
    return 1 + content  # a regex, or an empty text, may match between any two characters


def _longest(step: dict[str, Any]) -> int:
    """The longest text that a table of sentencepiece puts in the place of a character: a trie, then texts and zeros."""
    try:
        table = base64.b64decode(str(step.get("precompiled_charsmap")))
        (size,) = struct.unpack("<I", table[:4])
    except (binascii.Error, ValueError, struct.error):
        return 1  # the library refuses it, too
    return max(len(text.decode("utf-8", "replace")) for text in table[4 + size :].split(b"\0")) or 1


def _pieces(step: dict[str, Any]) -> int:
    """How often a template puts the text in."""
    found = 1
    for key in ("single", "pair"):
        pieces = step.get(key)
        pieces = pieces if isinstance(pieces, list) else []
        if len(pieces) > _MOST_PIECES:
            return _MOST_GROWTH + 1
        ids = [str(each.get("Sequence")) for each in pieces if isinstance(each, dict) and "Sequence" in each]
        found = max([found, *map(ids.count, ids)])
    special = step.get("special_tokens")
    told = list(special.values()) if isinstance(special, dict) else []
    longest = max(
        (len(each["ids"]) for each in told if isinstance(each, dict) and isinstance(each.get("ids"), list)), default=0
    )
    return found if longest <= _MOST_PIECES else _MOST_GROWTH + 1
