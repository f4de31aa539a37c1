"""Which way a model runs: layer by layer where its own code proves it, for this config; else whole, with the reason."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from qwen_precision.judge.checks import judge
from qwen_precision.model.skeleton import NotLayerwise, build
from qwen_precision.model.way import LAYERWISE, arranged, prove
from qwen_precision.record.run import Run
from qwen_precision.torch_dtypes import torch_dtype
from support.families import FAMILIES, SKIPPED, make_family
from support.runs import errors, memory_of, plain_logits, run_probe

pytestmark = pytest.mark.transformers

BATCH = ["hello there, this is a test", "ab"]
FOUND = sorted(name for name in LAYERWISE if name in FAMILIES and name not in SKIPPED)
OLD = transformers.__version__.startswith("4.")
"""Layers of some families give tuples there, which their models take apart: those run whole."""


def answered(folder: Path, **settings: Any) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run over the texts as one left-padded batch, and the logits of each dtype: all, or the last token's."""
    answers: dict[str, torch.Tensor] = {}

    def keep(dtype: str, prompt: int, states: torch.Tensor, logits: torch.Tensor | None) -> None:
        assert logits is not None
        answers[dtype] = logits.clone()

    path = folder.parent / "prompts.yaml"
    path.write_text(f"- {{name: two, batch: {BATCH}}}\n")
    return run_probe(folder, file=str(path), dtypes=["fp32", "fp16"], on_final=keep, **settings), answers


def plain(folder: Path, dtype: str, attention: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype), attn_implementation=attention)
    logits: torch.Tensor = plain_logits(model.eval(), folder, BATCH)
    return logits


@pytest.mark.parametrize("name", FOUND)
def test_a_padded_batch_layer_by_layer_is_what_transformers_gives(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", name).folder
    run, answers = answered(folder, attention="eager")
    assert memory_of(run)[0] == "resident" or OLD
    assert run.stopped is None and not errors(judge(run))
    for dtype in ("fp32", "fp16"):
        assert torch.equal(answers[dtype], plain(folder, dtype, "eager")), dtype


@pytest.mark.parametrize("name", FOUND)
def test_streamed_from_disk_every_operation_reads_as_it_does_resident(name: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", name).folder
    if OLD and arranged(AutoConfig.from_pretrained(folder), None)[1] is not None:
        pytest.skip("this transformers takes apart what its layers give")
    one, other = (answered(folder, memory=memory)[0] for memory in ("resident", "streamed"))
    assert one.sites == other.sites and one.weight_totals == other.weight_totals
    assert one.passes == other.passes


# -- what only a config, or another version of transformers, may switch on --------------------------------------------


def _wrapped(owner: type, change: Callable[..., Any]) -> Callable[..., Any]:
    """``owner.forward`` with what a plant does around it."""
    own = owner.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, own, *args, **kwargs)

    return forward


def scaled_from_ids(self: Any, own: Any, input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
    if input_ids is not None:
        inputs_embeds = self.embed_tokens(input_ids) * 2
    return own(self, inputs_embeds=inputs_embeds, **rest)


def scaled_always(self: Any, own: Any, input_ids: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
    given = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    return own(self, inputs_embeds=given + 1, **rest)


def ids_to_the_layers(self: Any, own: Any, *args: Any, input_ids: Any = None, **rest: Any) -> Any:
    return own(self, *args, input_ids=input_ids, told=input_ids, **rest)


def capped(self: Any, own: Any, *args: Any, **rest: Any) -> Any:
    out = own(self, *args, **rest)
    out.logits = 30 * torch.tanh(out.logits / 30)
    return out


def logits_of_half_the_states(self: Any, own: Any, *args: Any, **rest: Any) -> Any:
    head = self.lm_head.forward
    self.lm_head.forward = lambda hidden: head(hidden / 2)
    try:
        return own(self, *args, **rest)
    finally:
        self.lm_head.forward = head


def first_layer_twice(self: Any, own: Any, *args: Any, **rest: Any) -> Any:
    """And the last one never: transformers runs as many as config.json says."""
    layers = self.layers
    self.layers = nn.ModuleList([layers[0], *layers])
    try:
        return own(self, *args, **rest)
    finally:
        self.layers = layers


def backwards(self: Any, own: Any, *args: Any, **rest: Any) -> Any:
    layers = self.layers
    self.layers = nn.ModuleList(reversed(layers))
    try:
        return own(self, *args, **rest)
    finally:
        self.layers = layers


def raises(self: Any, own: Any, *args: Any, **rest: Any) -> Any:
    raise KeyError("a cache of its own")


PLANTS: dict[str, tuple[type, Callable[..., Any], str]] = {
    "scaled where it starts from ids": (Qwen3Model, scaled_from_ids, "computes before or between its layers"),
    "scaled before the first layer": (Qwen3Model, scaled_always, "computes before or between its layers"),
    "layers that are told the ids": (Qwen3Model, ids_to_the_layers, "more than the hidden states tell"),
    "a layer that runs twice": (Qwen3Model, first_layer_twice, "each of its layers once"),
    "layers in another order": (Qwen3Model, backwards, "each of its layers once, in their order"),
    "logits with a cap": (Qwen3ForCausalLM, capped, "or the logits after it"),
    "lm_head of other states": (Qwen3ForCausalLM, logits_of_half_the_states, "changes the hidden states before"),
    "code that raises": (Qwen3Model, raises, "around stubs its code raises KeyError: 'a cache of its own'"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_layers_would_leave_out_is_seen_before_anything_runs(
    plant: str, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, change, words = PLANTS[plant]
    model = build(AutoConfig.from_pretrained(healthy), "sdpa")
    prove(model)
    monkeypatch.setattr(owner, "forward", _wrapped(owner, change))
    with pytest.raises(NotLayerwise, match=words), torch.inference_mode():
        prove(model)


def test_an_lm_head_with_a_bias_and_numbers_beside_the_weights_are_seen_too(healthy: Path) -> None:
    model: Any = build(AutoConfig.from_pretrained(healthy), "sdpa")
    model.model.layers[1].mlp.register_buffer("counts", torch.zeros(3))
    with pytest.raises(NotLayerwise, match=r"model\.layers\.1\.mlp keeps numbers in the files that are no weights"):
        prove(model)
    model = build(AutoConfig.from_pretrained(healthy), "sdpa")
    model.lm_head.bias = nn.Parameter(torch.zeros(len(model.lm_head.weight), device="meta"))
    with pytest.raises(NotLayerwise, match="no lm_head of weights alone"):
        prove(model)


@pytest.mark.parametrize("plant", ["scaled where it starts from ids", "logits with a cap"])
def test_a_model_that_is_not_proven_runs_whole_and_gives_what_transformers_gives(
    plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_family(tmp_path / "model", "qwen3").folder
    owner, change, words = PLANTS[plant]
    monkeypatch.setattr(owner, "forward", _wrapped(owner, change))
    run, answers = answered(folder)
    way, reason = memory_of(run)
    assert way == "whole" and words in reason
    for dtype in ("fp32", "fp16"):
        assert torch.equal(answers[dtype], plain(folder, dtype, "sdpa")), dtype


def test_tensors_that_transformers_renames_make_it_run_whole(tmp_path: Path) -> None:
    """Qwen3.5's text model is published with the names it has inside its vision model."""
    if "qwen3_5_text" not in FAMILIES:
        pytest.skip("this transformers has no Qwen3.5")
    folder = make_family(tmp_path / "model", "qwen3_5_text").folder
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    run, answers = answered(folder)
    way, reason = memory_of(run)
    assert way == "whole" and "which transformers may rename" in reason
    assert torch.equal(answers["fp16"], plain(folder, "fp16", "sdpa"))
