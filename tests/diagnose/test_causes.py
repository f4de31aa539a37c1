"""A catalogue of faults, one for each cause, planted by construction; beside each a healthy look-alike."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.qwen3 import modeling_qwen3

from qwen_precision.diagnose.run import diagnose
from qwen_precision.judge.checks import judge
from qwen_precision.judge.meanings import CAUSES
from qwen_precision.record.run import Pass, Run
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import PromptSpec
from support.builders import a_control, a_pass, a_run, an_event
from support.checkpoints import DEMO, ROOT, SHAPES, make_checkpoint
from support.plants import (
    averaging,
    down_proj_output,
    empty,
    enough_of_them,
    half_a_sum,
    ids_of,
    loud_scores,
    loud_token,
    mark,
    one_channel,
    one_unit,
)
from support.runs import TEXTS, explained, faults, first_of

# -- the faults ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fault, and what must be said of it."""

    plant: Callable[[Any], None]
    healthy: Callable[[Any], None]
    """The same, less of it: no finding."""
    layer: int | None
    name: str
    evidence: list[str]
    prompts: list[PromptSpec] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"


MANY = [PromptSpec(name="long", text="aaaaaaaaaaaaZ"), PromptSpec(name="short", text="aZ")]
BATCH = [PromptSpec(name="batch", batch=["aaaaaaaaa", "Z"]), PromptSpec(name="plain", text="aaa")]
TOKEN = [
    PromptSpec(name="with", text="abcZdef"),
    PromptSpec(name="first", text="Zabc"),
    PromptSpec(name="no", text="abcdef"),
]
CHAT = [PromptSpec(name="turn", chat="Hello"), PromptSpec(name="no", text="abc")]

CASES = {
    "out-of-range": Case(down_proj_output, lambda model: None, 1, "down_proj output", ["token 3 alone: fails"]),
    "attention-scores": Case(
        loud_scores(120.0),
        loud_scores(20.0),
        1,
        "attention scores",
        ["clean with sdpa"],
        settings={"attention": "eager"},
    ),
    "masked-rows": Case(
        loud_token("<|endoftext|>", 40_000.0),
        loud_token("<|endoftext|>", 10_000.0),
        1,
        "residual add after mlp",
        ["pad position"],
        BATCH,
    ),
    "trigger-token": Case(
        loud_token("Z", 40_000.0),
        loud_token("Z", 10_000.0),
        1,
        "residual add after mlp",
        ["overflows by itself", "clean: 'no'"],
        TOKEN,
    ),
    "trigger-prompt": Case(
        loud_token("<|im_start|>", 40_000.0),
        loud_token("<|im_start|>", 10_000.0),
        1,
        "residual add after mlp",
        ["without the chat template"],
        CHAT,
    ),
    "length": Case(
        enough_of_them(1500.0),
        enough_of_them(100.0),
        1,
        "SwiGLU product",
        ["after 12 times the first token"],
        MANY,
        dtype="float32",
    ),
}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("cause", CASES)
def test_the_cause_the_layer_and_the_operation_are_named_exactly(cause: str, memory: str, tmp_path: Path) -> None:
    case = CASES[cause]
    folder = make_checkpoint(tmp_path / "model", edit=case.plant, dtype=case.dtype)
    finding = first_of(explained(folder, case.prompts, memory=memory, **case.settings))
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == (cause, case.layer, case.name)
    said = " / ".join(finding.cause.evidence)
    assert all(line in said for line in case.evidence), said
    assert finding.cause.advice


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cause", CASES)
def test_the_healthy_look_alike_gives_no_finding_and_runs_no_control(
    cause: str, attention: str, tmp_path: Path
) -> None:
    case = CASES[cause]
    folder = make_checkpoint(tmp_path / "model", edit=case.healthy, dtype=case.dtype)
    told: list[str] = []
    specs = case.prompts or [PromptSpec(name=text[:9], text=text) for text in TEXTS]
    run = diagnose(str(folder), load_settings(None, {"attention": attention}), specs, announce=told.append).run
    assert faults(judge(run)) == [] and run.explanation is None and told == []


# -- what might be taken for something else --------------------------------------------------------------------


def mid_unit(token: str, layer: int, channel: int = 3) -> Callable[[Any], None]:
    """Only ``token`` drives a unit of one layer, whose down_proj output is then beyond fp16."""

    def plant(model: Any) -> None:
        (number,) = ids_of(token)
        model.model.embed_tokens.weight[:, channel] = 0.0
        model.model.embed_tokens.weight[number, channel] = 100.0
        one_unit(model, layer, channel, 8.0, 8.0)
        model.model.layers[layer].mlp.down_proj.weight[9, 0] = 2000.0

    return plant


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("text", ["Zabc", "abZc", "abcZ", "ZbZ", "abZcZ", "ZZ", "Z"])
def test_a_trigger_token_is_one_wherever_and_however_often_it_stands(layer: int, text: str, tmp_path: Path) -> None:
    """Also in the last layer, where the logits of the last token stay finite and right."""
    folder = make_checkpoint(tmp_path / "model", edit=mid_unit("Z", layer))
    run = explained(folder, [PromptSpec(name="bad", text=text), PromptSpec(name="good", text="abc")])
    finding = first_of(run)
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("trigger-token", layer, "down_proj output")
    said = " ".join(finding.cause.evidence)
    assert ("without it the row is clean" in said) == any(
        each.what == "without the token" and each.clean
        for each in (run.explanation.controls if run.explanation else [])
    )


def test_a_trigger_beside_bad_padding_at_the_same_operation_is_the_finding(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        mid_unit("Z", 1)(model)
        pad = AutoTokenizer.from_pretrained(DEMO).pad_token_id
        model.model.embed_tokens.weight[pad, 3] = 100.0

    specs = [PromptSpec(name="batch", batch=["aaaaaa", "a"]), PromptSpec(name="z", text="abZc"), TOKEN[2]]
    made = explained(make_checkpoint(tmp_path / "model", edit=plant), specs)
    finding = first_of(made, places=2)  # the token, and padding
    assert (finding.cause.kind, finding.place.prompt) == ("trigger-token", "z")


def test_two_triggers_in_two_layers_have_evidence_of_their_own(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        mid_unit("Z", 0)(model)
        mid_unit("Y", 1, channel=4)(model)

    specs = [PromptSpec(name="z", text="abZc"), PromptSpec(name="y", text="aYbcd"), TOKEN[2]]
    run = explained(make_checkpoint(tmp_path / "model", edit=plant), specs, budget=20)
    found = [each for each in judge(run).findings if each.kind == "overflow"]
    assert [(each.place.layer, each.cause.kind, each.place.prompt) for each in found] == [
        (0, "trigger-token", "z"),
        (1, "trigger-token", "y"),
    ]
    assert "token 2 alone" in " ".join(found[0].cause.evidence) and "token 1 alone" in " ".join(found[1].cause.evidence)


def only_together(gain: float) -> Callable[[Any], None]:
    """ "Z" is large where "b" stands before it, and there only."""

    def plant(model: Any) -> None:
        enough_of_them(gain)(model)
        embed = model.model.embed_tokens.weight
        embed[:, 2] = 0.0
        embed[ids_of("b")[0], 2], embed[ids_of("Z")[0], 2] = 100.0, 0.0

    return plant


PAIRS = pytest.mark.parametrize(
    ("pair", "other"), [("abZ", "aaaaaaaaaaZ"), ("bZc", "acde")], ids=["in the middle", "the first stands first"]
)
WAYS = pytest.mark.parametrize(("attention", "memory"), [("sdpa", "resident"), ("eager", "streamed")])


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
@PAIRS
def test_two_tokens_that_only_overflow_together_are_neither_a_length_nor_a_mere_range(
    pair: str, other: str, shape: str, attention: str, memory: str, tmp_path: Path
) -> None:
    specs = [PromptSpec(name="pair", text=pair), PromptSpec(name="other", text=other)]
    folder = make_checkpoint(tmp_path / "model", edit=only_together(1500.0), dtype="float32", **SHAPES[shape])
    finding = first_of(explained(folder, specs, attention=attention, memory=memory))
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("trigger-prompt", 1, "SwiGLU product")
    assert "it takes what stands before it" in " ".join(finding.cause.evidence)


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_that_is_less_together_gives_no_finding(shape: str, attention: str, memory: str, tmp_path: Path) -> None:
    specs = [PromptSpec(name=text, text=text) for text in ("abZ", "bZc", "aaaaaaaaaaZ", "acde")]
    folder = make_checkpoint(tmp_path / "model", edit=only_together(10.0), dtype="float32", **SHAPES[shape])
    run = explained(folder, specs, attention=attention, memory=memory)
    assert faults(judge(run)) == [] and run.explanation is None


def rounded_up(to: float) -> Callable[[Any], None]:
    """A gate of 8 - 1/64 times a weight that fp16 rounds up by 4, its spacing there being 8."""

    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        one_unit(model, 1, 3, 0.0, 0.0)
        block = model.model.layers[1]
        block.post_attention_layernorm.weight[3] = 1 - 2**-9
        block.mlp.gate_proj.weight[0, 3] = to - 3.5

    return plant


@WAYS
@pytest.mark.parametrize(
    ("plant", "arithmetic", "cause"),
    [
        (rounded_up(8208.0), "native", "rounding"),
        (rounded_up(8208.0), "fp16-accumulate", "rounding"),
        (half_a_sum, "fp16-accumulate", "accumulation"),
    ],
    ids=["rounded operands", "rounded operands, narrow sums", "a partial sum"],
)
def test_operands_that_are_rounded_out_of_range_are_told_from_sums_that_leave_it(
    plant: Callable[[Any], None], arithmetic: str, cause: str, attention: str, memory: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plant, dtype="float32")
    finding = first_of(explained(folder, arithmetic=arithmetic, attention=attention, memory=memory))
    assert (finding.cause.kind, finding.place.layer) == (cause, 1)


def test_operands_that_are_rounded_up_inside_the_range_fail_nowhere(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=rounded_up(8192.0), dtype="float32")
    assert judge(explained(folder)).verdict["fp16"] == "risk"


def test_what_nothing_shows_is_not_told(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=down_proj_output)
    finding = first_of(explained(folder, dtypes=["fp16"], reference=False, explain=False))
    assert finding.cause.kind == "not-told"


def test_a_sum_on_a_gpu_is_run_again_without_reduced_precision() -> None:
    from qwen_precision.diagnose import explain as module

    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction
    with module._full_reduction():
        assert flags.allow_fp16_reduced_precision_reduction is False
        assert not getattr(flags, "allow_fp16_accumulation", False)
    assert flags.allow_fp16_reduced_precision_reduction == before
    fp16 = a_pass("fp16", [1.5, 1.0, 1.0, float("inf"), 1.0, 1.0], [an_event(3)], top1=[None])
    fp32 = a_pass("fp32", [1.5, 1.0, 1.0, 900.0, 1.0, 1.0])
    assert asked_again(fp32, fp16, "cuda:0")
    assert not asked_again(fp32, fp16, "cpu")
    cancelled = a_pass("fp32", [1.5, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert asked_again(cancelled, fp16, "cuda:0")


@pytest.mark.parametrize(("flag", "named"), [("True", "accumulation"), ("False", "reduced_precision_reduction")])
def test_the_advice_names_the_flag_of_torch_under_which_a_card_kept_the_sums(flag: str, named: str) -> None:
    from qwen_precision.record.explanation import Explanation

    fp16 = a_pass("fp16", [1.5, 1.0, 1.0, float("inf"), 1.0, 1.0], [an_event(3)], top1=[None])
    fp32 = a_pass("fp32", [1.5, 1.0, 1.0, 900.0, 1.0, 1.0])
    controls = [a_control("full reduction", tokens=2, clean=True)]
    made = Explanation(budget=8, controls=controls, hashes={}, continuations=[], left_out=[])
    run = a_run([fp32, fp16], explanation=made, environment={"allow_fp16_accumulation": flag})
    assert judge(run).findings[0].cause.advice == f"Set torch.backends.cuda.matmul.allow_fp16_{named} = False."


def asked_again(fp32: Pass, fp16: Pass, device: str) -> bool:
    """Whether a control without reduced-precision reductions would run."""
    from qwen_precision.judge.controls import candidates
    from qwen_precision.record.run import Choice

    run = a_run([fp32, fp16], choices=[Choice(what="device", value=device, reason="asked for")])
    return any(each.what == "full reduction" for each in candidates(judge(run)))


def test_what_is_no_sum_is_not_run_again_for_its_reduction() -> None:
    fp16 = a_pass("fp16", [1.5, float("inf"), 1.0, 1.0, 1.0, 1.0], [an_event(1)], top1=[None])
    assert not asked_again(a_pass("fp32", [1.5, 900.0, 1.0, 1.0, 1.0, 1.0]), fp16, "cuda:0")


# -- causes that no edit of a weight makes ---------------------------------------------------------------------


def test_a_norm_that_squares_in_fp16_is_absorbed_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square overflows, its reciprocal root is 0, and the norm gives 0: finite everywhere, and wrong."""

    def narrow(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    def loud(size: float) -> Callable[[Any], None]:
        def plant(model: Any) -> None:
            model.model.layers[1].mlp.down_proj.weight[7] = 0.0
            model.model.embed_tokens.weight[:, 7] = size

        return plant

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", narrow)
    finding = first_of(explained(make_checkpoint(tmp_path / "bad", edit=loud(1000.0))), places=7)  # every norm on it
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == (
        "silent-absorption",
        0,
        "input_layernorm square",
    )
    assert "the logits are finite and wrong" in " ".join(finding.cause.evidence)
    assert not any(
        each.severity == "error"
        for each in judge(explained(make_checkpoint(tmp_path / "ok", edit=loud(50.0)))).findings
    )


def test_a_sum_that_is_kept_in_fp16_is_an_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are added in fp16, as a split reduction on a GPU does it: the parts are too large, the sum is not."""

    @torch.library.custom_op("qpreccause::split_linear", mutates_args=())
    def split_linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        half = states.shape[-1] // 2
        return states[..., :half] @ weight[:, :half].mT + states[..., half:] @ weight[:, half:].mT

    def through(self: Any, states: torch.Tensor) -> torch.Tensor:
        product = self.act_fn(self.gate_proj(states)) * self.up_proj(states)
        return split_linear(product, self.down_proj.weight)

    def plant(model: Any) -> None:
        down_proj_output(model)
        mlp = model.model.layers[1].mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[64] = part.weight[0]
        mlp.down_proj.weight[9, 64] = -mlp.down_proj.weight[9, 0] * 0.99

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", through)
    finding = first_of(explained(make_checkpoint(tmp_path / "model", edit=plant)))
    assert (finding.cause.kind, finding.place.layer) == ("accumulation", 1) and "split_linear" in finding.place.name
    assert "all operands are finite and the reference reaches only" in " ".join(finding.cause.evidence)
    assert "add up in fp32" in finding.cause.advice


def broken(folder: Path, name: str, value: float) -> Path:
    """A checkpoint with one element replaced in its file."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_damage_is_told_with_tensor_count_file_and_hash(tmp_path: Path) -> None:
    folder = broken(make_checkpoint(tmp_path / "model"), "model.layers.2.mlp.up_proj.weight", float("nan"))
    finding = first_of(explained(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (finding.cause.kind, finding.kind, finding.place.layer) == ("damaged-weight", "weight-nonfinite", 2)
    said = " ".join(finding.cause.evidence)
    assert "up_proj.weight in model.safetensors" in said and "1 NaN" in said and digest in said
    assert "download" in finding.cause.advice


def test_a_weight_that_fp16_cannot_hold_is_told_with_tensor_and_size(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "model", edit=lambda m: m.model.layers[2].self_attn.q_norm.weight.fill_(70_000.0)
    )
    finding = first_of(explained(folder))
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("weight-range", 2, "q_norm weight")
    assert "largest 70144" in " ".join(finding.cause.evidence)


def test_what_is_not_finite_in_fp32_is_dead_there_too(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        one_unit(model, 1, 3, 1e30, 1e30)
        model.model.embed_tokens.weight[:, 3] = 100.0

    run = explained(make_checkpoint(tmp_path / "model", edit=plant, dtype="float32"))
    finding = first_of(run, "fp32")
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("dead-in-fp32", 1, "SwiGLU product")
    assert judge(run).verdict == {"fp16": "fail", "bf16": "fail", "fp32": "fail"}


def test_precision_is_told_from_range(tmp_path: Path) -> None:
    """Two large channels carry the answer in their difference: bf16 rounds it away, fp32 does not."""

    def plant(common: float) -> Callable[[Any], None]:
        def edit(model: Any) -> None:
            generator = torch.Generator().manual_seed(1)
            signal = torch.randn(len(model.model.embed_tokens.weight), generator=generator)
            embed = model.model.embed_tokens.weight
            embed *= 0.01
            embed[:, 0], embed[:, 1] = common + signal, common
            model.lm_head.weight[:, 0] = torch.randn(len(embed), generator=generator) * common
            model.lm_head.weight[:, 1] = -model.lm_head.weight[:, 0]
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()

        return edit

    run = explained(make_checkpoint(tmp_path / "bad", edit=plant(1000.0), dtype="float32"), dtypes=["bf16"])
    finding = first_of(run, "bf16", places=0)
    assert (finding.kind, finding.cause.kind, finding.severity) == ("divergence", "precision", "warning")
    assert judge(run).verdict == {"bf16": "risk"} and "KL divergence" in finding.cause.evidence[0]
    assert faults(judge(explained(make_checkpoint(tmp_path / "ok", edit=plant(1.0), dtype="float32")))) == []


def test_every_cause_of_the_table_has_a_fault_here() -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f'"{cause}"' in text for cause in CAUSES)


# -- controls --------------------------------------------------------------------------------------------------


def test_controls_keep_to_their_budget_and_are_announced_before_they_run(tmp_path: Path) -> None:
    case = CASES["trigger-token"]
    folder = make_checkpoint(tmp_path / "model", edit=case.plant)
    for budget in (0, 1, 3):
        told: list[str] = []
        run = diagnose(str(folder), load_settings(None, {"budget": budget}), TOKEN, announce=told.append).run
        assert run.explanation is not None
        assert len(run.explanation.controls) == budget and len(told) == (budget > 0)
        assert all(f"beyond --budget {budget}" in line for line in run.explanation.left_out)
    assert diagnose(str(folder), load_settings(None, {"explain": False}), TOKEN).run.explanation is None


def test_a_streamed_checkpoint_is_read_once_for_all_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_precision.probe.shadow import Shadow

    case = CASES["trigger-token"]
    folder = make_checkpoint(tmp_path / "model", edit=case.plant)
    runs: list[int] = []
    run_shadow = Shadow.run
    monkeypatch.setattr(Shadow, "run", lambda self: (runs.append(len(self.prompts)), run_shadow(self))[1])
    explained(folder, TOKEN, memory="streamed")
    assert runs == [3, 1, runs[-1]]  # what was asked, its first failing prompt again, all controls


def test_a_batch_that_fails_only_as_a_batch_is_told_by_its_row_alone() -> None:
    from qwen_precision.record.explanation import Explanation

    control = a_control("row alone", tokens=2, clean=True)
    made = Explanation(budget=8, controls=[control], left_out=[], hashes={}, continuations=[])
    fp16 = a_pass("fp16", [1.5, float("inf"), 1.0, 1.0, 1.0, 1.0], [an_event(1)], top1=[None])
    run = a_run([a_pass("fp32", [1.5, 90000.0, 1.0, 1.0, 1.0, 1.0]), fp16], explanation=made)
    finding = first_of(run)
    assert finding.cause.kind == "masked-rows" and "the row is clean" in " ".join(finding.cause.evidence)


def only_after_many(text: str) -> Callable[[Any], None]:
    """ "Z" fails where most of the tokens before it are this one."""

    def plant(model: Any) -> None:
        empty(model)
        model.model.embed_tokens.weight[:, 2] = -12.5
        mark(model, text, 2, 12.5)
        mark(model, "Z", 2, -12.5)
        mark(model, "Z", 3, 12.5)
        averaging(model, 1, 2, 4, 12.5)
        block = model.model.layers[1].mlp
        block.gate_proj.weight[0, 4], block.up_proj.weight[0, 3] = 400.0, 1000.0

    return plant


def test_a_length_is_one_only_whatever_the_tokens_are(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=only_after_many("a"), dtype="float32")
    specs = [PromptSpec(name=text, text=text) for text in ("aaaaabZ", "bbbbbbZ", "ccccccccccccZ")]
    assert first_of(explained(folder, specs, budget=30)).cause.kind == "trigger-prompt"


def test_a_token_is_no_trigger_where_a_clean_prompt_holds_it(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        empty(model)
        model.model.embed_tokens.weight[:, 2] = -12.5
        mark(model, "Z", 2, 12.5)
        averaging(model, 1, 2, 4, 12.5)
        block = model.model.layers[1].mlp
        block.gate_proj.weight[0, 4] = block.up_proj.weight[0, 4] = 900.0

    folder = make_checkpoint(tmp_path / "model", edit=plant, dtype="float32")
    finding = first_of(explained(folder, [PromptSpec(name="one", text="Z"), PromptSpec(name="in", text="abcdZef")]))
    assert finding.cause.kind != "trigger-token" and "without it" not in " ".join(finding.cause.evidence)


def test_bad_padding_is_not_blamed_without_a_control_that_shows_it(tmp_path: Path) -> None:
    """Told apart from a row that fails by itself, too: alone, it fails as well."""
    folder = make_checkpoint(tmp_path / "model", edit=CASES["masked-rows"].plant)
    unasked = first_of(explained(folder, BATCH, explain=False))
    assert unasked.cause.kind == "out-of-range" and "at pad positions" in unasked.cause.sentence
    finding = first_of(explained(folder, BATCH))
    assert finding.cause.kind == "masked-rows" and "the row is clean" in " ".join(finding.cause.evidence)


@pytest.mark.parametrize(
    ("shape", "attention", "memory"),
    [("dense", "sdpa", "resident"), ("another head ratio", "eager", "streamed"), ("moe", "sdpa", "streamed")],
)
@pytest.mark.parametrize("specs", [TOKEN, [PromptSpec(name="batch", batch=["abcZdef", "aZ"])]], ids=["row", "batch"])
def test_what_fails_in_one_run_of_two_has_no_cause(
    specs: list[PromptSpec], shape: str, attention: str, memory: str, tmp_path: Path
) -> None:
    """The fault is there the first time only: with the checkpoint's values mended for whatever runs later."""
    from qwen_precision.diagnose import explain as module
    from qwen_precision.probe.run import measure, prepare

    case = CASES["trigger-token"]
    bad = make_checkpoint(tmp_path / "bad", edit=case.plant, **SHAPES[shape])
    good = make_checkpoint(tmp_path / "good", edit=case.healthy, **SHAPES[shape])
    how = load_settings(None, {"attention": attention, "memory": memory})
    steady = first_of(diagnose(str(bad), how, specs).run)
    assert steady.cause.kind != "not-told" and "run again: fails" in " ".join(steady.cause.evidence)
    job = prepare(str(bad), how, specs)
    report = judge(measure(job))
    later = prepare(str(good), how, specs)
    job.checkpoint, job.store = later.checkpoint, later.store
    run = module.explained(job, report, report.run, lambda *_: None, lambda _: None)
    finding = first_of(run)
    assert finding.cause.kind == "not-told" and "a matter of chance" in " ".join(finding.cause.evidence)


def test_an_overflow_that_changes_nothing_is_no_silent_absorption() -> None:
    fp32 = a_pass("fp32", [1.5, 90000.0, 1.0, 1.0, 1.0, 1.0], top1=[5])
    for kl, top1, cause in ((1e-5, 5, "out-of-range"), (0.5, 5, "silent-absorption"), (1e-5, 6, "silent-absorption")):
        fp16 = a_pass("fp16", [1.5, float("inf"), 1.0, 1.0, 1.0, 1.0], [an_event(1)], top1=[top1], kl=[kl])
        assert first_of(a_run([fp32, fp16])).cause.kind == cause


def test_a_row_that_was_replaced_before_is_not_asked_about_again(demo_run: Run) -> None:
    from qwen_precision.judge.controls import asked

    report = judge(demo_run)
    assert {each.place.layer for each in report.findings if each.kind == "overflow"} == {3, 4, 5}
    for each in asked(report):
        place = each.finding.place
        passes = [p for p in demo_run.passes if p.dtype == "fp16" and demo_run.prompts[p.prompt].name == place.prompt]
        assert not [
            seed for p in passes for seed in p.reseeded if each.number in seed.rows and seed.layer <= place.layer
        ]
    assert asked(report)[0].finding.place.layer == 3


def test_the_harmless_twins_of_damage_size_and_death_give_no_finding(tmp_path: Path) -> None:
    def large_norm(model: Any) -> None:
        model.model.layers[2].self_attn.q_norm.weight.fill_(50.0)

    def large_unit(model: Any) -> None:
        one_unit(model, 1, 3, 100.0, 100.0)
        model.model.embed_tokens.weight[:, 3] = 100.0

    twins = {
        "weight": make_checkpoint(tmp_path / "weight", edit=large_norm),
        "unit": make_checkpoint(tmp_path / "unit", edit=large_unit),
        "element": broken(make_checkpoint(tmp_path / "element"), "model.layers.2.mlp.up_proj.weight", 0.5),
    }
    for name, folder in twins.items():
        assert faults(judge(explained(folder))) == [], name


def test_a_sum_in_halves_that_stays_in_range_gives_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_halves(self: Any, states: torch.Tensor) -> torch.Tensor:
        product = self.act_fn(self.gate_proj(states)) * self.up_proj(states)
        half, weight = product.shape[-1] // 2, self.down_proj.weight
        return product[..., :half] @ weight[:, :half].mT + product[..., half:] @ weight[:, half:].mT

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", in_halves)
    assert faults(judge(explained(make_checkpoint(tmp_path / "model")))) == []


@pytest.mark.parametrize("size", [20.0, 1.0])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_whose_every_score_falls_below_the_masks_minimum_is_where_nan_begins(
    size: float, attention: str, tmp_path: Path
) -> None:
    """The least number of fp16 plus a score of -17 is -inf; a row of nothing else comes out of softmax as NaN."""

    def plant(model: Any) -> None:
        model.model.layers[0].self_attn.q_norm.weight.fill_(size)
        model.model.layers[0].self_attn.k_norm.weight.fill_(size)

    folder = make_checkpoint(tmp_path / "model", edit=plant)
    batch = [PromptSpec(name="batch", batch=["The quick brown fox", "Hello"])]
    run = explained(folder, batch, attention=attention)
    if size == 1.0 or attention == "sdpa":
        assert set(judge(run).verdict.values()) == {"ok"} and all(None not in each.top1 for each in run.passes)
        return
    first = first_of(run)
    assert (first.place.module, first.place.op) == ("model.layers.0.self_attn", "softmax")
    assert first.cause.kind == "masked-rows" and first.place.token is not None and first.place.token.padding
