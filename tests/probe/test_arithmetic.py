"""``--arithmetic``: verdicts and places as in native, a fault that only sums kept in fp16 have, and who is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_precision.judge import judge
from qwen_precision.judge.nextcommand import next_sweep, same_again
from qwen_precision.render import FORMATS, View
from qwen_precision.settings.prompts import PromptSpec
from qwen_precision.watcher import computing
from support.checkpoints import make_checkpoint
from support.families import make_family
from support.plants import down_proj_output, expert_product, half_a_sum, lm_head_output
from support.runs import TEXTS, explained, faults, first_of, run_probe

pytestmark = pytest.mark.arithmetic

OTHERS = ["tensor-core", "fp16-accumulate"]
PLANTS = {
    "dense": (down_proj_output, {}, "down_proj output"),
    "lm_head": (lm_head_output, {}, "logits"),
    "moe": (expert_product, {"moe": True}, "SwiGLU product of the experts"),
}


@pytest.mark.parametrize("arithmetic", OTHERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["healthy", "healthy_moe"])
def test_a_healthy_model_gives_no_finding(
    kind: str, attention: str, arithmetic: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    report = judge(run_probe(folder, attention=attention, arithmetic=arithmetic))  # batch and chat among the prompts
    assert faults(report) == [] and set(report.verdict.values()) == {"ok"}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_overflow_is_named_where_native_names_it(
    name: str, attention: str, memory: str, tmp_path: Path
) -> None:
    plant, shape, what = PLANTS[name]
    folder = make_checkpoint(tmp_path, edit=plant, **shape)
    ways = {
        each: run_probe(folder, TEXTS, attention=attention, memory=memory, arithmetic=each)
        for each in ("native", *OTHERS)
    }
    found = {each: first_of(run) for each, run in ways.items()}
    places = {each: finding.place for each, finding in found.items()}
    assert places["native"] == places["tensor-core"] == places["fp16-accumulate"]
    assert places["native"].name.replace("of an expert", "of the experts") == what
    for run in ways.values():
        assert judge(run).verdict == {"fp16": "fail", "bf16": "ok", "fp32": "ok"}


@pytest.mark.parametrize("kind", ["healthy", "healthy_moe"])
def test_the_answer_is_that_of_the_whole_model_computed_so(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]])
    for arithmetic in ("native", *OTHERS):
        seen: dict[str, Any] = {}
        run_probe(
            folder,
            TEXTS[:1],
            memory="resident",
            arithmetic=arithmetic,
            on_final=lambda dtype, prompt, hidden, logits, seen=seen: seen.update({dtype: logits.clone()}),
        )
        for dtype, name in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=name).eval()
            with torch.inference_mode(), computing(arithmetic):
                plain = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            assert torch.equal(seen[dtype], plain), (arithmetic, dtype)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_half_a_sum_beyond_the_range_fails_only_where_sums_are_kept_in_fp16(memory: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=half_a_sum)
    for arithmetic in ("native", "tensor-core"):
        assert judge(run_probe(folder, TEXTS, memory=memory, arithmetic=arithmetic)).verdict["fp16"] == "ok"
    run = explained(folder, memory=memory, arithmetic="fp16-accumulate")
    finding = first_of(run)
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("accumulation", 1, "down_proj output")
    assert finding.place.channel == 9
    assert judge(run).verdict == {"fp16": "fail", "bf16": "ok", "fp32": "ok"}
    assert "so a partial sum left the range; without reduced-precision reductions" in " ".join(finding.cause.evidence)
    assert "allow_fp16_accumulation = False" in finding.cause.advice


def test_a_model_that_runs_whole_computes_so_too(tmp_path: Path) -> None:
    family = make_family(tmp_path / "model", "gpt2", plant=True)
    runs = {
        each: run_probe(family.folder, TEXTS, dtypes=["fp32", "fp16"], arithmetic=each) for each in ("native", *OTHERS)
    }
    assert {each.value for each in runs["tensor-core"].choices if each.what == "memory"} == {"whole"}
    assert len({first_of(run).place for run in runs.values()}) == 1
    columns = [run.passes[-1].abs_max for run in runs.values()]
    assert columns[0] != columns[2] != columns[1]  # the sums were made in another way


def test_controls_run_in_the_arithmetic_of_the_run(tmp_path: Path) -> None:
    run = explained(make_checkpoint(tmp_path, edit=half_a_sum), arithmetic="fp16-accumulate")
    assert run.explanation is not None
    tried = {each.what: each.clean for each in run.explanation.controls}
    assert not tried["same again"] and not tried["token alone"] and tried["full reduction"]


def test_the_local_error_and_continuations_are_computed_so_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=half_a_sum)
    runs = [
        explained(folder, explain=True, arithmetic=each, memory="resident") for each in ("native", "fp16-accumulate")
    ]
    local = [[each.local_error for each in run.passes if each.dtype == "fp16"] for run in runs]
    assert None not in local[0][0] and local[1][0][1] is None  # the failing layer, on the reference's hidden states
    texts = [run.explanation.continuations for run in runs if run.explanation is not None]
    assert len(texts) == 2 and texts[0] != texts[1]


def test_a_sweep_is_made_in_the_arithmetic_of_the_run(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, edit=half_a_sum)
    told = {"dtypes": ["fp16"], "sweep": "length", "explain": False}
    run = explained(folder, [PromptSpec(name="p", text="abc")], arithmetic="fp16-accumulate", **told)
    assert run.sweep is not None and run.sweep.shortest_failing == 1


def test_which_it_was_is_in_the_record_and_shown_only_where_it_is_not_native(healthy: Path) -> None:
    native, other = (run_probe(healthy, TEXTS[:1], arithmetic=each) for each in ("native", "tensor-core"))
    assert native.settings["arithmetic"] == "native" and other.settings["arithmetic"] == "tensor-core"
    assert not [each for each in native.choices if each.what == "arithmetic"]
    (choice,) = [each for each in other.choices if each.what == "arithmetic"]
    assert choice.value == "tensor-core" and "rounded once" in choice.reason
    for name in ("screen", "table", "markdown", "html", "json"):
        shown = [str(FORMATS[name].render(View((judge(run),)))) for run in (native, other)]
        assert "tensor-core" not in shown[0] and "tensor-core" in shown[1], name


def test_the_commands_to_run_next_ask_for_it_again(healthy: Path) -> None:
    native, other = (run_probe(healthy, TEXTS[:1], arithmetic=each) for each in ("native", "fp16-accumulate"))
    assert "--arithmetic" not in same_again(native) and "--arithmetic fp16-accumulate" in same_again(other)
    assert "--arithmetic" not in str(next_sweep(judge(native)))
    assert "--arithmetic fp16-accumulate" in str(next_sweep(judge(other)))


def test_a_script_says_that_it_computes_natively(healthy: Path) -> None:
    native, other = (run_probe(healthy, TEXTS[:1], arithmetic=each) for each in ("native", "fp16-accumulate"))
    said = [str(FORMATS["repro"].render(View((judge(run),)))) for run in (native, other)]
    assert "--arithmetic" not in said[0] and len(said[1].splitlines()) <= 40
    assert "# Measured with --arithmetic fp16-accumulate; this computes as torch does on its device" in said[1]
