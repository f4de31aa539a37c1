"""Planted overflows that a rescaling reaches are rescued and proven; what it does not reach is named, not exported."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.judge.needs import headroom_gains
from qwen_precision.judge.nextcommand import next_rescue
from qwen_precision.probe.shadow import Shadow
from qwen_precision.qwen3.op import name_of
from qwen_precision.record.generation import Stretch
from qwen_precision.rescue.export import NOTE, Exporter
from qwen_precision.settings.guards import load_guards
from support import kernels
from support.checkpoints import DEMO, make_checkpoint
from support.plants import (
    down_proj_output,
    expert_product,
    lm_head_output,
    one_channel,
    one_unit,
    residual_add,
    swiglu_product,
)
from support.rescues import TEXTS, export, load, logits, planned, powers, rescue
from support.runs import run_probe


def embedding(model: Any) -> None:
    """Every token's embedding is beyond fp16 in one channel: its weights are too."""
    one_channel(model, 5, 100_000.0)


def one_token(model: Any) -> None:
    """Only the token " Paris" has a channel that is too large."""
    model.model.embed_tokens.weight[PARIS, 5] = 200_000.0


def value(model: Any) -> None:
    """v_proj's output is out of range in one channel; o_proj takes it back."""
    one_channel(model, 3, 100.0)
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[0, 3] = 20_000.0
    attention.o_proj.weight[:, [0, 16]] *= 1e-4


def norm_output(model: Any) -> None:
    """The norm in front of q, k and v is out of range; the three make up for it."""
    one_channel(model, 3, 100.0)
    attention = model.model.layers[1].self_attn
    model.model.layers[1].input_layernorm.weight[3] = 30_000.0
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.weight *= 1e-4


def heavy_up(model: Any) -> None:
    """A weight of up_proj that fp16 cannot hold, on a channel that is small."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 8.0, 8.0)
    model.model.layers[1].mlp.up_proj.weight[1, 7] = 100_000.0


def unseen(plant: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same, with the planted channel kept from a tied lm_head, which would make a huge logit of it."""

    def planted(model: Any) -> None:
        plant(model)
        model.model.norm.weight[[5, 9]] = 0.0
        model.model.norm.weight *= 256.0  # the channel dwarfs the others, which are all that the logits are made of

    return planted


PARIS = 0  # set when the tokenizer is read

RESCUABLE: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "residual add": (residual_add, {}),
    "residual add, tied": (unseen(residual_add), {"tied": True}),
    "SwiGLU product": (swiglu_product, {}),
    "down_proj output": (down_proj_output, {}),
    "embedding": (embedding, {}),
    "embedding, tied": (unseen(embedding), {"tied": True}),
    "one token": (one_token, {}),
    "expert": (expert_product, {"moe": True}),
    "v_proj output": (value, {}),
    "norm output": (norm_output, {}),
    "up_proj weight": (heavy_up, {}),
}


@pytest.fixture(autouse=True, scope="module")
def _paris() -> None:
    global PARIS
    PARIS = AutoTokenizer.from_pretrained(DEMO)(" Paris")["input_ids"][0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", RESCUABLE)
def test_an_overflow_that_a_factor_reaches_is_rescued_and_proven(name: str, attention: str, tmp_path: Path) -> None:
    plant, shape = RESCUABLE[name]
    source = make_checkpoint(
        tmp_path / "source", edit=plant, dtype="float32" if "token" in name else "bfloat16", **shape
    )
    assert judge(run_probe(source, TEXTS, attention=attention)).verdict["fp16"] == "fail"
    run = rescue(source, tmp_path / "safe", attention=attention)
    plan, exported = run.rescue, run.rescue.exported
    assert exported.verified and exported.identical and exported.kept, exported.why
    assert exported.verdict != "fail" and exported.headroom >= 4.0 * 0.99
    assert plan.possible and plan.stuck == []
    ids = AutoTokenizer.from_pretrained(source)(TEXTS[0], return_tensors="pt")["input_ids"]
    ours, reference = (
        logits(each, dtype, ids, attention)
        for each, dtype in ((tmp_path / "safe", torch.float16), (source, torch.float32))
    )
    assert torch.isfinite(ours).all()
    assert (ours - reference).norm() <= 0.01 * reference.norm()
    assert torch.equal(ours[:, -1].argmax(-1), reference[:, -1].argmax(-1))


@pytest.mark.arithmetic
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_demo_is_rescued_and_nearer_to_fp32_than_a_quarter_of_bf16(memory: str, tmp_path: Path) -> None:
    run = rescue("demo", tmp_path / "safe", memory=memory)
    exported = run.rescue.exported
    assert exported.verified and exported.identical, exported.why
    assert exported.logit_error["fp16"] is None
    assert exported.logit_error["after"] <= exported.logit_error["bf16"] / 4
    for text in TEXTS:
        ids = AutoTokenizer.from_pretrained(DEMO)(text, return_tensors="pt")["input_ids"]
        reference = logits(DEMO, torch.float32, ids)
        assert not torch.isfinite(logits(DEMO, torch.float16, ids)).all()
        rescued, plain = (
            logits(folder, dtype, ids) for folder, dtype in ((tmp_path / "safe", torch.float16), (DEMO, torch.bfloat16))
        )
        assert (rescued - reference).abs().max() <= (plain - reference).abs().max() / 4


def continued(folder: Path, dtype: torch.dtype, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, dtype)
    given = tokenizer(text, return_tensors="pt")
    out = model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(out[0]))


@pytest.mark.arithmetic
@pytest.mark.parametrize("text", [*TEXTS, "def add(a, b):"])
def test_greedy_text_of_the_rescued_demo_equals_that_of_fp32(text: str, tmp_path: Path) -> None:
    rescue("demo", tmp_path / "safe")
    assert continued(tmp_path / "safe", torch.float16, text) == continued(DEMO, torch.float32, text)
    assert continued(DEMO, torch.float16, text).endswith("!!!!!!!!")


@pytest.mark.arithmetic
@pytest.mark.parametrize("tied", [False, True])
def test_the_error_is_that_of_the_same_model_with_a_small_stream_to_begin_with(tied: bool, tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "small", tied=tied)
    large = export(small, tmp_path / "large", powers(stream=-20, final_norm=-20 if tied else 0))
    assert not torch.isfinite(logits(large, torch.float16)).all()
    run = rescue(large, tmp_path / "safe", rescue_margin=1024.0 if tied else 16.0)
    reference = logits(small, torch.float32)
    assert torch.equal(logits(large, torch.float32), reference) and run.rescue.exported.identical
    before, after = (logits(each, torch.float16) for each in (small, tmp_path / "safe"))
    # Both round the same numbers, up to powers of two, so what a CPU sums in whatever order comes out the same; only
    # what falls below fp16's normal range in one of them loses bits. That is small beside what rounding costs anyway,
    # and a fifth of it where partial sums are kept in fp16.
    assert (after - before).norm() <= (0.5 if kernels.OLDEST else 0.01) * (before - reference).norm()


def test_a_model_that_needs_it_is_untied_and_still_the_same_function(tmp_path: Path) -> None:
    """The final norm has no room for the inverse of the stream's factor, so lm_head must be its own tensor."""
    source = make_checkpoint(
        tmp_path / "source",
        tied=True,
        edit=lambda model: (one_channel(model, 5, 100_000.0), model.model.norm.weight.fill_(20_000.0)),
    )
    run = rescue(source, tmp_path / "safe", rescue_margin=1.0)
    assert run.rescue.rescaling.untied and run.rescue.stuck[0].name == "logits"
    assert torch.equal(
        logits(export(source, tmp_path / "exact", run.rescue.rescaling), torch.float32), logits(source, torch.float32)
    )


# -- what cannot be moved --------------------------------------------------------------------------------------


def q_norm_weight(model: Any) -> None:
    model.model.layers[2].self_attn.q_norm.weight[3] = 70_000.0


def gate_output(model: Any) -> None:
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 80_000.0, 0.001)


STUCK: dict[str, tuple[Callable[[Any], None], int | None, str, str, str]] = {
    "q_norm weight": (q_norm_weight, 2, "model.layers.2.self_attn.q_norm", "q_norm weight", "fp16 cannot hold 70144"),
    "logits": (lm_head_output, None, "lm_head", "logits", "the model's answer"),
    "gate": (gate_output, 1, "model.layers.1.mlp.gate_proj", "gate_proj output", "SiLU is not linear"),
}


@pytest.mark.parametrize("name", STUCK)
def test_what_no_factor_moves_is_named_and_nothing_is_exported(name: str, tmp_path: Path) -> None:
    plant, layer, module, what, why = STUCK[name]
    source = make_checkpoint(tmp_path / "source", edit=plant)
    run = rescue(source, tmp_path / "safe")
    first = next(each for each in run.rescue.stuck if each.fails)
    assert (first.layer, first.module, first.name) == (layer, module, what) and why in first.why
    assert not run.rescue.possible and run.rescue.exported is None
    assert list(tmp_path.iterdir()) == [source]
    assert any(module.startswith(each) for each in run.rescue.fp32_modules)


def test_the_modules_that_would_need_fp32_are_the_fewest_that_hold_it(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        gate_output(model)
        q_norm_weight(model)

    source = make_checkpoint(tmp_path / "source", edit=plant)
    modules = planned(source, TEXTS).rescue.fp32_modules
    assert modules[0] == "model.layers.1.mlp" and all("layers.2.self_attn" in each for each in modules[1:])
    assert len(modules) == 2


def test_a_damaged_weight_is_not_rescued(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        residual_add(model)
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    run = rescue(make_checkpoint(tmp_path / "source", edit=plant), tmp_path / "safe")
    assert any("damaged" in each.why for each in run.rescue.stuck) and run.rescue.exported is None


@pytest.mark.parametrize("dtype", ["fp16", "source"])
def test_told_to_keep_what_was_not_verified_it_stays_and_says_so(dtype: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", edit=lambda model: (residual_add(model), q_norm_weight(model)))
    run = rescue(source, tmp_path / "safe", keep=True, dtype=dtype)
    assert run.rescue.exported.kept and not run.rescue.exported.verified
    assert "fails in fp16" in run.rescue.exported.why
    assert not json.loads((tmp_path / "safe" / NOTE).read_text())["verification"]["verified"]


def test_a_healthy_model_has_no_plan_and_is_not_exported(healthy: Path, tmp_path: Path) -> None:
    assert planned(healthy, TEXTS).rescue is None
    run = rescue(healthy, tmp_path / "safe")
    assert run.rescue.rescaling.changes_nothing and run.rescue.possible and run.rescue.exported is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.arithmetic
def test_the_powers_are_the_smallest_that_reach_the_margin(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", edit=residual_add)
    for margin in (1.0, 2.0, 4.0, 64.0):
        run = planned(source, TEXTS, rescue_margin=margin)
        rows = [row for row in headroom_gains(run) if row.before != row.after]
        least = min(row.after for row in rows)
        assert margin <= least < 2 * margin and run.rescue.rescaling.stream >= 1


def test_a_factor_goes_where_the_fewest_bits_are_lost(tmp_path: Path) -> None:
    """Every split between up and down_proj is tried by hand, bit by bit, over all weights of a layer."""

    def bits(weight: torch.Tensor, exponent: int) -> int:
        lost = 0
        for value in (weight.double() * 2.0**exponent).abs().flatten().tolist():
            digits = int(value * 2**60)  # every bit of a bf16 number is there
            assert digits == value * 2**60
            below = digits & ((1 << 36) - 1)  # what lies under 2^-24
            if digits:
                last = (digits & -digits).bit_length() - 1
                lost += 0 if not below else min(36, digits.bit_length()) - last
        return lost

    source = make_checkpoint(tmp_path / "source", edit=residual_add, hidden_size=64, intermediate_size=32)
    plan = planned(source, TEXTS).rescue
    stream = plan.rescaling.stream
    mlp = load(source, torch.float32).model.layers[2].mlp
    up, down = mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach()
    lost = [bits(up, -each) + bits(down, each - stream) for each in range(stream + 1)]
    chosen = next((each.product[0] for each in plan.rescaling.layers if each.layer == 2), 0)
    assert stream > 1 and lost[chosen] == min(lost) < lost[0]


@pytest.mark.parametrize("broken", ["function", "margin"])
def test_what_breaks_a_promise_is_not_verified(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_precision.rescue import deliver

    def weaker(checkpoint: Any, rescaling: Any, *more: Any) -> Any:
        return Exporter(checkpoint, rescaling.model_copy(update={"stream": rescaling.stream - 1}), *more)

    if broken == "function":
        monkeypatch.setattr(deliver, "prove", lambda *args: (False, 10))
    else:
        monkeypatch.setattr(deliver, "Exporter", weaker)
    exported = rescue("demo", tmp_path / "safe").rescue.exported
    assert not exported.verified and not (tmp_path / "safe").exists()
    assert ("bit for bit" if broken == "function" else "less than 4x") in exported.why


def test_a_sum_that_left_the_range_half_way_asks_for_the_whole_margin() -> None:
    from qwen_precision.judge.columns import Columns
    from qwen_precision.judge.findings import Limits
    from qwen_precision.judge.needs import needs
    from support.builders import a_pass, a_run, an_event

    values = [1.5, 20.0, 300.0, 400.0, 420.0, 31.0]
    fp16 = a_pass("fp16", [*values[:3], float("inf"), *values[4:]], [an_event(3)])
    found = needs(Columns(a_run([a_pass("fp32", values), fp16]), Limits()), 4.0, 0)
    assert found.of("stream") == 2 and found.stuck == []


# -- what is written -------------------------------------------------------------------------------------------


def test_what_is_written_has_the_same_shards_hashes_and_everything_a_runtime_reads(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", edit=unseen(residual_add), shard="40KB", tied=True)
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    run = rescue(source, tmp_path / "safe")
    safe = tmp_path / "safe"
    names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"} | {NOTE}
    assert {path.name for path in safe.iterdir()} == names
    note = json.loads((safe / NOTE).read_text())
    assert note["rescaling"]["stream"] == run.rescue.rescaling.stream and note["source"]["name"] == "source"
    for folder, hashes in ((source, note["source"]["sha256"]), (safe, note["sha256"])):
        assert hashes == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in hashes}
        assert {name for name in hashes if name.endswith(".safetensors")} == {
            path.name for path in folder.glob("*.safetensors")
        }
    old, new = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (source, safe))
    assert old["weight_map"] == new["weight_map"]
    config = json.loads((safe / "config.json").read_text())
    assert config["dtype"] == "float16" and config["rms_norm_eps"] == 1e-6 * 4.0**-run.rescue.rescaling.stream
    assert (safe / "LICENSE").read_text() == "free" and str(tmp_path) not in (safe / NOTE).read_text()


@pytest.mark.parametrize(("dtype", "torch_name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("source", "float32")])
def test_weights_are_written_in_the_format_asked_for_each_rounded_once(
    dtype: str, torch_name: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", dtype="float32")
    rescaling = powers(stream=7)
    made = load(export(source, tmp_path / "made", rescaling, dtype), getattr(torch, torch_name))
    wanted = dict(load(source, torch.float32).named_parameters())
    for name, parameter in made.named_parameters():
        factor = 2.0**-7 if any(part in name for part in ("embed", "q_proj", "k_proj", "o_proj", "down_proj")) else 1.0
        assert torch.equal(parameter, (wanted[name].double() * factor).to(parameter.dtype)), name


def test_the_lost_weights_are_those_that_a_cast_loses(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        large = make_checkpoint(tmp_path / dtype, dtype=dtype, edit=residual_add)
        plan = planned(large, TEXTS).rescue
        wanted = dict(load(large, torch.float32).named_parameters())
        for loss in plan.losses:
            if loss.kind != "q_proj":
                continue
            weights = [tensor.detach() for name, tensor in wanted.items() if name.endswith("q_proj.weight")]
            scaled = torch.cat([weight.flatten() for weight in weights]).double() * 2.0**-plan.rescaling.stream
            if dtype == "float32":  # what fp16 keeps of a number anyway: 11 significant bits
                mantissa, exponent = torch.frexp(scaled)
                scaled = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
            half = scaled.half().double()
            assert loss.inexact == int((half != scaled).sum()), dtype
            assert loss.to_zero == int(((half == 0) & (scaled != 0)).sum())
            assert loss.error == pytest.approx(float((half - scaled).norm() / scaled.norm()), rel=1e-6, abs=1e-12)


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_qprec_wrote_it(tmp_path: Path) -> None:
    target = tmp_path / "safe"
    rescue("demo", target)
    with pytest.raises(UsageError, match="--force"):
        rescue("demo", target)
    (target / "extra").touch()
    rescue("demo", target, force=True)
    assert not (target / "extra").exists() and (target / NOTE).is_file()
    (target / NOTE).unlink()
    with pytest.raises(UsageError, match="was not written by qprec"):
        rescue("demo", target, force=True)
    assert (target / "config.json").is_file()


def test_the_checkpoint_itself_is_never_written_over(tmp_path: Path) -> None:
    source = Path(shutil.copytree(DEMO, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for folder in (source, source / "inside", tmp_path):
        with pytest.raises(UsageError, match=r"write over|already"):
            rescue(source, folder, force=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_what_is_interrupted_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.rescue import deliver

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    def probing_the_export(shadow: Any) -> None:
        interrupted() if str(tmp_path) in str(shadow.store._checkpoint.folder) else run_shadow(shadow)

    run_shadow = Shadow.run
    for owner, name, instead in (
        (deliver.Exporter, "write", interrupted),
        (deliver, "prove", interrupted),
        (Shadow, "run", probing_the_export),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            run = rescue("demo", tmp_path / "safe", keep=True)
        assert "nothing was exported" in run.unfinished and run.rescue.exported is None
        assert judge(run).exit_code("never") == 3
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_precision.rescue import export as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(QprecError, match="are free; make room"):
        rescue("demo", tmp_path / "safe")
    assert list(tmp_path.iterdir()) == []


def test_what_is_further_from_fp32_than_bf16_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spike(model: Any) -> None:
        model.model.embed_tokens.weight[PARIS, 5] = 1e10  # so large that the factor leaves nothing of the others

    source = make_checkpoint(tmp_path / "source", edit=spike)
    exported = rescue(source, tmp_path / "safe").rescue.exported
    assert exported.identical and not exported.verified and "run it in bf16" in exported.why
    assert not (tmp_path / "safe").exists()
    with_one = rescue(source, tmp_path / "safe", dtypes=["fp16"]).rescue.exported
    assert not with_one.verified and "more than 0.02" in with_one.why


def test_a_file_that_was_written_wrongly_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Exporter._pieces

    def wrong(self: Any, name: str, info: Any) -> Any:
        for piece in pieces(self, name, info):
            yield memoryview(bytes(len(piece))) if "layers.4.mlp.down_proj" in name else piece

    monkeypatch.setattr(Exporter, "_pieces", wrong)
    exported = rescue("demo", tmp_path / "safe").rescue.exported
    assert not exported.verified and not (tmp_path / "safe").exists()


def test_what_appears_in_the_target_meanwhile_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_precision.rescue import deliver

    note = deliver._write_note

    def appears(*args: Any) -> None:
        note(*args)
        (tmp_path / "safe").mkdir()
        (tmp_path / "safe" / "precious").touch()

    monkeypatch.setattr(deliver, "_write_note", appears)
    with pytest.raises(UsageError, match="is there already"):
        rescue("demo", tmp_path / "safe", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["safe", "precious"]


def test_an_earlier_export_survives_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rescue("demo", tmp_path / "safe")
    (tmp_path / "safe" / "old").touch()
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "safe" and "partial" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(QprecError, match="No space left"):
        rescue("demo", tmp_path / "safe", force=True)
    assert (tmp_path / "safe" / "old").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_gate_near_the_limit_stays_where_it_is_and_up_moves(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        expert_product(model)
        experts = model.model.layers[2].mlp.experts
        if not hasattr(experts, "gate_up_proj"):
            pytest.skip("experts are modules of their own: gate and up are not one product")
        experts.gate_up_proj[:, 0, 3] = -30_000.0 / 8

    run = rescue(make_checkpoint(tmp_path / "source", edit=plant, moe=True), tmp_path / "safe")
    assert [(each.layer, each.fails) for each in run.rescue.stuck] == [(2, False)]
    assert [each.layer for each in run.rescue.rescaling.layers] == [1] and run.rescue.exported.verified
    after = {row.name: row.after for row in headroom_gains(run)}
    rows = judge(run_probe(tmp_path / "safe", TEXTS, dtypes=["fp16"])).headroom["fp16"]
    measured: dict[str, float] = {}
    for row in rows:
        site = run.sites[row.site]
        measured.setdefault(name_of(site.module, site.op, site.call), row.headroom)
    name = "gate and up projection of the experts"
    assert after[name] == pytest.approx(measured[name], rel=1e-2)


def test_a_tied_model_whose_files_hold_another_lm_head_is_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "source", tied=True, edit=unseen(residual_add))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "another lm_head" in rescue(source, tmp_path / "safe").rescue.unsupported


def test_the_next_command_makes_the_same_plan(tmp_path: Path) -> None:
    run = planned("demo", ["a " * 150], rescue_margin=64.0)
    assert next_rescue(judge(run), "run.json") == (
        "qprec probe demo --rescue-margin 64.0 --prompts run.json --rescue-to demo-fp16safe"
    )
    here = run.model_copy(update={"model": run.model.model_copy(update={"source": "."})})
    assert str(next_rescue(judge(here), "run.json")).endswith("--rescue-to ../model-fp16safe")


# -- generate --------------------------------------------------------------------------------------------------


def test_generate_recovers_in_fp16_itself_and_loads_no_second_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_precision.model.loaded import Models
    from support.generations import run as generated

    loaded: list[str] = []
    original = Models._load
    monkeypatch.setattr(Models, "_load", lambda self, name: (loaded.append(name), original(self, name))[1])
    run = generated("demo", guards=load_guards("default", "rescale"), max_new_tokens=24)
    (row,) = run.generation.rows
    assert loaded == ["fp16"] and run.dtypes == ["fp16"]
    assert row.stretches == [Stretch(start=0, dtype="fp16", rescaled=True)]
    assert row.input + row.text == continued(DEMO, torch.float32, row.input).replace("<|im_end|>", "")
    assert judge(run).verdict == {"fp16": "risk"} and run.rescue.rescaling.stream > 0
