"""A corpus: prompts in blocks, each read where it lies when its turn comes.

Listing goes once through the file and keeps a line a block: JSONL and text may be as long as they like. The same corpus
always gives the same blocks, on every machine.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from qwen_precision.errors import UsageError
from qwen_precision.record import is_record
from qwen_precision.settings.prompts import EXPECTED, ROWS, PromptSpec, is_counted, line_of, read_prompts, row_of

BLOCK_PROMPTS = 64
"""Prompts of a block at most: weights are read once for all of them, and a rank that dies loses one block."""
DIGITS = 12
"""Of a prompt's hash: of a million prompts two are taken for one with a chance of 1 in 500."""
BLOCK_TOKENS = 16_384
"""Tokens of a block at most, as they are estimated: the hidden states of all its prompts are kept side by side."""
_MOST_LINE = 4 << 20
"""Bytes of a line."""
_BYTES_A_TOKEN = 3
"""Of a text; English has four, Chinese three or less."""


@dataclass(frozen=True)
class PromptBlock:
    """Prompts that are measured together."""

    first: int
    """Number of the first, from 0."""
    count: int
    tokens: int
    """Roughly; tokens are not counted before there is a tokenizer."""
    digest: str
    """Of all of it, in hexadecimal."""
    hashes: str
    """``DIGITS`` hexadecimal digits a prompt: of its content, of the name it was given, and of how many equal ones come
    before it. A name that only counts is no part of it, so that a row more makes no other prompt a new one."""
    place: tuple[int, int] = field(default=(0, 0), compare=False)
    """Byte at which the line of the first begins, and how many prompts of that line come before it."""
    line: int = field(default=1, compare=False)
    """Of its file, from 1, on which the first begins."""
    again: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """Prompts that are there already, by their place in the block, and how many equal ones come before."""


class Corpus:
    """All prompts that are to be run, block by block.

    Args:
        texts: of ``--prompt``.
        file: of ``--prompts``; as for ``read_prompts``, but for JSONL and text, which may be of any size.
        most: prompts of a block.
        cut: tokens that every prompt is cut to.

    Raises:
        UsageError: as ``read_prompts`` does.
    """

    def __init__(
        self, texts: Sequence[str] | None, file: str | None, most: int = BLOCK_PROMPTS, cut: int | None = None
    ) -> None:
        self._path = _streamed(file) if not texts else None
        self._held = read_prompts(texts, file) if self._path is None else []
        self._cut = cut
        self.blocks = list(self._listed(most))
        if not self.blocks:
            raise UsageError(f"--prompts: {file} is empty; expected {EXPECTED}.")
        self.count = sum(block.count for block in self.blocks)

    def prompts(self, block: PromptBlock) -> list[PromptSpec]:
        """Those of a block.

        Raises:
            UsageError: the file is another than it was when it was listed.
        """
        changed = f"--prompts: {self._path} was changed while it was worked on; give the command again."
        try:
            found = [spec for _, _, spec in islice(self._walk(block.first, block.place), block.count)]
        except UsageError as error:
            raise UsageError(changed) from error
        before = dict(block.again)
        numbered = enumerate(found, block.first + 1)
        hashes = [_hash(spec, number, before.get(at, 0)) for at, (number, spec) in enumerate(numbered)]
        if "".join(hashes) != block.hashes:
            raise UsageError(changed)
        return found

    def where(self, block: PromptBlock, name: str) -> str:
        """File and line of a prompt, as the beginning of a sentence; nothing where it lies in no file of lines."""
        if self._path is None:
            return ""
        walk = islice(self._walk(block.first, block.place), block.count)
        line = next((line for _, line, spec in walk if spec.name == name), 1)
        return f"{self._path}, line {block.line + line - 1}: "

    def _listed(self, most: int) -> Iterator[PromptBlock]:
        held: list[str] = []
        again: list[tuple[int, int]] = []
        first, tokens, place, begin = 0, 0, (0, 0), 1
        lines: dict[int, int] = {}
        seen: Counter[int] = Counter()
        for number, (where, line, spec) in enumerate(self._walk(0, (0, 0)), 1):
            if (known := lines.setdefault(hash(spec.name), line)) != line:
                raise self._twice(spec.name, known, line)
            size = _tokens(spec, self._cut)
            if held and (len(held) >= most or tokens + size > BLOCK_TOKENS):
                yield _block(first, held, tokens, place, begin, again)
                first, tokens, held, again = first + len(held), 0, [], []
            place, begin = (place, begin) if held else (where, line)
            tokens += size
            plain = _hash(spec, number)
            before = seen[int(plain, 16)]
            seen[int(plain, 16)] += 1
            again += [(len(held), before)] if before else []
            held.append(_hash(spec, number, before) if before else plain)
        if held:
            yield _block(first, held, tokens, place, begin, again)

    def _twice(self, name: str, first: int, second: int) -> UsageError:
        if self._path is None:
            return UsageError(f"--prompts: has two prompts of the name {name!r}; give each its own.")
        where = f"{self._path}, line {second}: has the name {name!r}, as line {first} has"
        return UsageError(f"--prompts: {where}; give each its own.")

    def _walk(self, number: int, place: tuple[int, int]) -> Iterator[tuple[tuple[int, int], int, PromptSpec]]:
        """Place, line (from where it begins) and prompt, from the ``number``-th on, which lies there."""
        if self._path is None:
            yield from (((0, 0), at, spec) for at, spec in enumerate(self._held[number:]))
            return
        rows = self._path.suffix.lower() in ROWS
        for at, count, line in _lines(self._path, place[0]):
            # As one text is split: a form feed ends a line of it too.
            parts = [line] if rows else [part for part in line.splitlines() if part.strip()]
            for inside, part in enumerate(parts):
                if (at, inside) >= place:
                    number += 1
                    told = row_of(part, number, self._path, count) if rows else line_of(part, number)
                    yield (at, inside), count, told


def _streamed(file: str | None) -> Path | None:
    """The file, if it is one that is read line by line."""
    if not file or file == "-":
        return None
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix in {".yaml", ".yml", ".json"} or (suffix not in ROWS and is_record(path)):
        return None
    # What cannot be read twice, or is not there, is met by who reads it whole.
    return path if path.is_file() else None


def _lines(path: Path, begin: int) -> Iterator[tuple[int, int, str]]:
    """Byte, number (from 1, where it is begun with) and text of each line that is not blank."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            at, number = begin, 0
            while line := file.readline(_MOST_LINE + 1):
                number += 1
                if len(line) > _MOST_LINE:
                    most = f"more than {_MOST_LINE >> 20} MiB"
                    raise UsageError(f"--prompts: {path}, line {number}: has {most}; shorten it.")
                text = line.decode("utf-8-sig" if at == 0 else "utf-8")
                if text.strip():
                    yield at, number, text
                at += len(line)
    except OSError as error:
        raise UsageError(f"--prompts: cannot read {path} ({error.strerror}); expected {EXPECTED}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts: cannot read {path} (not UTF-8 text); expected {EXPECTED}.") from error


def _tokens(spec: PromptSpec, cut: int | None) -> int:
    """Of a prompt with its padding: given ids are counted, of texts it is a guess."""
    rows = spec.given_ids
    sizes = [len(row) for row in rows] if rows else [len(t.encode()) // _BYTES_A_TOKEN + 1 for t in spec.texts()]
    most = min(filter(None, (spec.max_tokens, cut)), default=None)
    longest = max(sizes) if most is None else min(max(sizes), most)
    return longest * len(sizes)


def _block(
    first: int,
    held: Sequence[str],
    tokens: int,
    place: tuple[int, int],
    line: int,
    again: Sequence[tuple[int, int]],
) -> PromptBlock:
    hashes = "".join(held)
    digest = hashlib.sha256(hashes.encode()).hexdigest()[:32]
    return PromptBlock(first, len(held), tokens, digest, hashes, place, line, tuple(again))


def _hash(spec: PromptSpec, number: int, before: int = 0) -> str:
    """Of a prompt, the ``number``-th from 1; ``before`` is how many equal ones come before it."""
    told = spec.model_dump_json(exclude_none=True, exclude={"name"} if is_counted(spec.name, number) else None)
    return hashlib.sha256(f"{told}\n{before or ''}".encode("utf-8", "replace")).hexdigest()[:DIGITS]
