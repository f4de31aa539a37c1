"""Prompts as they are given: on the command line, in a file, in a saved run, or the built-in set.

A prompt is a text, a chat turn (where the tokenizer has a template), a batch of texts, or what a saved run holds:
token ids, which are not made from text a second time.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen_precision.errors import UsageError
from qwen_precision.files import is_whole, read_text
from qwen_precision.record import FailedStep, Row, is_record, load
from qwen_precision.settings.config import MAX_TEXT_BYTES, configs_folder, read_yaml
from qwen_precision.settings.failedsteps import failing_prompts

EXPECTED = (
    "a YAML list of texts (or name/text, name/chat, name/batch), the same as JSONL (a row a line), "
    "a text file with a prompt a line, or a saved run (.json)"
)
_HALF = "\\ud"
"""How half a character would be spelled in JSON."""
ROWS = {".jsonl", ".ndjson"}
"""Suffixes of files with a JSON value a line."""


class PromptSpec(BaseModel):
    """A prompt before it is tokenised: exactly one of text, chat, messages, ids and batch; or rows of a saved run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=200)
    text: str | None = None
    chat: str | None = None
    messages: list[dict[str, str]] | None = None
    """Turns of a chat, each with ``role`` and ``content``; the answer begins behind them unless the last is one."""
    ids: list[int] | list[list[int]] | None = None
    """Token ids of a row, or of each row of a batch."""
    batch: list[str] | None = None
    rows: list[Row] | None = None
    """Of a saved run: their ids are taken as they are, padded on the left where they are not of one length."""
    failed: FailedStep | None = None
    """Of a saved run: the failing step that these rows were given to."""
    checkpoint: str | None = None
    """Which checkpoint that was, as it was typed then."""
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_kind(self) -> "PromptSpec":
        kinds = (self.text, self.chat, self.messages, self.ids, self.batch, self.rows)
        if sum(each is not None for each in kinds) != 1:
            raise ValueError("give exactly one of text, chat, messages, ids and batch")
        if self.messages is not None and not all({"role", "content"} <= set(each) for each in self.messages):
            raise ValueError("each of messages needs a role and a content")
        if self.ids is not None:
            if not all(self.given_ids or [[]]):
                raise ValueError("is empty; ids need at least one token id")
        elif self.rows is None and not all(self.texts()):
            raise ValueError("is empty; a prompt needs at least one character")
        if not self.texts():
            raise ValueError("is empty; a batch needs at least one text")
        return self

    @property
    def templated(self) -> bool:
        """Whether the chat template makes its text."""
        return self.chat is not None or self.messages is not None

    @property
    def given_ids(self) -> list[list[int]] | None:
        """Token ids of each row, where they are given and not made from text."""
        if self.rows is not None:
            return [row.ids for row in self.rows]
        if self.ids is None:
            return None
        return [list(row) for row in self.ids if isinstance(row, list)] or [[i for i in self.ids if isinstance(i, int)]]

    def texts(self) -> list[str]:
        """The texts of all rows."""
        if self.rows is not None:
            return [row.text for row in self.rows]
        if self.ids is not None:
            return [""] * len(self.given_ids or ())
        if self.messages is not None:
            return ["\n".join(each["content"] for each in self.messages)]
        return self.batch if self.batch is not None else [self.text if self.text is not None else self.chat or ""]


def read_prompts(
    texts: Sequence[str] | None, file: str | None, instead: Sequence[str] = (), again: bool = False
) -> list[PromptSpec]:
    """The prompts to run: those given as text, else those of a file, else ``instead``, else the built-in set.

    Args:
        texts: each a prompt; ``-`` is all of standard input.
        file: YAML, a prompt a line, or a saved run; ``-`` is standard input, a prompt a line.
        instead: texts, where neither is given.
        again: whether a saved generation stands for its prompts; else for what its failing steps were given.

    Raises:
        UsageError: both, an empty prompt, an unreadable file, or one of another form.
    """
    if texts and file is not None:
        raise UsageError("--prompt and --prompts: give one of the two.")
    texts = texts or ([] if file is not None else instead)
    if texts:
        texts = [_standard_input("--prompt").strip("\n") if text == "-" else text for text in texts]
        for text in texts:
            if not text:
                raise UsageError("--prompt: is empty; a prompt needs at least one character.")
            if not is_whole(text):
                raise UsageError("--prompt: is not valid text in this terminal's encoding; put it into a UTF-8 file.")
        names = [numbered(number if len(texts) > 1 else None) for number in range(1, len(texts) + 1)]
        return [PromptSpec(name=name, text=text) for name, text in zip(names, texts, strict=True)]
    if file is not None and not file:
        raise UsageError(f"--prompts: is empty; expected {EXPECTED}.")
    if file == "-":
        return _numbered_lines(_standard_input("--prompts"), "standard input")
    path = Path(file) if file else configs_folder() / "prompts" / "default.yaml"
    if file and (path.suffix.lower() == ".json" or is_record(path)):
        return _from_record(path, again)
    if file and path.suffix.lower() in ROWS:
        lines = [(at, line) for at, line in enumerate(_text_of(path).split("\n"), 1) if line.strip()]
        return [row_of(line, number, path, at) for number, (at, line) in enumerate(lines, 1)] or _nothing(path)
    if file and path.suffix.lower() not in {".yaml", ".yml"}:
        return _numbered_lines(_text_of(path), str(path))
    items = read_yaml(path, "--prompts", EXPECTED)
    if not isinstance(items, list) or not items:
        raise UsageError(f"--prompts: {path} holds no list of prompts; expected {EXPECTED}.")
    specs = [_spec(item, number, f"{path}, prompt {number}") for number, item in enumerate(items, 1)]
    twice = repeated([spec.name for spec in specs])
    if twice is not None:
        raise UsageError(f"--prompts: {path} has two prompts of the name {twice!r}; give each its own.")
    return specs


def repeated(names: Sequence[str]) -> str | None:
    """The first name that is there twice."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _from_record(path: Path, again: bool) -> list[PromptSpec]:
    """Token ids of a saved run: its prompts; of a generation that failed, what each failing step was given."""
    run = load(path)
    if run.redacted:
        raise UsageError(f"--prompts: {path} is redacted, its token ids are made up; give the record as it was saved.")
    prompts = run.prompts
    if run.generation is not None and not again:
        prompts = failing_prompts(run.generation, prompts[0].rows) or prompts
    shared = {"checkpoint": run.model.source}
    items = [{"name": each.name, "rows": each.rows, "failed": each.failed, **shared} for each in prompts]
    return [_valid(item, f"{path}, prompt {number}") for number, item in enumerate(items, 1)]


def _standard_input(label: str) -> str:
    """All of it, as far as a file of prompts may go."""
    try:
        text = sys.stdin.read(MAX_TEXT_BYTES + 1) if sys.stdin is not None else ""
    except (OSError, ValueError) as error:
        raise UsageError(f"{label} -: standard input cannot be read ({error}); expected UTF-8 text.") from error
    if len(text) > MAX_TEXT_BYTES:
        raise UsageError(f"{label} -: standard input is larger than {MAX_TEXT_BYTES >> 20} MiB; give a shorter text.")
    return text


def _text_of(path: Path) -> str:
    return read_text(path, MAX_TEXT_BYTES, "--prompts", EXPECTED)


def _nothing(where: object) -> NoReturn:
    raise UsageError(f"--prompts: {where} is empty; expected {EXPECTED}.")


def _numbered_lines(text: str, where: str) -> list[PromptSpec]:
    lines = [line for line in text.splitlines() if line.strip()] or _nothing(where)
    return [line_of(line, number) for number, line in enumerate(lines, 1)]


def numbered(number: int | None) -> str:
    """The name of a prompt that was given none: the ``number``-th from 1, or the only one."""
    return f"prompt {number}" if number is not None else "prompt"


def is_counted(name: str, number: int) -> bool:
    """Whether a prompt, the ``number``-th from 1, has a name that only counts."""
    return name in (numbered(number), numbered(None))


def line_of(line: str, number: int) -> PromptSpec:
    """The prompt that a line of a text file is, the ``number``-th from 1."""
    return PromptSpec(name=numbered(number), text=line)


def row_of(row: str, number: int, path: Path, line: int) -> PromptSpec:
    """The prompt that a row of a JSONL file is: a text, or an object as in a YAML list.

    Args:
        row: the text.
        number: of the prompt, from 1.
        path: of the file.
        line: of the file, from 1: lines may be blank.

    Raises:
        UsageError: it is none; the file and the line are named.
    """
    try:
        item = json.loads(row)
        whole = _HALF not in row.lower() or is_whole(json.dumps(item, ensure_ascii=False))
    except (ValueError, RecursionError):
        whole = False
    where = f"{path}, line {line}"
    if not whole or not isinstance(item, (str, dict)):
        raise UsageError(f"--prompts: {where}: is no JSON text or object; expected a row like {_ROW}.")
    return _spec(item, number, where)


_ROW = '{"name": "a name", "text": "a prompt"}'


def _spec(item: Any, number: int, where: str) -> PromptSpec:
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, dict) and "name" not in item:
        item = {"name": numbered(number), **item}
    if isinstance(item, dict) and "rows" in item:
        raise UsageError(f"--prompts: {where} rows: only a saved run (.json) holds rows; give ids.")
    return _valid(item, where)


_KEYS = "name, text, chat, messages, ids, batch and max_tokens"
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": f"is no key of a prompt; expected {_KEYS}",
    "string_type": "expected a text",
    "string_too_short": "is empty",
    "string_too_long": "is too long",
    "int_type": "expected a whole number",
    "list_type": "expected a list",
    "dict_type": "expected an object with role and content",
    "model_type": f"expected a text, or an object with {_KEYS}",
    "greater_than_equal": "expected 1 or more",
}
"""By what a validation calls it."""


def _valid(item: Any, where: str) -> PromptSpec:
    try:
        return PromptSpec.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Of ids that fit neither form the library names both.
        key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise UsageError(f"--prompts: {where}{' ' + key if key else ''}: {message}.") from error


def texts_of(file: str | None) -> list[str]:
    """Texts to sweep over, a line each; none where there is no file.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    if file is None:
        return []
    text = read_text(Path(file), MAX_TEXT_BYTES, "--sweep-texts", "a text a line")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--sweep-texts: {file} is empty; expected a text a line.")
    return lines
