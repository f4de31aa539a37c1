"""Prompts: from the command line, a file or the built-in set, to what the model takes.

A prompt is a text, a chat turn (where the tokenizer has a template) or a batch of texts, padded on the left
as for generation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen_precision.errors import QprecError, UsageError, in_one_line
from qwen_precision.record import Prompt, Row, load
from qwen_precision.settings.config import configs_folder, read_yaml

_EXPECTED = (
    "a YAML list of texts (or name/text, name/chat, name/batch), "
    "a text file with a prompt a line, or a saved run (.json)"
)


class PromptSpec(BaseModel):
    """A prompt before it is tokenised: exactly one of text, chat and batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=200)
    text: str | None = None
    chat: str | None = None
    batch: list[str] | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_kind(self) -> "PromptSpec":
        given = [each for each in (self.text, self.chat, self.batch) if each is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of text, chat and batch")
        if not all(self.texts()):
            raise ValueError("is empty; a prompt needs at least one character")
        if not self.texts():
            raise ValueError("is empty; a batch needs at least one text")
        return self

    def texts(self) -> list[str]:
        """The texts of all rows."""
        return self.batch if self.batch is not None else [self.text if self.text is not None else self.chat or ""]


def read_prompts(texts: Sequence[str] | None, file: str | None, instead: Sequence[str] = ()) -> list[PromptSpec]:
    """The prompts to run: those given as text, else those of a file, else ``instead``, else the built-in set.

    Raises:
        UsageError: both, an empty prompt, an unreadable file, or one of another form.
    """
    if texts and file is not None:
        raise UsageError("--prompt and --prompts: give one of the two.")
    texts = texts or ([] if file is not None else instead)
    if texts:
        for text in texts:
            if not text:
                raise UsageError("--prompt: is empty; a prompt needs at least one character.")
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise UsageError("--prompt: is not valid text in this terminal's encoding; put it into a UTF-8 file.")
        names = [f"prompt {number}" for number in range(1, len(texts) + 1)] if len(texts) > 1 else ["prompt"]
        return [PromptSpec(name=name, text=text) for name, text in zip(names, texts, strict=True)]
    if file is not None and not file:
        raise UsageError(f"--prompts: is empty; expected {_EXPECTED}.")
    path = Path(file) if file else configs_folder() / "prompts" / "default.yaml"
    if file and path.suffix.lower() == ".json":
        return _from_record(path)
    if file and path.suffix.lower() not in {".yaml", ".yml"}:
        return _from_lines(path)
    items = read_yaml(path, "--prompts", _EXPECTED)
    if not isinstance(items, list) or not items:
        raise UsageError(f"--prompts: {path} holds no list of prompts; expected {_EXPECTED}.")
    specs = [_spec(item, number, path) for number, item in enumerate(items, 1)]
    names_seen = [spec.name for spec in specs]
    twice = next((name for name in names_seen if names_seen.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--prompts: {path} has two prompts of the name {twice!r}; give each its own.")
    return specs


def _from_record(path: Path) -> list[PromptSpec]:
    """What a generation was given at the step at which it failed, row by row; of a probe, its prompts."""
    run = load(path)
    if run.generation is None:
        texts = [(prompt.name, [row.text for row in prompt.rows]) for prompt in run.prompts]
        return [_spec({"name": name, "batch": rows}, number, path) for number, (name, rows) in enumerate(texts, 1)]
    rows = [row for row in run.generation.rows if row.clean_text is not None] or run.generation.rows
    items = [{"name": f"row {row.row}", "text": row.input + (row.clean_text or "")} for row in rows]
    return [_spec(item, number, path) for number, item in enumerate(items, 1)]


def _from_lines(path: Path) -> list[PromptSpec]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--prompts: cannot read {path} ({why}); expected {_EXPECTED}.") from error
    if not lines:
        raise UsageError(f"--prompts: {path} is empty; expected {_EXPECTED}.")
    return [PromptSpec(name=f"line {number}", text=line) for number, line in enumerate(lines, 1)]


def _spec(item: Any, number: int, path: Path) -> PromptSpec:
    if isinstance(item, str):
        item = {"name": f"prompt {number}", "text": item}
    if isinstance(item, dict) and "name" not in item:
        item = {"name": f"prompt {number}", **item}
    try:
        return PromptSpec.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"--prompts: {path}, prompt {number}{' ' + key if key else ''}: {message}.") from error


def tokenise(
    specs: Sequence[PromptSpec],
    tokenizer: Any,
    vocabulary: int,
    context: int | None,
    max_tokens: int | None,
    cut_with: str | None = "--max-tokens",
) -> tuple[list[Prompt], list[str]]:
    """Prompts as token ids, and the names of those left out because there is no chat template.

    Args:
        vocabulary: rows of the embedding; an id beyond it cannot be looked up.
        context: the model's longest sequence, or None if it names none.
        max_tokens: cut every row to its first so many tokens.
        cut_with: the option that would have cut a row that is too long, for the message.

    Raises:
        UsageError: a prompt without tokens, longer than the context, or outside the vocabulary.
    """
    prompts, left_out = [], []
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"prompt {twice!r}: is there twice; give each prompt a name of its own.")
    for spec in specs:
        if spec.chat is not None and not has_template(tokenizer):
            left_out.append(spec.name)
            continue
        cut = min(filter(None, (spec.max_tokens, max_tokens)), default=None)
        rows = [_ids(spec, text, tokenizer)[:cut] for text in spec.texts()]
        for ids in rows:
            _check(spec.name, ids, vocabulary, context, cut_with)
        longest = max(len(ids) for ids in rows)
        prompts.append(
            Prompt(
                name=spec.name,
                rows=[
                    Row(text=text, ids=ids, tokens=[as_text(i, tokenizer) for i in ids], padding=longest - len(ids))
                    for text, ids in zip(spec.texts(), rows, strict=True)
                ],
            )
        )
    if not prompts:
        raise UsageError("--prompts: only chat prompts, but this tokenizer has no chat template; give texts.")
    return prompts, left_out


def has_template(tokenizer: Any) -> bool:
    """Whether a chat turn can be given."""
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(spec: PromptSpec, text: str, tokenizer: Any) -> str:
    """The text that is tokenised: as it is, or in the chat template.

    Raises:
        QprecError: the template, a program from a stranger, fails.
    """
    if spec.chat is None:
        return text
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # jinja raises what it likes
        raise QprecError(
            f"prompt {spec.name!r}: the checkpoint's chat template fails ({in_one_line(error)}); "
            "give prompts without a chat turn (--prompt or --prompts)."
        ) from error


def _ids(spec: PromptSpec, text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(rendered(spec, text, tokenizer), add_special_tokens=spec.chat is None)["input_ids"])


def as_batch(prompts: Sequence[Prompt]) -> Prompt:
    """All rows of all prompts as one left-padded batch."""
    rows = [row for prompt in prompts for row in prompt.rows]
    longest = max(len(row.ids) for row in rows)
    padded = [row.model_copy(update={"padding": longest - len(row.ids)}) for row in rows]
    return Prompt(name="batch" if len(rows) > 1 else prompts[0].name, rows=padded)


def _check(name: str, ids: list[int], vocabulary: int, context: int | None, cut_with: str | None) -> None:
    if not ids:
        raise UsageError(f"prompt {name!r}: gives no tokens; use a longer text.")
    if context is not None and len(ids) > context:
        remedy = f"shorten it or add {cut_with} {context}" if cut_with else "shorten it"
        raise UsageError(f"prompt {name!r}: has {len(ids)} tokens, the model's context is {context}; {remedy}.")
    if max(ids) >= vocabulary:
        raise UsageError(
            f"prompt {name!r}: the tokenizer gives id {max(ids)}, the embedding has {vocabulary} rows; "
            "tokenizer and weights do not belong together."
        )


def as_text(token: int, tokenizer: Any) -> str:
    """One id as text; a part of a character has none of its own, so it is shown as the tokenizer spells it."""
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return str(text)
