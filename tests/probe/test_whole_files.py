"""Files that do not hold all that the config of a family that runs whole asks for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.cli.app import main
from qwen_precision.judge.checks import judge
from qwen_precision.torch_dtypes import torch_dtype
from support.families import make_family
from support.runs import errors, run_probe

pytestmark = [pytest.mark.usefixtures("scratch"), pytest.mark.transformers]

TEXT = "hello there"
Tensors = dict[str, torch.Tensor]


def checkpoint(path: Path, plant: bool = False, edit: Callable[[Tensors], Any] = lambda tensors: None) -> Path:
    """Gemma 2 with an lm_head of its own to be, which its files do not hold."""
    folder = make_family(path, "gemma2", plant=plant).folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_without_its_lm_head_a_causal_model_is_probed_up_to_there(tmp_path: Path) -> None:
    folder, found = checkpoint(tmp_path / "model"), {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        assert logits is None
        found[dtype] = states

    run = run_probe(folder, [TEXT], dtypes=["fp32", "fp16"], on_final=keep)
    assert run.stopped is None and run.not_run == ["lm_head"]
    assert [(each.what, each.value) for each in run.choices if each.what == "lm_head"] == [("lm_head", "not run")]
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT).input_ids])
    for dtype in ("fp32", "fp16"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype)).eval().base_model
        with torch.inference_mode():
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        assert torch.equal(found[dtype], wanted)


def test_an_overflow_in_such_a_model_is_named_and_a_sweep_runs_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", plant=True)
    report = judge(run_probe(folder, [TEXT], dtypes=["fp16"]))
    assert [(each.kind, each.place.module) for each in errors(report)] == [("overflow", "model.layers.1.mlp.down_proj")]
    assert main(["probe", str(checkpoint(tmp_path / "sound")), "--dtype", "fp16", "--sweep", "first-token"]) == 0


def test_generate_says_that_such_a_model_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint(tmp_path / "model")), "--dtype", "fp16"]) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no lm_head" in line and "qprec probe" in line


@pytest.mark.parametrize("verb", ["probe", "generate"])
def test_a_tensor_of_another_shape_is_named_with_both(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def cut(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[name] = tensors[name][:, :100].clone()

    assert main([verb, str(checkpoint(tmp_path / "model", edit=cut)), "--dtype", "fp16"]) == 3
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{name} has shape [64, 100], config.json asks for [64, 128]" in said and "ignore_mismatched" not in said
