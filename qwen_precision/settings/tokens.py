"""Prompts as the model takes them: token ids, a batch padded on the left as for generation, and each id as text."""

from collections.abc import Sequence
from typing import Any

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.record import FailedStep, Prompt, Row
from qwen_precision.settings.firstids import first_ids
from qwen_precision.settings.prompts import PromptSpec, repeated
from qwen_precision.settings.templates import TemplateFault, has_template, in_template


def tokenise(
    specs: Sequence[PromptSpec],
    tokenizer: Any,
    vocabulary: int,
    context: int | None,
    max_tokens: int | None,
    cut_with: str | None = "--max-tokens",
) -> tuple[list[Prompt], dict[str, str]]:
    """Prompts as token ids, and the names of those left out because no chat template makes a text of them, with why.

    Args:
        vocabulary: rows of the embedding; an id beyond it cannot be looked up.
        context: the model's longest sequence, or None if it names none.
        max_tokens: cut every row to its first so many tokens.
        cut_with: the option that would have cut a row that is too long, for the message.

    Raises:
        UsageError: a prompt without tokens, longer than the context, or outside the vocabulary.
    """
    prompts: list[Prompt] = []
    left_out: dict[str, str] = {}
    twice = repeated([spec.name for spec in specs])
    if twice is not None:
        raise UsageError(f"prompt {twice!r}: is there twice; give each prompt a name of its own.")
    for spec in specs:
        if spec.templated and not has_template(tokenizer):
            left_out[spec.name] = "the tokenizer has no chat template"
            continue
        cut = min(filter(None, (spec.max_tokens, max_tokens)), default=None)
        most = cut or (context + 1 if context else None)  # one more tells that it is too long
        try:
            rows = [(text, ids[:cut]) for text, ids in _ids(spec, tokenizer, most)]
        except TemplateFault as error:
            left_out[spec.name] = f"the checkpoint's chat template {error}"
            continue
        for _, ids in rows:
            _check(spec, ids, vocabulary, context, cut_with)
        longest = max(len(ids) for _, ids in rows)
        prompts.append(
            Prompt(
                name=spec.name,
                rows=[
                    Row(
                        text=text if spec.given_ids is None or text else text_of(ids, tokenizer),
                        ids=ids,
                        tokens=[as_text(i, tokenizer) for i in ids],
                        padding=longest - len(ids),
                    )
                    for text, ids in rows
                ],
                failed=_still(spec, [ids for _, ids in rows]),
            )
        )
    if not prompts:
        why = next(iter(left_out.values()))
        kind = QprecError if has_template(tokenizer) else UsageError
        raise kind(f"--prompts: only chat prompts, but {why}; give texts.")
    return prompts, left_out


def _still(spec: PromptSpec, rows: list[list[int]]) -> FailedStep | None:
    """The step that failed on these ids; none where they were cut, or a record from elsewhere lacks a row."""
    given = [row.ids for row in spec.rows or ()]
    fits = spec.failed is not None and rows == given and spec.failed.fits([len(ids) for ids in rows])
    return spec.failed if fits else None


def rendered(spec: PromptSpec, text: str, tokenizer: Any) -> str:
    """The text that is tokenised: as it is, or in the chat template.

    Raises:
        TemplateFault: the template, a program from a stranger, gives no text.
    """
    if spec.messages is not None:
        return in_template(spec.messages, tokenizer, answer=spec.messages[-1]["role"] != "assistant")
    return text if spec.chat is None else in_template([{"role": "user", "content": text}], tokenizer, answer=True)


def _ids(spec: PromptSpec, tokenizer: Any, most: int | None) -> list[tuple[str, list[int]]]:
    """Text and token ids of each row; of a long text no more than are asked for."""
    if spec.given_ids is not None:
        return list(zip(spec.texts(), spec.given_ids, strict=True))
    plain = not spec.templated
    return [(text, first_ids(rendered(spec, text, tokenizer), tokenizer, plain, most)) for text in spec.texts()]


def text_of(ids: list[int], tokenizer: Any) -> str:
    """The text that gives these very ids, or none: half a character, or tokens that would merge, have no such text."""
    text = str(tokenizer.decode(ids))
    return text if list(tokenizer(text)["input_ids"]) == ids else ""


def as_batch(prompts: Sequence[Prompt]) -> Prompt:
    """All rows of all prompts as one left-padded batch."""
    rows = [row for prompt in prompts for row in prompt.rows]
    longest = max(len(row.ids) for row in rows)
    padded = [row.model_copy(update={"padding": longest - len(row.ids)}) for row in rows]
    return Prompt(name="batch" if len(rows) > 1 else prompts[0].name, rows=padded, failed=None)


def _check(spec: PromptSpec, ids: list[int], vocabulary: int, context: int | None, cut_with: str | None) -> None:
    name = spec.name
    if not ids:
        raise UsageError(f"prompt {name!r}: gives no tokens; use a longer text.")
    if context is not None and len(ids) > context:
        remedy = f"shorten it or add {cut_with} {context}" if cut_with else "shorten it"
        count = f"more than {context}" if len(ids) == context + 1 else len(ids)
        raise UsageError(f"prompt {name!r}: has {count} tokens, the model's context is {context}; {remedy}.")
    if spec.ids is not None and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UsageError(f"prompt {name!r}: holds the token id {wrong}; this model's are 0 to {vocabulary - 1}.")
    if min(ids) < 0:
        raise UsageError(f"prompt {name!r}: holds the token id {min(ids)}; the saved run is damaged.")
    if max(ids) >= vocabulary:
        raise UsageError(
            f"prompt {name!r}: the tokenizer gives id {max(ids)}, the embedding has {vocabulary} rows; "
            "tokenizer and weights do not belong together."
        )


def as_text(token: int, tokenizer: Any) -> str:
    """One id as text; a part of a character has none of its own, so it is shown as the tokenizer spells it."""
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:
        text = tokenizer.convert_ids_to_tokens(token) or f"id {token}"  # a padded vocabulary has more rows than tokens
    return str(text)
