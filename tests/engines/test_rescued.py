"""Rescued folders of other families, in vLLM in float16: they answer as fp32 does. ``make engines``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines.fresh import NEEDS_VLLM, serve
from support.checkpoints import make_checkpoint
from support.plants import expert_product, swiglu_product
from support.rescues import LLAMA, TEXTS, rescue

pytestmark = NEEDS_VLLM

SHAPE = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}  # vLLM's CPU kernels take no smaller heads
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "llama": {"family": "llama", **LLAMA},
    "qwen3_moe": {"moe": True},
}


def loud_product(model: Any) -> None:
    """The SwiGLU product of layer 1 is beyond fp16; what is drawn depends on the other channels, and on the text."""
    model.model.embed_tokens.weight *= 50.0
    (expert_product if hasattr(model.model.layers[1].mlp, "experts") else swiglu_product)(model)
    model.lm_head.weight *= 50.0
    model.lm_head.weight[:, 3] = 0.0


def plain_fp32(folder: Path, texts: list[str]) -> list[str]:
    """What transformers answers, greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for text in texts:
        given = tokenizer(text, return_tensors="pt")
        made = model.generate(**given, do_sample=False, max_new_tokens=6)[0, given["input_ids"].shape[1] :]
        answers.append(str(tokenizer.decode(made, skip_special_tokens=True)).rstrip("�"))  # vLLM waits for the rest
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_a_rescued_folder_answers_in_float16_as_fp32_does_and_the_folder_itself_does_not(
    kind: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", edit=loud_product, **{**SHAPE, **KINDS[kind]})
    made = rescue(source, tmp_path / "rescued", dtypes=["fp16"])
    assert made.rescue is not None and made.rescue.exported is not None
    wanted = plain_fp32(source, TEXTS)
    assert len(set("".join(wanted))) > 3, "a text that says something"
    assert serve(tmp_path, tmp_path / "rescued", "float16", TEXTS) == [wanted]
    assert serve(tmp_path, source, "float16", TEXTS) != [wanted]
