"""Quantised checkpoints of other families, run either way: the same bits as a plain checkpoint of the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.model.way import arranged
from support.families import WRAPPERS, make_family
from support.quantise import SCHEMES, Parts, quantised, rewrite
from support.runs import errors, memory_of, run_probe, sentence

pytestmark = [pytest.mark.usefixtures("scratch"), pytest.mark.transformers]

DTYPES = ["fp32", "fp16", "bf16"]
FAMILIES = {
    "gemma3_text": r"_proj\.weight$",
    "phi3": r"_proj\.weight$",  # three projections in one matrix
    "qwen2_moe": r"_proj\.weight$",  # experts that files keep one by one
    "mixtral": r"(_proj|w[123])\.weight$",  # and under other names
    "Gemma3ForConditionalGeneration": r"language_model.*_proj\.weight$",  # a model inside another
}
"""Families, and their matrices that are quantised."""


def made(folder: Path, name: str, scheme: str, plant: bool = False) -> tuple[Path, Path, str | None]:
    """A quantised tiny checkpoint, the one with the same numbers, and the module that overflows in fp16."""
    architecture = name if name in WRAPPERS else None
    family = make_family(folder / "plain", WRAPPERS.get(name, name), plant=plant, architecture=architecture)
    return *quantised(family.folder, folder / "q", SCHEMES[scheme], FAMILIES.get(name, r"\.weight$")), family.planted


def probed(folder: Path) -> tuple[Report, dict[tuple[str, int], Tensor]]:
    answers: dict[tuple[str, int], Tensor] = {}

    def keep(dtype: str, prompt: int, states: Tensor, logits: Tensor | None) -> None:
        answers[dtype, prompt] = states if logits is None else logits

    run = run_probe(folder, ["hello there", "ab"], dtypes=DTYPES, on_final=keep)
    way = "resident" if arranged(AutoConfig.from_pretrained(folder), None)[1] is None else "whole"
    assert memory_of(run)[0] == way
    return judge(run), answers


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct int4 zeros", "gptq sorted", "awq"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_in_every_dtype_is_that_of_the_same_numbers(name: str, scheme: str, tmp_path: Path) -> None:
    folder, twin, _ = made(tmp_path, name, scheme)
    assert sum(info.packed is not None for info in open_checkpoint(folder, "x").tensors.values()) >= 10
    (report, ours), (_, theirs) = probed(folder), probed(twin)
    assert report.stopped is None and ours.keys() == theirs.keys() and len(ours) == 2 * len(DTYPES)
    for key, answer in ours.items():
        assert torch.equal(answer, theirs[key]) and torch.isfinite(answer).all(), key


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct int4", "gptq"])
@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "qwen2_moe"])
def test_an_overflow_in_it_is_named(name: str, scheme: str, tmp_path: Path) -> None:
    folder, twin, planted = made(tmp_path, name, scheme, plant=True)
    (report, _), (same, _) = probed(folder), probed(twin)
    found = errors(report)
    assert all(f".{planted}." in f".{each.place.module}." and not each.predicted for each in found), found
    places = {(each.place.module, each.place.name, each.place.expert) for each in found}
    assert len(places) == len(found) and (len(found) == 1 or name == "qwen2_moe")  # there every expert is a place
    assert report.findings == same.findings


def test_generate_gives_the_tokens_of_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, twin, _ = made(tmp_path, "phi3", "awq")
    printed = []
    for each in (folder, twin):
        arguments = ["--dtype", "bf16", "--prompt", "hello there", "--max-new-tokens", "8", "-o", "gen.json", "--text"]
        assert main(["generate", str(each), *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].strip()


def test_a_scale_that_cannot_be_right_is_a_finding(tmp_path: Path) -> None:
    folder, _, _ = made(tmp_path, "phi3", "fp8 blocks")
    name = "model.layers.2.mlp.down_proj.weight_scale_inv"
    rewrite(folder, lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    report, _ = probed(folder)
    assert report.findings[0].kind == "weight-nonfinite"
    assert [(fault.name, fault.kind) for fault in report.run.scale_faults] == [(name, "nan")]


def _of_another_scheme(tensors: Parts) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].view(torch.int8)


def _cut(tensors: Parts) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"][:32].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_of_another_scheme, ["down_proj.weight", "stored as I8", "no part of a quantised weight"]),
        (_cut, ["down_proj.weight", "scale of shape"]),
    ],
)
def test_a_tensor_that_is_not_of_the_scheme_gets_one_sentence(
    change: Callable[[Parts], None], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = made(tmp_path, "phi3", "fp8 blocks")
    rewrite(folder, change)
    assert main(["probe", str(folder), "--prompt", "hello"]) == 3
    line = sentence(capsys)
    assert all(word in line for word in words), line


def test_matrices_that_lie_turned_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's Conv1D: no scheme says which way round it was quantised, and a square one fits either way."""
    folder = make_family(tmp_path / "plain", "gpt2").folder
    folder, _ = quantised(folder, tmp_path / "q", SCHEMES["gptq"], r"h\.\d\.attn\.c_proj\.weight$")
    assert main(["probe", str(folder), "--prompt", "hello"]) == 3
    line = sentence(capsys)
    assert "c_proj.weight" in line and "turned" in line and "made from" in line


def test_numbers_that_do_not_fit_into_memory_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = made(tmp_path, "gemma3_text", "gptq")
    monkeypatch.setattr("qwen_precision.model.loaded.free_bytes", lambda device: 1000)
    assert main(["probe", str(folder), "--prompt", "hello"]) == 3
    line = sentence(capsys)
    assert "dequantised" in line and "GiB are free" in line
