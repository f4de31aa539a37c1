"""What a probe says that float32 logits buy and cost: that of plain transformers, whatever the way it ran."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

from qwen_precision.judge import bought, judge
from qwen_precision.model import way
from qwen_precision.probe import head, upcasts
from qwen_precision.probe import run as measured
from qwen_precision.record import LOOKED_AT, Run, Upcast
from qwen_precision.torch_dtypes import torch_dtype
from support import kernels
from support.checkpoints import make_checkpoint
from support.families import make_family
from support.plants import one_channel, residual_add
from support.runs import run_probe

pytestmark = pytest.mark.arithmetic

TEXTS = ["The capital of France is Paris", "上海有个非常出名的地方，", "Z"]


def of(run: Run, dtype: str, prompt: int = 0) -> list[Upcast]:
    rows = next(each.upcast for each in run.passes if (each.dtype, each.prompt) == (dtype, prompt))
    assert all(row is not None for row in rows)
    return [row for row in rows if row is not None]


TIES = {"ranks", "changed"} if kernels.OLDEST else set[str]()
"""Counts of tokens that stand otherwise: two whose logits nearly tie stand as the order of a sum has it."""
BY_HAND = 1e-2 if kernels.OLDEST else 2e-3
"""What a softmax by hand loses: rounding and nothing else, a few of the dtype's steps around zero."""


def alike(one: Upcast, other: Upcast) -> None:
    """The same counts, and numbers that differ by no more than the order of a sum."""
    for name, value in one.model_dump().items():
        theirs = getattr(other, name)
        if isinstance(value, float):
            assert theirs == pytest.approx(value, rel=0.05, abs=BY_HAND if name == "by_hand" else 2e-3), name
        elif name in TIES:
            assert abs(theirs - value) <= one.rows, name
        else:
            assert theirs == value, name


def plain_logits(folder: Path, dtype: str, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype)).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_loss_is_that_of_plain_transformers_with_logits_upcast(dtype: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tied=tied)
    run = run_probe(folder, TEXTS, dtypes=[dtype])
    ids = run.prompts[0].rows[0].ids
    logits = plain_logits(folder, dtype, ids)
    (row,) = of(run, dtype)
    true = cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
    assert row.tokens == len(ids) - 1
    assert row.loss == pytest.approx(true.item(), abs=1e-4)
    assert row.loss_in_dtype == pytest.approx(true.item(), abs=0.05) and row.loss_in_dtype != row.loss
    chosen = torch.log_softmax(logits[:-1].double(), dim=-1).gather(-1, torch.tensor(ids[1:])[:, None])
    off = (chosen.to(torch_dtype(dtype)).double() - chosen).square().mean().sqrt().item()
    assert row.logprob_rms == pytest.approx(off, rel=0.02)


def test_in_fp32_there_is_nothing_to_compare(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path), TEXTS[:1])
    assert [each.upcast for each in run.passes if each.dtype == "fp32"] == [[]]


def test_a_single_token_has_no_loss_and_one_distribution(tmp_path: Path) -> None:
    (row,) = of(run_probe(make_checkpoint(tmp_path), ["Z"]), "bf16")
    assert (row.tokens, row.loss, row.loss_in_dtype, row.logprob_max, row.rows) == (0, None, None, None, 1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_probe_streamed_in_slices_and_in_pieces_says_the_same(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path)
    whole = run_probe(folder, TEXTS, dtypes=[dtype])
    monkeypatch.setattr(measured, "SLICE_BYTES", 100 * 4 * 64)  # 100 rows of 512
    monkeypatch.setattr(head, "LOGITS_BYTES", 100 * 2 * 5)  # five tokens of a slice
    sliced = run_probe(folder, TEXTS, dtypes=[dtype], memory="streamed")
    assert whole.logits is not None and sliced.logits is not None
    assert sliced.logits.vocabulary == whole.logits.vocabulary == 512
    assert whole.logits.chunks == 1 < sliced.logits.chunks
    for prompt in range(len(TEXTS)):
        alike(of(whole, dtype, prompt)[0], of(sliced, dtype, prompt)[0])


def test_a_family_run_whole_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_family(tmp_path / "model", "qwen3").folder
    layers = run_probe(folder, TEXTS)
    monkeypatch.setattr(way, "LAYERWISE", frozenset())
    whole = run_probe(folder, TEXTS)
    for dtype in ("fp16", "bf16"):
        assert of(layers, dtype) == of(whole, dtype)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_padding_changes_nothing_in_a_row_of_a_batch(memory: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(f'- {{name: batch, batch: ["{TEXTS[0]}", "{TEXTS[1]}", "ab"]}}\n')
    folder = make_checkpoint(tmp_path / "model")
    batch = of(run_probe(folder, file=str(tmp_path / "prompts.yaml"), memory=memory), "bf16")
    for row, text in zip(batch, [TEXTS[0], TEXTS[1], "ab"], strict=True):
        alike(of(run_probe(folder, [text], memory=memory), "bf16")[0], row)


def test_of_a_long_row_a_few_positions_are_looked_at_and_of_a_batch_of_many_rows_fewer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (row,) = of(run_probe(folder, ["abc " * 20]), "fp16")
    assert row.rows == LOOKED_AT < row.tokens
    (tmp_path / "prompts.yaml").write_text(f"- {{name: batch, batch: {['abcdefghijkl'] * 32}}}\n")
    rows = of(run_probe(folder, file=str(tmp_path / "prompts.yaml")), "fp16")
    assert [each.rows for each in rows] == [upcasts._OF_A_PROMPT // 32] * 32


def loud_logits(model: Any) -> None:
    """Every position's logits are 30,000 and more for one token, and as much below 0 for another."""
    one_channel(model, 3, 100.0)
    model.lm_head.weight.zero_()
    size = 60_000.0 / (model.config.hidden_size**0.5)
    model.lm_head.weight[7, 3], model.lm_head.weight[:7, 3] = size, -size


def test_logits_that_only_a_softmax_in_fp16_overflows_on_are_counted_and_fail_nothing(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path, edit=loud_logits), ['!"#$%&'], dtypes=["fp16", "bf16"])
    fp16, bf16 = of(run, "fp16")[0], of(run, "bf16")[0]
    assert fp16.bad > 0 == bf16.bad and math.isinf(float(fp16.loss_in_dtype or 0)) and math.isfinite(fp16.loss or 0)
    assert fp16.unshifted_bad == fp16.rows and bf16.unshifted_bad == bf16.rows > 0
    assert not any(event.nan or event.inf for each in run.passes for event in each.events)


def test_a_softmax_written_out_in_fp16_that_loses_everything_is_advised_on_and_fails_nothing(tmp_path: Path) -> None:
    def flat(model: Any) -> None:
        model.lm_head.weight.zero_()

    run = run_probe(make_checkpoint(tmp_path, edit=flat, vocab_size=70_000), TEXTS[:1])
    report = judge(run)
    assert set(report.verdict.values()) == {"ok"}
    (finding,) = [each for each in report.findings if each.kind == "advice"]
    assert (finding.dtype, finding.place.name) == ("fp16", "logits, by hand") and "upcast" in finding.cause.advice
    # ln 70,000 is nearer to its fp16 than the sixth digit that a record keeps of each of the two.
    rounded = float(torch.tensor(math.log(7e4)).half())
    assert report.bought["fp16"].loss_error == pytest.approx(abs(rounded - math.log(7e4)), abs=1e-6)


def test_of_a_stream_that_was_replaced_nothing_is_told(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path, edit=residual_add), TEXTS[:1])
    (failing,) = (each for each in run.passes if each.dtype == "fp16")
    assert failing.reseeded and failing.upcast == [None] and bought(run)["fp16"].left_out == 1
    assert of(run, "bf16")[0].rows > 1


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_the_bytes_are_those_of_real_tensors(texts: list[str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    tensors: list[torch.Tensor] = []

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        assert logits is not None
        tensors.append(logits)

    cost = run_probe(folder, texts, on_final=keep).logits
    largest = max(tensors, key=lambda each: each.shape[1])
    assert cost.whole_prompt_bytes == largest.float().nbytes and cost.bytes == largest[:, -1:].float().nbytes
    assert cost.held == max(each.nbytes for each in tensors) and cost.vocabulary == largest.shape[-1]
    assert cost.steps == 2 * len(texts) and cost.upcast_seconds > 0


def test_in_pieces_no_more_is_held_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", 512 * 4 * 3)
    cost = run_probe(make_checkpoint(tmp_path), TEXTS[:1], dtypes=["fp16"]).logits
    assert cost.held == 512 * 4 * 3 < cost.whole_prompt_bytes


def test_without_lm_head_there_are_no_logits_to_tell_of(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole")
    AutoModel.from_pretrained(whole, dtype=torch.bfloat16).save_pretrained(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, tmp_path / "bare" / name)
    run = run_probe(tmp_path / "bare", TEXTS[:1])
    assert run.logits is None and all(each.upcast == [] for each in run.passes)
