"""The close look, the run-up, massive activations, sweeps, what is measured of precision: against second sources."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qwen_precision.diagnose.run import diagnose
from qwen_precision.errors import QprecError
from qwen_precision.judge.precision import precision
from qwen_precision.judge.surroundings import closeup_of, massive_channels, run_up
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import PromptSpec
from support.checkpoints import make_checkpoint
from support.plants import down_proj_output, enough_of_them, expert_product, ids_of, loud_token, one_unit
from support.rescues import load
from support.runs import TEXTS, explained, first_of, run_probe

# -- microscope and blame --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_microscope_shows_operands_and_the_line_of_code(memory: str, tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", edit=down_proj_output), TEXTS, memory=memory)
    finding = first_of(run)
    look = closeup_of(run, finding)
    assert look is not None and look.source is not None
    assert look.source.file == "transformers/models/qwen3/modeling_qwen3.py" and "self.down_proj(" in look.source.text
    assert [(each.role, each.dtype, each.bad > 0) for each in look.operands] == [
        ("input", "fp16", False),
        ("weight", "fp16", False),
        ("output", "fp16", True),
    ]
    weight = load(tmp_path / "model", torch.float16).model.layers[1].mlp.down_proj.weight.detach()
    assert look.operands[1].shape == list(weight.shape) and look.operands[1].high == float(weight.max())


def test_the_extreme_is_traced_to_the_input_channel_and_the_weight_that_make_it(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", edit=down_proj_output), TEXTS)
    look = closeup_of(run, first_of(run))
    assert look is not None
    first = look.contributions[0]
    assert (first.channel, first.weight) == (0, 2000.0) and first.share == pytest.approx(1.0, abs=1e-3)
    assert first.value * 2000 > 65504


def test_an_expert_s_operation_has_its_close_look_too(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", edit=expert_product, moe=True), TEXTS)
    finding = first_of(run)
    look = closeup_of(run, finding)
    assert finding.place.expert == 5 and look is not None and look.source is not None
    assert "moe" in look.source.file and look.operands[-1].bad > 0


def test_the_run_up_names_what_came_before_with_its_magnitudes(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", edit=down_proj_output), TEXTS)
    steps = run_up(run, first_of(run))
    assert [step.name for step in steps] == ["gate_proj output", "SiLU of the gate", "up_proj output", "SwiGLU product"]
    assert all(step.value == pytest.approx(step.reference, rel=1e-2) for step in steps)


def test_massive_activations_are_listed_by_channel_and_healthy_models_have_none(healthy: Path, tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        loud_token("Z", 3000.0)(model)
        model.model.embed_tokens.weight *= 0.1

    specs = [PromptSpec(name="z", text="abcZ"), PromptSpec(name="no", text="abc")]
    run = explained(make_checkpoint(tmp_path / "model", edit=plant), specs)
    (channel,) = massive_channels(run)
    assert (channel.channel, channel.last, channel.tokens) == (9, 2, ["Z"])
    assert all(each.massive == [] for each in run_probe(healthy, TEXTS).passes)


# -- precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_log_probability_error_is_that_of_plain_transformers(dtype: str, memory: str, healthy: Path) -> None:
    run = run_probe(healthy, TEXTS[:1], memory=memory)
    ids = torch.tensor([ids_of(TEXTS[0])])

    def chosen(name: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            wide = load(healthy, name)(ids).logits.float().log_softmax(-1)
        return wide[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].double()

    wanted = (
        (chosen(torch.bfloat16 if dtype == "bf16" else torch.float16) - chosen(torch.float32)).square().mean().sqrt()
    )
    (value,) = next(each for each in run.passes if each.dtype == dtype).logprob_error
    assert value == pytest.approx(float(wanted), rel=0.02)


def test_padding_counts_for_no_log_probability(healthy: Path) -> None:
    specs = [PromptSpec(name="batch", batch=["abcdefgh", "ab"]), PromptSpec(name="alone", text="ab")]
    run = explained(healthy, specs, dtypes=["bf16"])
    batch, alone = (each.logprob_error for each in run.passes if each.dtype == "bf16")
    inputs = AutoTokenizer.from_pretrained(healthy, padding_side="left")(
        specs[0].batch, return_tensors="pt", padding=True
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def chosen(dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            wide = load(healthy, dtype)(ids, attention_mask=mask, position_ids=positions).logits.float().log_softmax(-1)
        return wide[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double()

    difference = (chosen(torch.bfloat16) - chosen(torch.float32))[1][-1:]
    assert batch[1] == pytest.approx(float(difference.abs()), rel=0.02)
    assert len(alone) == 1 and batch[0] is not None


def test_local_error_is_that_of_each_layer_on_the_reference_s_input(healthy: Path) -> None:
    run = run_probe(healthy, TEXTS[:1], explain=True, dtypes=["bf16"])
    wide, narrow = load(healthy, torch.float32), load(healthy, torch.bfloat16)
    ids = torch.tensor([ids_of(TEXTS[0])])
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(wide.model.layers):
        layer.register_forward_pre_hook(lambda m, a, n=number: seen.__setitem__(n, a[0]))
    outs: dict[tuple[str, int], torch.Tensor] = {}
    for number, (one, other) in enumerate(zip(wide.model.layers, narrow.model.layers, strict=True)):
        one.register_forward_hook(lambda m, a, out, n=number: outs.__setitem__(("fp32", n), out))
        other.register_forward_pre_hook(lambda m, a, n=number: (seen[n].bfloat16(), *a[1:]))
        other.register_forward_hook(lambda m, a, out, n=number: outs.__setitem__(("bf16", n), out))
    with torch.inference_mode():
        wide(ids)
        narrow(ids)
    mine = next(each for each in run.passes if each.dtype == "bf16")
    for number, value in enumerate(mine.local_error):
        ours, wanted = outs["bf16", number].double(), outs["fp32", number].double()
        assert value == pytest.approx(float((ours - wanted).norm() / wanted.norm()), rel=1e-3)
    assert len(mine.local_error) == 3 and mine.local_error[-1] < mine.layer_error[-1]
    assert run_probe(healthy, TEXTS[:1]).passes[1].local_error == []


def test_a_healthy_run_asked_to_explain_compares_greedy_continuations(healthy: Path) -> None:
    run = explained(healthy, explain=True)
    assert run.explanation is not None and run.explanation.controls == []
    assert {(each.dtype, each.prompt) for each in run.explanation.continuations} == {
        (dtype, text[:9]) for dtype in ("fp16", "bf16") for text in TEXTS
    }
    one = next(each for each in run.explanation.continuations if each.dtype == "bf16" and each.prompt == TEXTS[0][:9])
    ids = torch.tensor([ids_of(TEXTS[0])])
    texts = [
        load(healthy, dtype).generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    differs = (texts[0] != texts[1]).nonzero()
    assert one.first_difference == (int(differs[0]) if len(differs) else None)
    assert precision(run)["fp16"].local and "need all weights in memory" in str(
        explained(healthy, explain=True, memory="streamed").explanation
    )


# -- sweeps ----------------------------------------------------------------------------------------------------


def swept(
    folder: Path | str, prompts: list[PromptSpec] | None = None, state: Path | None = None, **settings: Any
) -> Any:
    specs = prompts or [PromptSpec(name="plain", text="abc")]
    return diagnose(str(folder), load_settings(None, {"explain": False, **settings}), specs, sweep_file=state).run


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_sweep_over_first_tokens_finds_the_planted_one_and_confirms_it(memory: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=loud_token("Z", 40_000.0))
    found = swept(folder, sweep="first-token", memory=memory).sweep
    assert (found.tried, found.total, found.over, found.layers) == (512, 512, 1, 3)
    worst, second = found.worst[:2]
    assert (worst.text, worst.layer, worst.channel, worst.fails) == ("Z", 1, 9, True)
    assert worst.magnitude == pytest.approx(80_000, rel=0.02) and second.fails is False
    model = load(folder, torch.float32)
    with torch.inference_mode():
        states = model(torch.arange(512)[:, None], output_hidden_states=True).hidden_states[2]
    wanted = states.abs().flatten(1).max(dim=1).values
    assert worst.name == "residual add after mlp" and found.worst[0].ids == [int(wanted.argmax())]
    assert found.worst[0].magnitude == pytest.approx(float(wanted.max()), rel=1e-4)


def test_a_limited_sweep_is_spread_over_the_vocabulary_and_texts_may_be_given(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=loud_token("Z", 40_000.0))
    found = swept(folder, sweep="first-token", sweep_limit=64).sweep
    assert found.tried == 64 and all(each.ids[0] % 8 == 0 for each in found.worst)
    (tmp_path / "texts.txt").write_text("abcdef\nab Z c\n\nhello\n")
    found = swept(folder, sweep="first-token", sweep_texts=str(tmp_path / "texts.txt")).sweep
    assert (found.tried, found.over) == (3, 1)
    assert (found.worst[0].text, found.worst[0].fails) == ("ab Z c", True)


def test_a_sweep_that_is_interrupted_is_taken_up_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.diagnose import firsttokens as sweep

    folder, state = make_checkpoint(tmp_path / "model", edit=loud_token("Z", 40_000.0)), tmp_path / "run.json.sweep"
    whole = swept(folder, sweep="first-token").sweep
    monkeypatch.setattr(sweep, "AT_ONCE", 128)
    peaks, calls = sweep.Walker.peaks, []

    def second_time(self: Any, ids: torch.Tensor, dtype: str = "fp32") -> Any:
        if dtype == "fp32":
            calls.append(len(ids))
            if len(calls) == 2:
                raise KeyboardInterrupt
        return peaks(self, ids, dtype)

    monkeypatch.setattr(sweep.Walker, "peaks", second_time)
    run = swept(folder, state=state, sweep="first-token")
    assert run.sweep is None and run.stopped is None and "takes it up again" in run.unfinished
    assert json.loads(state.read_text())["done"] == 128
    again = swept(folder, state=state, sweep="first-token").sweep
    assert sum(calls) == 128 * 5 and not state.exists()  # the lot that was interrupted is run again
    assert (again.over, again.worst) == (whole.over, whole.worst)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"key": "other"}', '{"key": 1, "done": "x"}'])
def test_a_file_that_is_no_state_is_not_written_over(text: str, tmp_path: Path, healthy: Path) -> None:
    state = tmp_path / "run.json.sweep"
    state.write_text(text)
    with pytest.raises(QprecError, match="remove it"):
        swept(healthy, state=state, sweep="first-token")
    assert state.read_text() == text


def test_the_state_of_another_sweep_is_begun_anew(tmp_path: Path, healthy: Path) -> None:
    state = tmp_path / "run.json.sweep"
    state.write_text('{"key": "other", "done": 100, "layers": 1, "over": 5, "worst": [], "seconds": 1}')
    found = swept(healthy, state=state, sweep="first-token").sweep
    assert (found.tried, found.over) == (512, 0) and not state.exists()


def test_a_text_is_confirmed_by_its_own_tokens_however_long(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=loud_token("Z", 40_000.0), max_position_embeddings=512)
    (tmp_path / "texts.txt").write_text("a" * 300 + "Z\n" + "a" * 300 + "b\n")
    worst = swept(folder, sweep="first-token", sweep_texts=str(tmp_path / "texts.txt")).sweep.worst
    assert [each.fails for each in worst] == [True, False] and worst[0].ids[-1] == ids_of("Z")[0]


def test_a_sweep_sees_inside_the_layers(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        (token,) = ids_of("Z")
        model.model.embed_tokens.weight[:, 3] = 0.0
        model.model.embed_tokens.weight[token, 3] = 100.0
        one_unit(model, 1, 3, 400.0, 400.0)

    found = swept(make_checkpoint(tmp_path / "model", edit=plant), sweep="first-token").sweep
    worst = found.worst[0]
    assert (worst.text, worst.name, worst.layer, worst.channel) == ("Z", "SwiGLU product", 1, 0)
    assert found.over == 1 and worst.fails and worst.magnitude == pytest.approx(160_000, rel=0.05)


def test_a_sweep_over_lengths_finds_the_shortest_prefix_that_fails(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=enough_of_them(1500.0), dtype="float32")
    text = "aaaaaaaaaaaaZaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    found = swept(folder, [PromptSpec(name="long", text=text)], sweep="length").sweep
    assert (found.shortest_failing, found.longest_clean, found.prompt) == (13, 12, "long")
    assert found.tried < 20 < len(ids_of(text))


def test_a_length_sweep_of_what_does_not_fail_says_so(healthy: Path) -> None:
    run = swept(healthy, sweep="length")
    assert run.sweep is None and any("no prompt fails" in each.reason for each in run.choices)


def test_the_demo_is_swept_by_its_own_tokenizer() -> None:
    found = swept("demo", sweep="first-token").sweep
    assert (found.total, found.layers) == (512, 6) and found.over > 10
    assert all(each.channel == 42 and each.fails for each in found.worst)
