"""When the probe that leads to an origin can be given a text, and when it has to read the record."""

from typing import Any

import pytest

from qwen_precision.judge.nextcommand import _LONGEST_PROMPT, next_probe
from qwen_precision.record.run import Prompt
from support.builders import a_continuation, a_cost, a_generation, a_prompt, a_trip, generated


def read_from(
    text: str = "Hello there", given: str | None = None, rows: int = 1, row: int = 0, step: int = 0, chunks: int = 1
) -> str:
    """The option by which the probe of a row that failed at a step is given its prompt."""
    cost = a_cost(chunks=chunks)
    failed = a_continuation([9707], ["!"], input=text, row=row)
    made = a_generation([failed], [a_trip(step, row=row)], logits=cost)
    prompt = Prompt(name="prompt", rows=[a_prompt(text=given or text).rows[0]] * rows, failed=None)
    return next_probe(generated(made, ["fp16"], prompts=[prompt]), failed, "gen.json").split(" --dtype fp16 ")[1]


def test_a_row_that_failed_on_its_text_alone_is_named_by_it() -> None:
    assert read_from() == "--prompt 'Hello there'"


@pytest.mark.parametrize(
    "otherwise",
    [
        {"rows": 2},
        {"row": 1},
        {"step": 1},
        {"chunks": 2},
        {"text": ""},
        {"given": "<|im_start|>Hello there"},
        {"text": "a" * (_LONGEST_PROMPT + 1)},
    ],
    ids=["a batch", "a row that is missing", "a later step", "in chunks", "no text", "a chat turn", "too long"],
)
def test_a_text_that_is_not_what_the_step_was_given_is_read_from_the_record(otherwise: dict[str, Any]) -> None:
    assert read_from(**otherwise) == "--prompts gen.json"


def test_the_longest_text_still_fits_a_command_line() -> None:
    assert read_from("a" * _LONGEST_PROMPT) == f"--prompt {'a' * _LONGEST_PROMPT}"
