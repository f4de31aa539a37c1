"""On a graphics card everything is as on the CPU; `make device` pretends one (support/pretend.py) with the CPU's bits.

On a real card (`pytest -m device` there) sums come out otherwise: then the same places and causes are asked for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.judge.checks import judge
from qwen_precision.record.run import Run
from qwen_precision.settings.prompts import PromptSpec
from qwen_precision.watcher import watch
from support import generations, plants
from support.checkpoints import make_checkpoint
from support.pretend import devices
from support.rescues import rescue
from support.runs import TEXTS, explained, run_probe, timeless

pytestmark = pytest.mark.device

DEVICES = devices()
DEVICE = DEVICES[:1]


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
    assert places(ours) == places(wanted)


def places(run: Run) -> list[tuple[Any, ...]]:
    """What a user decides by."""
    return [
        (each.kind, each.severity, each.dtype, each.cause.kind, each.place.module, each.place.op, each.place.prompt)
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


@pytest.mark.parametrize("device", DEVICES)
def test_every_card_gives_the_logits_of_plain_transformers_on_it(
    device: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path / "model")
    answers: dict[str, torch.Tensor] = {}
    keep = lambda dtype, prompt, states, logits: answers.__setitem__(dtype, logits.clone())  # noqa: E731
    run = run_probe(folder, TEXTS[:1], device=device, memory="resident", on_final=keep)
    ids = torch.tensor([run.prompts[0].rows[0].ids], device=device)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        with torch.inference_mode():
            assert torch.equal(model(ids).logits[:, -1], answers[name][:, -1])


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
    from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize("device", DEVICE)
def test_out_of_memory_is_a_sentence_that_says_what_to_try(
    device: str, exact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact or not device.startswith("cuda"):
        pytest.skip("only a pretend card is easily filled")
    from qwen_precision.cli.app import main
    from support.pretend import memory

    folder = make_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "total", 200_000)
    assert main(["probe", str(folder), "--device", device, "--memory", "resident", "--prompt", "abc"]) in (2, 3)
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "out of memory" in said.out


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
