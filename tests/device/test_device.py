"""On a graphics card everything is as on the CPU; `make device` pretends one (support/pretend.py) with the CPU's bits.

On a real card (`pytest -m device` there) sums come out otherwise: then the same places and causes are asked for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_precision.judge.checks import judge
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.record.run import Run
from qwen_precision.settings.prompts import PromptSpec
from qwen_precision.watcher import watch
from support import generations, plants
from support.checkpoints import make_checkpoint
from support.pretend import devices
from support.rescues import rescue
from support.runs import TEXTS, explained, first_of, memory_of, plain_logits, run_probe, timeless

pytestmark = pytest.mark.device

DEVICES = devices()
DEVICE = DEVICES[:1]
REAL_WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
"""Of Qwen3-0.6B: a card takes other kernels for a wide product than for a tiny one."""


@pytest.fixture
def exact(request: pytest.FixtureRequest) -> bool:
    """Whether the card computes as the CPU does: a pretend one, but Apple's measures errors in float32."""
    return request.config.getoption("--pretend") == "cuda"


_TOLD_APART = {"environment", "choices", "settings"}


def same(ours: Run, wanted: Run, exact: bool) -> None:
    if exact:
        one, other = (timeless(run).model_dump(exclude=_TOLD_APART) for run in (ours, wanted))
        for each in (one, other):
            if each["explanation"]:  # one control is asked on a card alone
                made = each["explanation"]["controls"]
                each["explanation"]["controls"] = [one for one in made if one["what"] != "full reduction"]
            if each["generation"]:
                each["generation"]["probe"] = None  # the command names the device
        assert repr(one) == repr(other)  # NaN is what it is
    assert places(ours, exact) == places(wanted, exact)


def places(run: Run, exact: bool) -> list[tuple[Any, ...]]:
    """What a user decides by; the worst of several prompts may be another where sums come out otherwise."""
    return [
        (each.kind, each.severity, each.dtype, each.cause.kind, each.place.module, each.place.op)
        + ((each.place.prompt,) if exact else ())
        for each in judge(run).findings
        if each.kind != "advice"  # a card's sums may take a loss to the other side of a limit
    ]


BATCH = PromptSpec(name="batch", batch=["aaaaaaaaa", "Zb", "abc"])
PLAIN = [PromptSpec(name="plain", text=TEXTS[0]), BATCH]

Case = tuple[Callable[[Any], None] | None, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    # what is planted, the checkpoint's shape, settings
    "healthy": (None, {}, {}),
    "down_proj, explained": (plants.down_proj_output, {}, {"explain": True}),
    "residual add, eager, streamed": (plants.residual_add, {}, {"attention": "eager", "memory": "streamed"}),
    "experts": (plants.expert_product, {"moe": True}, {"memory": "streamed"}),
    "a token's embedding": (plants.loud_token("Z", 40_000.0), {"tied": True}, {}),
    "scores, eager": (plants.low_score(70_000.0), {}, {"attention": "eager"}),
    "lm_head": (plants.lm_head_output, {}, {}),
}


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.parametrize("name", CASES)
def test_a_probe_finds_on_the_card_what_it_finds_on_the_cpu(
    name: str, device: str, exact: bool, tmp_path: Path
) -> None:
    plant, shape, settings = CASES[name]
    folder = make_checkpoint(tmp_path / "model", edit=plant, **shape)
    ours, wanted = (explained(folder, PLAIN, device=where, **settings) for where in (device, "cpu"))
    # What experts get is counted in integers on a card, in floats on the CPU: other operations, the same faults.
    same(ours, wanted, exact and name != "experts")
    assert (name == "healthy") == all(each.severity == "info" for each in judge(ours).findings)
    assert all(each.what != "second look" for each in ours.choices)  # run again, a layer does the same


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_card_gives_the_logits_of_plain_transformers_on_it(
    attention: str, memory: str, device: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", tied=True, **REAL_WIDTHS)
    answers: dict[tuple[str, int], torch.Tensor] = {}
    keep = lambda dtype, prompt, states, logits: answers.__setitem__((dtype, prompt), logits.clone())  # noqa: E731
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(f"- {{name: one, text: {TEXTS[0]}}}\n- {{name: padded, batch: [aaaaaaaaa, Zb]}}\n")
    run = run_probe(folder, file=str(prompts), device=device, memory=memory, attention=attention, on_final=keep)
    assert all(each.what != "second look" for each in run.choices)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        model.to(device).eval()
        for number, prompt in enumerate(run.prompts):
            wanted, ours = plain_logits(model, folder, [row.text for row in prompt.rows]), answers[name, number]
            assert torch.equal(ours[:, -1], wanted[:, -1]), (name, number, (ours[:, -1] - wanted[:, -1]).abs().max())


@pytest.mark.parametrize("device", DEVICE)
def test_damaged_weights_are_counted_on_the_card_as_on_the_cpu(device: str) -> None:
    tensor = torch.linspace(-1e5, 1e5, 40_000).to(torch.bfloat16).view(100, 400)
    tensor[7, 3], tensor[99, 399], tensor[50] = float("nan"), float("inf"), 1e-8
    checks = []
    for where in (device, "cpu"):
        checks.append(WeightCheck(["fp32", "fp16", "bf16"]))
        for start in (0, 60, 60):
            checks[-1].feed("w", "f", tensor[start : start + 60].to(where), start)
    one, other = checks
    assert one.weights() == other.weights() and one.totals() == other.totals()


@pytest.mark.parametrize("device", DEVICE)
def test_a_family_that_runs_whole_does_so_on_the_card(device: str, exact: bool, tmp_path: Path) -> None:
    from support.families import make_family

    folder = make_family(tmp_path / "model", "gemma3_text").folder
    ours, wanted = (run_probe(folder, TEXTS, device=where) for where in (device, "cpu"))
    assert {each.value for each in ours.choices if each.what == "memory"} == {"whole"}
    same(ours, wanted, exact)


@pytest.mark.parametrize("device", DEVICE)
def test_a_rescue_made_on_the_card_is_that_of_the_cpu(device: str, exact: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.residual_add)
    written = {}
    for where in (device, "cpu"):
        target = tmp_path / where.replace(":", "-")
        run = rescue(folder, target, TEXTS[:1], device=where)
        assert run.rescue is not None and run.rescue.exported is not None and run.rescue.exported.verified
        written[where] = (target / "model.safetensors").read_bytes()
    assert not exact or written[device] == written["cpu"]


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.parametrize("kind", ["first-token", "length"])
def test_a_sweep_finds_on_the_card_what_it_finds_on_the_cpu(
    kind: str, device: str, exact: bool, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.loud_token("Z", 40_000.0))
    prompts, chosen = [PromptSpec(name="loud", text="abcZ")], {"sweep": kind, "explain": False}
    ours, wanted = (explained(folder, prompts, device=where, **chosen) for where in (device, "cpu"))
    assert ours.sweep is not None and wanted.sweep is not None
    one, other = (each.sweep.model_dump(exclude={"seconds"}) for each in (ours, wanted))
    assert one == other or not exact
    assert ours.sweep.over == wanted.sweep.over


# -- text -----------------------------------------------------------------------------------------------------------

TEXT: dict[str, dict[str, Any]] = {
    "recovered in a batch": {"prompts": ["aaa", "abZ"], "dtype": "fp16"},
    "rescaled": {"prompts": ["abZ"], "dtype": "fp16", "on_failure": "rescale"},
    "watched": {"prompts": ["aaa", "abZ"], "dtype": "fp16", "guards": "observe"},
    "unwatched": {"prompts": ["aaa", "abZ"], "dtype": "fp16", "guards": "off"},
    "sampled and recovered": {"prompts": ["aaa", "abZ"], "dtype": "fp16", "do_sample": True, "seed": 3},
    "sampled": {"prompts": ["aaa", "bbb"], "dtype": "bf16", "do_sample": True, "temperature": 0.8, "seed": 3},
}


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.parametrize("name", TEXT)
def test_a_text_made_on_the_card_is_that_of_the_cpu(name: str, device: str, exact: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.loud_token("Z", 40_000.0))
    how = {**TEXT[name], "max_new_tokens": 6}
    ours, wanted = (generations.run(folder, device=where, **how) for where in (device, "cpu"))
    if exact or "sampled" not in name:  # a real card has other dice
        same(ours, wanted, exact)
    assert len(generations.ids_of(ours)) == len(how["prompts"])


# -- watch, memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICE)
def test_watch_names_the_first_operation_on_the_card(device: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.down_proj_output)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to(device)
    with watch(model) as readings, torch.inference_mode():
        model(torch.tensor([[5, 6, 7]], device=device))
    first = readings.first_nonfinite()
    assert first is not None and first.module == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("device", DEVICE)
def test_memory_is_asked_of_the_card_that_is_used_and_only_that_is_filled(device: str, tmp_path: Path) -> None:
    from qwen_precision.model.machine import free_bytes

    if not device.startswith("cuda") or len(DEVICES) < 2:
        pytest.skip("needs two cards")
    (other,) = set(DEVICES) - {device}
    before = {each: torch.cuda.max_memory_allocated(each) for each in DEVICES}
    held = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    assert free_bytes(torch.device(other)) - free_bytes(torch.device(device)) >= held.nbytes
    del held
    assert free_bytes(torch.device(other)) - free_bytes(torch.device(device)) < 1 << 29  # torch's own, and free again
    run_probe(make_checkpoint(tmp_path / "model"), TEXTS, device=device)
    assert torch.cuda.max_memory_allocated(other) == before[other]


@pytest.fixture
def full(device: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card with no room for a model."""
    if exact:
        from support.pretend import memory

        monkeypatch.setattr(memory, "total", 200_000)
        yield
        return
    if not device.startswith("cuda"):
        pytest.skip("Apple's memory is the machine's")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6, device)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.usefixtures("full")
def test_out_of_memory_is_a_sentence_that_says_what_to_try(
    memory: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.cli.app import main

    folder = make_checkpoint(tmp_path / "model", **REAL_WIDTHS)
    monkeypatch.chdir(tmp_path)
    assert main(["probe", str(folder), "--device", device, "--memory", memory, "--prompt", "abc"]) in (2, 3)
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "out of memory" in said.out + said.err


@pytest.mark.parametrize("device", DEVICE)
def test_the_reference_is_fp32_also_where_tf32_was_switched_on(
    device: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not device.startswith("cuda"):
        pytest.skip("only CUDA has TF32")
    flags = torch.backends.cuda.matmul
    request.addfinalizer(lambda before=flags.allow_tf32: setattr(flags, "allow_tf32", before))
    flags.allow_tf32 = True
    run = run_probe(make_checkpoint(tmp_path / "model"), TEXTS[:1], device=device)
    assert ("TF32", "off") in [(each.what, each.value) for each in run.choices]
    assert flags.allow_tf32


# -- what only a real card shows ---------------------------------------------------------------------------------------


@pytest.fixture
def real(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--pretend") or not DEVICES or not DEVICES[0].startswith("cuda"):
        pytest.skip("only a real CUDA card shows this")


@pytest.fixture
def fp16_sums() -> Iterator[None]:
    """torch's own flag, which has a card keep the sums of fp16 products in fp16."""
    flags = torch.backends.cuda.matmul
    if not hasattr(flags, "allow_fp16_accumulation"):
        pytest.skip("torch has had the flag since 2.7")
    flags.allow_fp16_accumulation = True
    yield
    flags.allow_fp16_accumulation = False


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.usefixtures("real", "fp16_sums")
def test_a_partial_sum_that_leaves_fp16_on_the_card_is_told_with_the_flag_that_keeps_it(
    device: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.half_a_sum)
    run = explained(folder, device=device)
    finding = first_of(run)
    assert (finding.cause.kind, finding.place.layer, finding.place.name) == ("accumulation", 1, "down_proj output")
    assert finding.place.channel == 9 and "allow_fp16_accumulation = False" in finding.cause.advice
    assert run.explanation is not None
    assert {each.what: each.clean for each in run.explanation.controls}["full reduction"]
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert judge(explained(folder, device=device)).verdict["fp16"] == "ok"


@pytest.mark.parametrize("device", DEVICE)
@pytest.mark.usefixtures("real")
def test_a_probe_takes_no_more_of_the_card_than_auto_promised(device: str, tmp_path: Path) -> None:
    from qwen_precision.model.machine import _SHARE

    folder = make_checkpoint(tmp_path / "model", **{**REAL_WIDTHS, "num_hidden_layers": 12})
    taken = {}
    for memory in ("auto", "streamed"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run = run_probe(folder, TEXTS, device=device, memory=memory)
        taken[memory] = torch.cuda.max_memory_allocated(device) - before
        if memory == "auto":
            value, reason = memory_of(run)
            promised = int(reason.split("needs ")[1].split(" MiB")[0]) << 20
    assert value == "resident" and taken["auto"] <= promised / _SHARE, (reason, taken)
    assert taken["streamed"] < taken["auto"]
