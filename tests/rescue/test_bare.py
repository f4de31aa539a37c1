"""A model without lm_head (embedding models are saved so) is rescued by its final hidden states: its answer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from qwen_precision.errors import UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.render.words import rescue as words
from qwen_precision.settings.guards import load_guards
from support.checkpoints import edit_json, make_checkpoint
from support.plants import expert_product, one_channel, residual_add, swiglu_product
from support.rescues import IDS, TEXTS, aligned, planned, rescue
from support.runs import run_probe

SHAPES: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "dense": (residual_add, {}),
    "tied": (residual_add, {"tied": True}),
    "moe": (expert_product, {"moe": True}),
    "eight heads to one": (swiglu_product, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
}
SAVED = ["by AutoModel", "as ForCausalLM without lm_head", "as Model with the causal model's names"]


def make_bare(folder: Path, saved: str, **options: Any) -> Path:
    """A checkpoint without lm_head, in one of the ways in which there are such."""
    whole = make_checkpoint(folder.with_name("whole"), **options)
    kept = "Qwen3MoeModel" if options.get("moe") else "Qwen3Model"
    shutil.copytree(whole, folder)
    if saved == "as Model with the causal model's names":
        tensors = {name: each for name, each in load_file(whole / "model.safetensors").items() if "lm_head" not in name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit_json(folder / "config.json", architectures=[kept])
        return folder
    AutoModel.from_pretrained(whole, dtype=getattr(torch, options.get("dtype", "bfloat16"))).save_pretrained(folder)
    if saved == "as ForCausalLM without lm_head":
        edit_json(folder / "config.json", architectures=[kept.replace("Model", "ForCausalLM")])
    return folder


def states(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> torch.Tensor:
    """Final hidden states of plain transformers, which must find every tensor."""
    model, told = AutoModel.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    with torch.inference_mode():
        out: torch.Tensor = aligned(model.eval())(IDS).last_hidden_state
        return out


@pytest.mark.parametrize(
    ("saved", "dtype", "memory", "attention"),
    [
        (SAVED[0], "bfloat16", "resident", "sdpa"),
        (SAVED[1], "float16", "streamed", "eager"),
        (SAVED[2], "float32", "streamed", "sdpa"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bare_checkpoint_is_rescued_and_its_final_hidden_states_keep_every_bit(
    shape: str, saved: str, dtype: str, memory: str, attention: str, tmp_path: Path
) -> None:
    plant, options = SHAPES[shape]
    source = make_bare(tmp_path / "bare", saved, edit=plant, dtype=dtype, **options)
    assert not torch.isfinite(states(source, torch.float16, attention)).all()
    run = rescue(source, tmp_path / "safe", [*TEXTS, "a"], memory=memory, attention=attention)
    exported = run.rescue.exported
    assert exported.verified and exported.identical and exported.kept, exported.why
    ours, wanted = states(tmp_path / "safe", torch.float16, attention), states(source, torch.float32, attention)
    assert torch.isfinite(ours).all() and (ours - wanted).norm() <= 0.01 * wanted.norm()
    assert float(exported.logit_error["after"]) <= float(exported.logit_error["bf16"])
    whole = rescue(
        source, tmp_path / "exact", [*TEXTS, "a"], memory=memory, attention=attention, dtype="bf16", keep=True
    )
    assert whole.rescue.rescaling.final_norm == 0 and not whole.rescue.rescaling.untied
    if dtype == "bfloat16":  # a factor rounds nothing
        assert torch.equal(states(tmp_path / "exact", torch.float32, attention), wanted)


def test_what_is_written_in_fp32_is_the_same_function_bit_for_bit(tmp_path: Path) -> None:
    source = make_bare(tmp_path / "bare", SAVED[1], edit=residual_add, dtype="float32", tied=True)
    run = rescue(source, tmp_path / "safe", dtype="source")
    assert run.rescue.rescaling.stream > 0
    assert torch.equal(states(tmp_path / "safe", torch.float32), states(source, torch.float32))


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("moe", [False, True])
def test_a_healthy_bare_checkpoint_gives_what_plain_transformers_gives(moe: bool, saved: str, tmp_path: Path) -> None:
    source = make_bare(tmp_path / "bare", saved, moe=moe)
    seen: dict[str, torch.Tensor] = {}

    def keep(dtype: str, prompt: int, hidden: torch.Tensor, logits: torch.Tensor | None) -> None:
        assert logits is None
        seen[dtype] = hidden

    run = run_probe(source, ["a" * 5], on_final=keep)
    ids = torch.tensor([run.prompts[0].rows[0].ids])
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.inference_mode():
            assert torch.equal(seen[name], AutoModel.from_pretrained(source, dtype=dtype)(ids).last_hidden_state)
    assert judge(run).verdict["fp16"] == "ok" and any(each.what == "lm_head" for each in run.choices)
    assert rescue(source, tmp_path / "safe").rescue.exported is None


def test_a_tied_language_model_has_its_logits_compared_as_before(healthy_tied: Path, healthy: Path) -> None:
    assert not any(open_checkpoint(folder, "x").bare for folder in (healthy_tied, healthy))


def test_a_final_norm_beyond_fp16_is_the_answer_and_is_not_moved(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        model.model.norm.weight[3] = 30_000.0

    plan = planned(make_bare(tmp_path / "bare", SAVED[0], edit=plant)).rescue
    (first,) = [each for each in plan.stuck if each.fails]
    assert first.module == "model.norm" and "the model's answer" in first.why and not plan.possible


def test_the_words_say_what_was_compared(tmp_path: Path) -> None:
    source = make_bare(tmp_path / "bare", SAVED[0], edit=residual_add)
    report = judge(rescue(source, tmp_path / "safe"))
    lines = dict(words.proof(report, report.run.rescue.exported))
    assert "final hidden states equal to" in lines["in fp32"] and "logits" not in str(lines)


def test_another_model_without_a_head_is_not_rescued(tmp_path: Path) -> None:
    source = make_bare(tmp_path / "bare", SAVED[0])
    edit_json(source / "config.json", architectures=["Qwen3ForSequenceClassification"])
    report = judge(rescue(source, tmp_path / "safe"))
    assert report.run.rescue is None and "score.weight" in str(report.run.stopped)


def test_generate_does_not_rescale_what_has_no_lm_head(tmp_path: Path) -> None:
    """transformers ties one to the embedding, whose factor nothing would take back."""
    from support.generations import run as generated

    source = make_bare(tmp_path / "bare", SAVED[1], edit=residual_add, tied=True)
    with pytest.raises(UsageError, match="no lm_head"):
        generated(source, guards=load_guards("default", "rescale"), max_new_tokens=2)
