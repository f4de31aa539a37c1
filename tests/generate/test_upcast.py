"""What a softmax in float32 is worth at each step of a text, beside plain transformers; and what its logits take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_precision.record import Continuation, Run
from qwen_precision.torch_dtypes import torch_dtype
from support.checkpoints import make_checkpoint
from support.generations import BATCH, plant, run, settings

pytestmark = pytest.mark.arithmetic

COLUMNS = ("logprob", "logprob_error", "mass_lost", "ranks", "changed")


def rows_of(made: Run) -> list[Continuation]:
    assert made.generation is not None
    return made.generation.rows


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_numbers_of_a_step_are_those_of_its_own_logits_in_float64(dtype: str, sample: bool, healthy: Path) -> None:
    made = run(healthy, ["Hello there"], dtype=dtype, max_new_tokens=4, do_sample=sample)
    (row,), ids = rows_of(made), made.prompts[0].rows[0].ids
    model = AutoModelForCausalLM.from_pretrained(healthy, dtype=torch_dtype(dtype)).eval()
    for step, token in enumerate(row.ids):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + row.ids[:step]])).logits[0, -1]
        logs = torch.log_softmax(logits.double(), -1)
        narrow = logs[token].to(torch_dtype(dtype)).double()
        lost = 1 - logs.exp().to(torch_dtype(dtype)).double().sum()
        # A cache adds in another order: the logits, and with them which way each is rounded, differ in their last bits.
        assert row.logprob[step] == pytest.approx(logs[token].item(), abs=0.05)
        assert abs(row.logprob_error[step] or 0) <= torch.finfo(torch_dtype(dtype)).eps * abs(narrow) / 2 * 1.01
        assert abs(row.mass_lost[step] or 0) < 0.01 and abs(lost) < 0.01


def test_the_first_step_has_no_cache_and_says_exactly_what_plain_transformers_does(healthy: Path) -> None:
    made = run(healthy, ["Hello there"], dtype="bf16", max_new_tokens=1)
    (row,), ids = rows_of(made), made.prompts[0].rows[0].ids
    model = AutoModelForCausalLM.from_pretrained(healthy, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    logs = torch.log_softmax(logits.double(), -1)
    assert row.logprob[0] == pytest.approx(logs[row.ids[0]].item(), abs=1e-5)
    off = logs[row.ids[0]].bfloat16().double() - logs[row.ids[0]]
    assert row.logprob_error[0] == pytest.approx(off.item(), abs=1e-5) and row.logprob_error[0] != 0
    lost = 1 - logs.exp().bfloat16().double().sum().item()
    assert row.mass_lost[0] == pytest.approx(lost, abs=2e-5) and abs(lost) > 5e-5


def test_in_fp32_only_the_log_probability_is_told(healthy: Path) -> None:
    (row,) = rows_of(run(healthy, ["Hello there"], dtype="fp32", max_new_tokens=3))
    assert all(value is not None for value in row.logprob)
    assert all(value is None for name in COLUMNS[1:] for value in getattr(row, name))


def test_unwatched_nothing_is_told(healthy: Path) -> None:
    made = run(healthy, ["Hello there"], settings(watch=False, clamp=False, recover=False), dtype="fp16")
    assert all(value is None for row in rows_of(made) for name in COLUMNS for value in getattr(row, name))


def test_a_row_says_the_same_in_a_batch_as_alone(healthy: Path) -> None:
    batch = rows_of(run(healthy, BATCH, dtype="fp16", max_new_tokens=1))
    for row, text in zip(batch, BATCH, strict=True):
        (alone,) = rows_of(run(healthy, [text], dtype="fp16", max_new_tokens=1))
        assert row.ids == alone.ids and row.logprob == pytest.approx(alone.logprob, abs=0.02)
        assert abs(float(row.mass_lost[0] or 0) - float(alone.mass_lost[0] or 0)) < 1e-3


def test_a_row_that_leaves_for_another_dtype_is_told_of_in_that(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 2 on row 0 is computed in bf16, whose rounding is eight times coarser; row 1 stays in fp16."""

    def fault(step: int, logits: torch.Tensor, cache: Any) -> None:
        if step == 2:
            logits[0] = float("nan")

    plant(monkeypatch, fault)
    moved, stayed = rows_of(run(healthy, BATCH[:2], dtype="fp16", max_new_tokens=6))
    assert [stretch.dtype for stretch in moved.stretches] == ["fp16", "bf16"]
    assert all(value is not None for value in moved.changed)
    assert len(stayed.stretches) == 1
    for row, turn in ((moved, moved.stretches[1].start), (stayed, len(stayed.ids))):
        for step, value in enumerate(row.logprob):
            wide = torch.tensor(value, dtype=torch.float64)
            dtype = torch.float16 if step < turn else torch.bfloat16
            assert row.logprob_error[step] == pytest.approx((wide.to(dtype).double() - wide).item(), abs=2e-5)


def test_logits_that_a_guard_did_not_mend_have_no_numbers(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(step: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:] = float("nan")

    plant(monkeypatch, fault)
    (row,) = rows_of(run(healthy, ["Hello"], "observe", dtype="fp16", max_new_tokens=2))
    assert row.ids and all(value is None for name in COLUMNS for value in getattr(row, name))


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_bytes_held_are_those_of_the_last_position_as_the_model_gives_them(chunk: int, tmp_path: Path) -> None:
    made = run(make_checkpoint(tmp_path), BATCH, settings(float32_logits={"chunk": chunk}), dtype="fp16").generation
    assert made is not None and made.logits is not None
    assert made.logits.held == torch.zeros(3, 1, 512, dtype=torch.float16).nbytes == made.logits.bytes // 2
    assert made.logits.vocabulary == 512 and made.logits.steps == max(len(row.ids) for row in made.rows)


def test_a_model_that_cannot_be_asked_for_the_last_position_holds_a_chunk_of_them(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.model import lanes

    monkeypatch.setattr(lanes, "only_the_last", lambda model: {})
    made = run(healthy, ["The quick brown fox"], settings(float32_logits={"chunk": 3}), dtype="fp16").generation
    assert made is not None and made.logits is not None and made.logits.held == 3 * 512 * 2
