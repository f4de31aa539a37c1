"""The shadow gives what plain transformers gives, bit for bit; streamed equals resident."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.dtypes import DTYPES
from qwen_precision.probe.run import measure, prepare
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import read_prompts
from support.checkpoints import DEMO, make_checkpoint
from support.runs import run_probe

pytestmark = [pytest.mark.arithmetic, pytest.mark.transformers]

SINGLE = ["The capital of France is", "上海有个非常出名的地方，"]
BATCH = ["The capital of France is Paris", "1", "上海有个非常出名的地方，"]


def plain(folder: Path, dtype: str, attention: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(final hidden states, logits) of transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, DTYPES[dtype].torch_name), attn_implementation=attention
    ).eval()
    # As ``generate`` counts: padding has no position of its own.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).masked_fill(inputs["attention_mask"] == 0, 0)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        return hidden, model(**inputs).logits


def shadowed(folder: Path, attention: str, texts: list[str], tmp_path: Path, **settings: object) -> dict:
    """By dtype: (final hidden states, logits) of the shadow, the texts as one batch."""
    path = tmp_path / "prompts.yaml"
    import yaml

    path.write_text(yaml.safe_dump([{"name": "batch", "batch": texts}], allow_unicode=True))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def keep(dtype: str, prompt: int, hidden: torch.Tensor, logits: torch.Tensor | None) -> None:
        seen[dtype] = (hidden.clone(), None if logits is None else logits.clone())

    run_probe(folder, file=str(path), attention=attention, on_final=keep, **settings)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("texts", [SINGLE[:1], SINGLE[1:], BATCH], ids=["single", "chinese", "left-padded batch"])
@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_hidden_states_and_logits_are_bit_identical_to_transformers(
    kind: str, texts: list[str], attention: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue({"untied": "healthy", "tied": "healthy_tied", "moe": "healthy_moe"}[kind])
    seen = shadowed(folder, attention, texts, tmp_path, memory="resident")
    for dtype in DTYPES:
        hidden, logits = plain(folder, dtype, attention, texts)
        assert torch.equal(seen[dtype][0], hidden), dtype
        assert seen[dtype][1] is not None and torch.equal(seen[dtype][1], logits), dtype


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_row_is_given_to_the_layers_as_generate_gives_it(
    attention: str, healthy: Path, tmp_path: Path
) -> None:
    """The first logits that ``generate`` draws from, bit for bit, with no help in what positions are."""
    tokenizer = AutoTokenizer.from_pretrained(healthy)
    inputs = tokenizer(BATCH, return_tensors="pt", padding=True, padding_side="left")
    seen = shadowed(healthy, attention, BATCH, tmp_path, memory="resident")
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(
            healthy, dtype=getattr(torch, DTYPES[dtype].torch_name), attn_implementation=attention
        ).eval()
        drawn: list[torch.Tensor] = []
        model.register_forward_hook(lambda module, args, out, drawn=drawn: drawn.append(out.logits[:, -1].clone()))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
        hidden = seen[dtype][0]
        with torch.inference_mode():
            assert torch.equal(model.lm_head(hidden[:, -1:])[:, 0], drawn[0]), dtype


def test_the_tokens_of_a_padded_row_stand_at_the_positions_they_have_alone(healthy: Path) -> None:
    from transformers import AutoConfig

    from qwen_precision.model.skeleton import build, layer_calls

    model = build(AutoConfig.from_pretrained(healthy), "sdpa")
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    batch = layer_calls(model, torch.zeros(2, 5, 64), mask)[1].kwargs["position_embeddings"]
    alone = layer_calls(model, torch.zeros(1, 3, 64), mask[:1, :3])[1].kwargs["position_embeddings"]
    for ours, wanted in zip(batch, alone, strict=True):
        assert torch.equal(ours[1, 2:], wanted[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bit_identity_holds_for_every_dtype_on_disk(dtype: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype=dtype)
    seen = shadowed(folder, "sdpa", BATCH, tmp_path)
    for name in DTYPES:
        hidden, logits = plain(folder, name, "sdpa", BATCH)
        assert torch.equal(seen[name][0], hidden)
        assert torch.equal(seen[name][1], logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_trained_demo_is_bit_identical_in_the_dtypes_that_survive_it(attention: str, tmp_path: Path) -> None:
    seen = shadowed(DEMO, attention, BATCH, tmp_path)
    for dtype in ("bf16", "fp32"):
        hidden, logits = plain(DEMO, dtype, attention, BATCH)
        assert torch.equal(seen[dtype][0], hidden)
        assert torch.equal(seen[dtype][1], logits)


def test_without_a_reference_even_the_failing_dtype_is_what_transformers_gives(tmp_path: Path) -> None:
    seen = shadowed(DEMO, "sdpa", BATCH, tmp_path, dtypes=["fp16"], reference=False)
    hidden, _ = plain(DEMO, "fp16", "sdpa", BATCH)
    assert torch.isnan(hidden).any()
    assert torch.equal(torch.isnan(seen["fp16"][0]), torch.isnan(hidden))


def test_rows_that_stay_finite_are_not_touched_when_another_row_of_the_batch_fails(tmp_path: Path) -> None:
    def plant(model) -> None:
        # Only the token of "1" reaches the fault: its embedding alone has channel 5.
        model.model.embed_tokens.weight[:, 5] = 0
        model.model.embed_tokens.weight[token, 5] = 4.0
        model.model.layers[1].mlp.down_proj.weight.mul_(0)
        model.model.layers[1].mlp.gate_proj.weight[0] = 0
        model.model.layers[1].mlp.up_proj.weight[0] = 0
        model.model.layers[1].mlp.gate_proj.weight[0, 5] = 8
        model.model.layers[1].mlp.up_proj.weight[0, 5] = 8
        model.model.layers[1].mlp.down_proj.weight[7, 0] = 3e4

    token = AutoTokenizer.from_pretrained(DEMO)("1")["input_ids"][0]
    folder = make_checkpoint(tmp_path / "model", edit=plant)
    texts = ["The capital of France is Paris", "1"]
    seen = shadowed(folder, "sdpa", texts, tmp_path, dtypes=["fp16"])
    hidden, _ = plain(folder, "fp16", "sdpa", texts)
    assert not torch.isfinite(hidden[1]).all() and torch.isfinite(hidden[0]).all()
    assert torch.equal(seen["fp16"][0][0], hidden[0])


def columns(run) -> dict:
    sites = [(site.module, site.op, site.call) for site in run.sites]
    return {
        (each.dtype, each.prompt, sites[index]): value
        for each in run.passes
        for index, value in enumerate(each.abs_max)
    }


@pytest.mark.parametrize("kind", ["healthy", "healthy_tied", "healthy_moe"])
def test_streamed_equals_resident_reading_for_reading(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    resident, streamed = (run_probe(folder, memory=memory) for memory in ("resident", "streamed"))
    assert columns(resident) == columns(streamed)
    assert [each.top1 for each in resident.passes] == [each.top1 for each in streamed.passes]
    assert resident.weight_totals == streamed.weight_totals


def test_streamed_equals_resident_on_a_failing_checkpoint_too() -> None:
    resident, streamed = (run_probe("demo", memory=memory) for memory in ("resident", "streamed"))
    assert str(columns(resident)) == str(columns(streamed))  # as text: NaN is not equal to itself
    assert [each.events for each in resident.passes] == [each.events for each in streamed.passes]


def test_a_vocabulary_taken_in_slices_gives_the_same_likeliest_tokens(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_precision.probe.run.SLICE_BYTES", 4 * 64 * 100)  # 100 rows at a time, 512 in all
    sliced = run_probe(healthy, memory="streamed")
    whole = run_probe(healthy, memory="resident")
    assert [each.top1 for each in sliced.passes] == [each.top1 for each in whole.passes]
    logits = [index for index, site in enumerate(whole.sites) if site.module == "lm_head"]
    assert len(logits) == 1
    for a, b in zip(sliced.passes, whole.passes, strict=True):
        assert a.abs_max[logits[0]] == pytest.approx(b.abs_max[logits[0]], rel=1e-2)


def test_a_model_that_works_between_its_layers_is_refused_not_misread(healthy: Path) -> None:
    from transformers import AutoConfig

    from qwen_precision.errors import QprecError
    from qwen_precision.model.skeleton import build, layer_calls

    model = build(AutoConfig.from_pretrained(healthy), None)
    embedded, mask = torch.ones(1, 4, 64), torch.ones(1, 4, dtype=torch.int64)
    assert len(layer_calls(model, embedded, mask)) == 3
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(QprecError, match="between its layers"):
        layer_calls(model, embedded, mask)


def test_logits_of_a_long_prompt_are_computed_in_pieces(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_probe(healthy)
    monkeypatch.setattr("qwen_precision.probe.head.LOGITS_BYTES", 512 * 4 * 3)  # three tokens of fp32 logits
    pieces = run_probe(healthy)
    assert [each.top1 for each in pieces.passes] == [each.top1 for each in whole.passes]


def test_the_model_is_left_as_it_was_found(healthy: Path) -> None:
    job = prepare(str(healthy), load_settings(None, {}), read_prompts(["hello"], None))
    assert measure(job).stopped is None
    for part in job.model.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in part.__dict__
        assert all(parameter.is_meta for parameter in part.parameters(recurse=False))


def test_a_tied_model_whose_files_hold_another_lm_head_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "model", tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seen = shadowed(folder, "sdpa", BATCH, tmp_path)
    for name in DTYPES:
        hidden, logits = plain(folder, name, "sdpa", BATCH)
        assert torch.equal(seen[name][0], hidden) and torch.equal(seen[name][1], logits)
