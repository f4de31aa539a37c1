"""What a saved generation gives as prompts: what each of its failing steps was given."""

from pathlib import Path
from typing import Any

import pytest

from qwen_precision.record.file import save
from qwen_precision.record.generation import Trip
from qwen_precision.record.run import FailedStep
from qwen_precision.settings.prompts import PromptSpec, read_prompts
from support.builders import GUARDS, a_continuation, a_generation, a_trip, generated


def read(trips: list[Trip], folder: Path, **changes: Any) -> list[PromptSpec]:
    """The prompts of a saved generation of two rows."""
    rows = [a_continuation([9707, 1052, 0], ["a", "b", "c"], row=row) for row in (0, 1)]
    save(generated(a_generation(rows, trips, **changes), ["fp16", "bf16"]), folder / "gen.json")
    return read_prompts(None, str(folder / "gen.json"))


def test_a_step_is_said_to_have_failed_on_the_rows_that_failed_first_there(tmp_path: Path) -> None:
    trips = [a_trip(1), a_trip(2), a_trip(2, row=1)]
    assert [(each.name, each.failed and (each.failed.step, each.failed.rows)) for each in read(trips, tmp_path)] == [
        ("batch at step 1", (1, [0])),
        ("batch at step 2", (2, [1])),
    ]


def test_a_step_failed_in_the_dtype_in_which_the_row_was_then(tmp_path: Path) -> None:
    trips = [a_trip(1), a_trip(1, dtype="bf16"), a_trip(2, dtype="bf16")]
    (spec,) = read(trips, tmp_path)
    assert spec.failed == FailedStep(dtype="fp16", step=1, rows=[0], chunk=0)


def test_a_step_whose_logits_were_finite_and_all_alike_is_not_made_again(tmp_path: Path) -> None:
    (spec,) = read([a_trip(1, kind="flat"), a_trip(2)], tmp_path)
    assert spec.rows is not None and len(spec.rows[0].ids) == 3 and spec.failed is None


def test_a_step_at_which_nothing_was_left_to_draw_from_had_finite_logits(tmp_path: Path) -> None:
    (spec,) = read([a_trip(1, kind="all filtered"), a_trip(2)], tmp_path)
    assert spec.failed is not None and spec.failed.step == 2


@pytest.mark.parametrize(
    ("guard", "chunk"),
    [({"chunk": 1}, 1), ({"chunk": 2}, 0), ({"chunk": 0}, 0), ({"chunk": 1, "enabled": False}, 0)],
    ids=["in chunks", "all in one", "whole", "switched off"],
)
def test_a_prompt_was_chunked_where_the_guard_was_on_and_it_is_longer(
    guard: dict[str, Any], chunk: int, tmp_path: Path
) -> None:
    guards = {**GUARDS, "float32_logits": {**GUARDS["float32_logits"], **guard}}
    (spec,) = read([a_trip(1)], tmp_path, guards=guards)
    assert spec.failed is not None and spec.failed.chunk == chunk


def test_a_row_of_the_embedding_that_no_token_has_is_called_by_its_id() -> None:
    from transformers import AutoTokenizer

    from qwen_precision.settings.tokens import as_text
    from support.checkpoints import DEMO

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert as_text(len(tokenizer) + 7, tokenizer) == f"id {len(tokenizer) + 7}"
