"""The proof of a rescue compares equal arithmetic: wherever in a file the weights begin, and on however few tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.qwen3.rescaling import Scale
from support.checkpoints import begin_data_at, make_checkpoint
from support.plants import one_channel
from support.rescues import aligned, load, rescue
from support.runs import run_probe

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tied": True},
    "moe": {"moe": True},
    "eight heads to one": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
}


def loud_stream(model: Any) -> None:
    """The embedding is beyond fp16 in one channel, which nothing else looks at."""
    one_channel(model, 9, 100_000.0)
    model.model.norm.weight[9] = 0.0
    model.model.norm.weight *= 256.0  # the channel dwarfs the others, which are all that the logits are made of


def outputs(folder: Path, ids: list[int], attention: str = "sdpa") -> tuple[torch.Tensor, torch.Tensor]:
    """(final hidden states, logits) of plain transformers in fp32."""
    model = aligned(load(folder, torch.float32, attention))
    with torch.inference_mode():
        given = torch.tensor([ids])
        return model.model(given).last_hidden_state, model(given).logits


@pytest.mark.parametrize(("memory", "attention"), [("resident", "sdpa"), ("streamed", "eager")])
@pytest.mark.parametrize("offset", [8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_one_token_is_proven_wherever_fp32_weights_begin(
    shape: str, offset: int, memory: str, attention: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", edit=loud_stream, dtype="float32", **SHAPES[shape])
    begin_data_at(source, offset)
    run = rescue(source, tmp_path / "safe", ["a"], dtype="source", memory=memory, attention=attention)
    exported = run.rescue.exported
    assert exported.identical and exported.verified and exported.kept, exported.why
    ids = run.prompts[0].rows[0].ids
    assert len(ids) == 1
    logits, wanted = (outputs(folder, ids, attention)[1] for folder in (tmp_path / "safe", source))
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("moe", [False, True])
def test_it_is_proven_in_whatever_format_the_weights_are_kept(moe: bool, dtype: str, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        loud_stream(model)
        one_channel(model, 9, 60_000.0)  # finite in fp16, and nearer to its end than is safe

    source = make_checkpoint(tmp_path / "source", edit=plant, dtype=dtype, moe=moe)
    begin_data_at(source, 24)
    exported = rescue(source, tmp_path / "safe", ["a", "ab"]).rescue.exported
    assert exported.identical, exported.why


def test_another_function_is_not_proven_on_one_token_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", edit=loud_stream, dtype="float32")
    begin_data_at(source, 8)
    factor = Scale.factor
    monkeypatch.setattr(Scale, "factor", lambda self, name: factor(self, name) + ("layers.2.mlp.up" in name))
    exported = rescue(source, tmp_path / "safe", ["a"]).rescue.exported
    assert not exported.identical and not (tmp_path / "safe").exists()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shadow_of_one_token_is_plain_transformers_and_streamed_is_resident(
    shape: str, attention: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="float32", **SHAPES[shape])
    begin_data_at(source, 8)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for memory in ("resident", "streamed"):

        def keep(dtype: str, prompt: int, states: torch.Tensor, logits: Any, memory: str = memory) -> None:
            seen[memory] = states, logits[:, -1]

        run = run_probe(source, ["a"], dtypes=["fp32"], memory=memory, attention=attention, on_final=keep)
    states, logits = outputs(source, run.prompts[0].rows[0].ids, attention)
    for ours, last in seen.values():
        assert torch.equal(ours, states) and torch.equal(last, logits[:, -1])
