"""A corpus: prompts in blocks, each read where it lies when its turn comes.

Listing goes once through the file and keeps a line a block: JSONL and text may be as long as they like. The same corpus
always gives the same blocks, on every machine.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_precision.errors import UsageError
from qwen_precision.record import is_record
from qwen_precision.settings.prompts import EXPECTED, ROWS, PromptSpec, line_of, read_prompts, row_of

BLOCK_PROMPTS = 64
"""Prompts of a block at most: weights are read once for all of them, and a rank that dies loses one block."""
PREFIX = 8
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
    """Of names and contents, in hexadecimal."""
    prefixes: str
    """The first ``PREFIX`` digits of the digest that its first prompt alone has, its first two, and so on."""
    place: tuple[int, int] = field(default=(0, 0), compare=False)
    """Byte at which the line of the first begins, and how many prompts of that line come before it."""


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
        found = [spec for _, spec in _few(self._walk(block.first, block.place), block.count)]
        if _digests(found) != (block.digest, block.prefixes):
            raise UsageError(f"--prompts: {self._path} was changed while it was worked on; give the command again.")
        return found

    def _listed(self, most: int) -> Iterator[PromptBlock]:
        held: list[PromptSpec] = []
        first, tokens, place = 0, 0, (0, 0)
        names: set[int] = set()
        for where, spec in self._walk(0, (0, 0)):
            if hash(spec.name) in names:
                raise UsageError(f"--prompts: has two prompts of the name {spec.name!r}; give each its own.")
            names.add(hash(spec.name))
            size = _tokens(spec, self._cut)
            if held and (len(held) >= most or tokens + size > BLOCK_TOKENS):
                yield PromptBlock(first, len(held), tokens, *_digests(held), place)
                first, tokens, held = first + len(held), 0, []
            place = where if not held else place
            tokens += size
            held.append(spec)
        if held:
            yield PromptBlock(first, len(held), tokens, *_digests(held), place)

    def _walk(self, number: int, place: tuple[int, int]) -> Iterator[tuple[tuple[int, int], PromptSpec]]:
        """Place and prompt, from the ``number``-th on, which lies there."""
        if self._path is None:
            yield from (((0, 0), spec) for spec in self._held[number:])
            return
        rows = self._path.suffix.lower() in ROWS
        for at, line in _lines(self._path, place[0]):
            # As one text is split: a form feed ends a line of it too.
            parts = [line] if rows else [part for part in line.splitlines() if part.strip()]
            for inside, part in enumerate(parts):
                if (at, inside) >= place:
                    number += 1
                    yield (at, inside), row_of(part, number, self._path) if rows else line_of(part, number)


def _few(items: Iterator[tuple[tuple[int, int], PromptSpec]], count: int) -> Iterator[tuple[object, PromptSpec]]:
    for _ in range(count):
        found = next(items, None)
        if found is None:
            return
        yield found


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


def _lines(path: Path, begin: int) -> Iterator[tuple[int, str]]:
    """Byte and text of each line that is not blank."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            at = begin
            while line := file.readline(_MOST_LINE + 1):
                if len(line) > _MOST_LINE:
                    raise UsageError(f"--prompts: {path} has a line of more than {_MOST_LINE >> 20} MiB; shorten it.")
                text = line.decode("utf-8-sig" if at == 0 else "utf-8")
                if text.strip():
                    yield at, text
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


def _digests(specs: Sequence[PromptSpec]) -> tuple[str, str]:
    """Of all of them, and of the first few, however many these are."""
    made, told = hashlib.sha256(), [""]
    for spec in specs:
        made.update(spec.model_dump_json(exclude_none=True).encode("utf-8", "replace") + b"\n")
        told.append(made.hexdigest()[:32])
    return told[-1], "".join(each[:PREFIX] for each in told[1:])
