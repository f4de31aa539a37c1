"""The script for a maintainer, run: it fails where the run failed, names the module, and passes where all was well."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import DynamicCache

from qwen_precision.cli.app import main
from qwen_precision.errors import UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.record.file import load
from qwen_precision.record.run import Run
from qwen_precision.render import FORMATS, View, one
from qwen_precision.report.redact import redacted, without_paths
from qwen_precision.settings.prompts import PromptSpec
from support import generations, plants
from support.builders import (
    HOSTILE,
    RUNS,
    a_model,
    a_pass,
    a_prompt,
    a_run,
    an_event,
    hostile_run,
    hostile_text_run,
    overflowing_run,
)
from support.checkpoints import make_checkpoint
from support.families import WRAPPERS, make_family
from support.gguffiles import write_gguf
from support.loud import says
from support.runs import TEXTS, explained, run_probe

pytestmark = [pytest.mark.usefixtures("scratch"), pytest.mark.transformers]

Capture = pytest.CaptureFixture[str]
LONG, SHORT = "The quick brown fox", "Hello"


def script_of(*runs: Run) -> str:
    text = str(FORMATS["repro"].render(View(tuple(judge(run) for run in runs))))
    assert len(text.splitlines()) <= 40 and "qprec" not in text
    assert max(map(len, text.splitlines())) <= 200
    return text


def ran(script: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[bool, str]:
    """Whether the script passed, run in this process; and the module that it named first, or what it printed."""
    monkeypatch.setattr(sys, "argv", ["repro.py", *arguments])
    capsys.readouterr()
    try:
        exec(compile(script, "repro.py", "exec"), {"__name__": "__main__"})
        passed = True
    except AssertionError as error:
        assert str(error)
        passed = False
    out = capsys.readouterr().out
    found = re.search(r"first module that is not finite: ([^;\n]*)", out)
    return passed, found[1] if found else out


def in_a_process(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run as a maintainer would: a file, in a process of its own, with no network."""
    path = tmp_path / "repro.py"
    path.write_text(script, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)


def first_error(run: Run) -> Any:
    return next(each for each in judge(run).findings if each.severity == "error")


def module_of(run: Run) -> str:
    return str(first_error(run).place.module)


def loud_scores(model: Any) -> None:
    """Eager attention: q times k is more than fp16 holds, before it is scaled."""
    attention = model.model.layers[1].self_attn
    attention.q_norm.weight.fill_(120.0)
    attention.k_norm.weight.fill_(120.0)


# -- a forward of a prompt that fails ------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Any], None]] = {
    "down_proj": plants.down_proj_output,
    "residual add": plants.residual_add,
    "SwiGLU product": plants.swiglu_product,
    "o_proj": plants.o_proj_and_product,
    "lm_head": plants.lm_head_output,
    "gate": plants.gate_too_large,
    "q_norm": plants.query_norm_too_large,
    "two tokens": plants.two_tokens,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_script_fails_and_names_the_module_of_the_finding(
    name: str, attention: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "abYZc" if name == "two tokens" else TEXTS[0]
    run = run_probe(make_checkpoint(tmp_path / "model", edit=FAULTS[name]), [text], attention=attention)
    script = script_of(run)
    assert ran(script, capsys, monkeypatch) == (False, module_of(run))
    assert ran(script, capsys, monkeypatch, str(tmp_path / "model"), "float32") == (True, "none")
    assert f"attn_implementation='{attention}'" in script and '"float16"' in script
    assert f"in {module_of(run)} (" in script


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("plant", [plants.expert_product, plants.expert_output_too_large])
def test_the_experts_of_a_mixture_are_named(
    plant: Callable[[Any], None], experts: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.checkpoints import edit_json

    folder = make_checkpoint(tmp_path / "model", moe=True, edit=plant)
    edit_json(folder / "config.json", experts_implementation=experts)
    run = run_probe(folder, TEXTS)
    assert ran(script_of(run), capsys, monkeypatch) == (False, module_of(run))


def test_scores_that_overflow_in_eager_attention_are_told_from_those_of_sdpa(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=loud_scores)
    eager, sdpa = (run_probe(folder, TEXTS, attention=name) for name in ("eager", "sdpa"))
    assert ran(script_of(eager), capsys, monkeypatch) == (False, "model.layers.1.self_attn")
    assert module_of(eager) == "model.layers.1.self_attn"
    assert ran(script_of(sdpa), capsys, monkeypatch) == (True, "none")


def test_an_overflow_that_does_no_harm_is_printed_or_not_and_never_asserted(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", edit=plants.low_score(70_000.0)), ["abZcd"], attention="eager")
    report = judge(run)
    assert report.verdict["fp16"] == "risk" and any(each.cause.kind == "harmless-overflow" for each in report.findings)
    script = script_of(run)
    assert ran(script, capsys, monkeypatch)[0] and "assert" not in script.split("Nothing is asserted")[0]


def test_only_the_prompt_that_fails_is_in_the_script(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.loud_token("Z", 40_000.0))
    run = run_probe(folder, ["abc", "abZ", "abd"])
    script = script_of(run)
    assert f"IDS = [{plants.ids_of('abZ')}]" in script
    assert ran(script, capsys, monkeypatch) == (False, "model.layers.1")


BATCH = [PromptSpec(name="batch", batch=["aaaaaaaaa", "Z"]), PromptSpec(name="plain", text="aaa")]


def test_a_batch_that_only_its_padding_spoils_fails_by_its_padding(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pad positions hold the very token that the run had there."""
    folder = make_checkpoint(tmp_path / "model", edit=plants.loud_token("<|endoftext|>", 40_000.0))
    run = explained(folder, BATCH)
    assert first_error(run).cause.kind == "masked-rows"
    script = script_of(run)
    assert ran(script, capsys, monkeypatch) == (False, module_of(run))
    alone = script.replace(f"IDS = {[row.ids for row in run.prompts[0].rows]}", f"IDS = [{run.prompts[0].rows[1].ids}]")
    assert alone != script and ran(alone, capsys, monkeypatch) == (True, "none")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_of_a_padded_batch_is_named_whatever_its_padding_holds(
    attention: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.loud_token("Z", 40_000.0))
    run = explained(folder, [PromptSpec(name="batch", batch=["aaaaaaaaa", "aZ"])], attention=attention, explain=False)
    assert ran(script_of(run), capsys, monkeypatch) == (False, module_of(run))


def test_a_healthy_batch_passes(
    tmp_path: Path, healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = explained(healthy, [PromptSpec(name="batch", batch=[LONG, SHORT])])
    assert judge(run).verdict["fp16"] == "ok"
    assert ran(script_of(run), capsys, monkeypatch) == (True, "none")


# -- processes of their own ----------------------------------------------------------------------------------------


def test_a_maintainer_s_process_fails_on_the_bug_and_another_folder_can_be_given(tmp_path: Path, healthy: Path) -> None:
    bad = make_checkpoint(tmp_path / "model", edit=plants.down_proj_output)
    run = run_probe(bad, TEXTS)
    done = in_a_process(script_of(run), tmp_path)
    assert done.returncode == 1 and "AssertionError: not finite from model.layers.1.mlp.down_proj on" in done.stderr
    done = in_a_process(script_of(run_probe(healthy, TEXTS)), tmp_path)
    assert done.returncode == 0 and "not finite: none; the answer is finite: True" in done.stdout, done.stderr


def test_the_bundle_holds_a_script_that_finds_the_demo(
    tmp_path: Path, demo_run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    from qwen_precision.record.file import save

    save(demo_run, tmp_path / "run.json")
    assert main(["report", "run.json", "-o", "x.zip"]) == 1
    with zipfile.ZipFile("x.zip") as archive:
        script = archive.read("repro.py").decode()
    assert main(["report", "x.zip", "-o", "again.py"]) == 1
    assert Path("again.py").read_text() == script
    assert ran(script, capsys, monkeypatch) == (False, "model.layers.3.mlp.down_proj")


# -- the file itself -----------------------------------------------------------------------------------------------


def test_a_damaged_weight_is_read_from_its_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")

    run = run_probe(make_checkpoint(tmp_path / "model", edit=plant), TEXTS)
    passed, said = ran(script_of(run), capsys, monkeypatch)
    assert not passed and f"{module_of(run)}.weight in model.safetensors: 1 of" in said
    assert ran(script_of(run), capsys, monkeypatch, str(make_checkpoint(tmp_path / "well")))[0]


def test_an_embedding_that_no_prompt_uses_fails_too(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(model: Any) -> None:
        model.model.embed_tokens.weight[500, 4] = float("inf")

    run = run_probe(make_checkpoint(tmp_path / "model", edit=plant), ["abc"])
    assert not any(each.failed for each in run.passes) and judge(run).verdict["fp16"] == "fail"
    passed, said = ran(script_of(run), capsys, monkeypatch)
    assert not passed and "model.embed_tokens.weight in model.safetensors: 1 of" in said


def test_a_weight_beyond_the_format_fails_in_that_format(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0

    folder = make_checkpoint(tmp_path / "model", edit=plant, dtype="float32")
    script = script_of(run_probe(folder, TEXTS, dtypes=["fp16"]))
    assert not ran(script, capsys, monkeypatch)[0] and "torch.float16" in script
    assert ran(script.replace("torch.float16", "torch.bfloat16"), capsys, monkeypatch)[0]


def test_scales_that_were_never_written_are_read_from_their_file(
    tmp_path: Path, healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.quantise import SCHEMES, quantised, rewrite

    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES["fp8 blocks"])
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"

    def unwritten(parts: Any) -> None:
        parts[name][0, 0] = float("nan")

    rewrite(folder, unwritten)
    run = run_probe(folder, TEXTS)
    script = script_of(run)
    passed, said = ran(script, capsys, monkeypatch)
    assert first_error(run).kind in ("bad-scale", "weight-nonfinite")
    assert not passed and name in said


def test_bytes_that_are_no_scale_are_read_from_their_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.families import make_family
    from support.quantise import EXPERTS, MXFP4, quantised, rewrite

    folder, _ = quantised(make_family(tmp_path / "plain", "gpt_oss").folder, tmp_path / "q", MXFP4, EXPERTS)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    rewrite(folder, lambda parts: parts[name][2, 0, :2].fill_(255))
    passed, said = ran(script_of(run_probe(folder, TEXTS)), capsys, monkeypatch)
    assert not passed and f"{name} in model.safetensors: 2 of 2048 numbers are NaN" in said


# -- generations ---------------------------------------------------------------------------------------------------


def test_a_generation_that_fails_at_its_first_step_is_one_forward(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.down_proj_output)
    run = generations.run(folder, [LONG], guards="observe", dtype="fp16", max_new_tokens=3)
    script = script_of(run)
    assert judge(run).verdict["fp16"] == "fail" and "past_key_values" not in script
    assert ran(script, capsys, monkeypatch) == (False, "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("guards", ["observe", "off"])
@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["alone", "batch"])
def test_a_generation_that_fails_later_is_made_again_step_by_step(
    prompts: list[str], guards: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (token,) = plants.ids_of("Z")
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    run = generations.run(folder, prompts, guards=guards, dtype="fp16", max_new_tokens=12)
    assert judge(run).verdict["fp16"] == "fail"
    script = script_of(run)
    assert f"{token}]" in script and "past_key_values=cache" in script
    assert ran(script, capsys, monkeypatch) == (False, "model.layers.1")


def test_a_row_that_was_bad_before_is_not_taken_for_the_one_that_fails(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 0 is bad from step 0 on, in layer 0; asked about is row 1, that fails in layer 1 once it has said "Z"."""
    (early,), (token,) = plants.ids_of("Y"), plants.ids_of("Z")

    def plant(model: Any) -> None:
        says(token)(model)
        model.model.embed_tokens.weight[:, 3] = 0.0
        model.model.embed_tokens.weight[early, 3] = 100.0
        plants.one_unit(model, 0, 3, 8.0, 8.0)
        model.model.layers[0].mlp.down_proj.weight[11, 0] = 4000.0

    folder = make_checkpoint(tmp_path / "model", edit=plant)
    run = generations.run(folder, ["abYab", LONG], guards="observe", dtype="fp16", max_new_tokens=3)
    assert ran(script_of(run), capsys, monkeypatch) == (False, "model.layers.0.mlp.down_proj")
    assert run.generation is not None
    trips = [trip for trip in run.generation.trips if trip.row == 1]
    about = run.model_copy(update={"generation": run.generation.model_copy(update={"trips": trips})})
    assert ran(script_of(about), capsys, monkeypatch) == (False, "model.layers.1")


def test_the_probe_of_a_failing_step_shows_it_in_one_forward(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (token,) = plants.ids_of("Z")
    folder = make_checkpoint(tmp_path / "model", edit=says(token))
    main(["generate", str(folder), "--prompt", LONG, "--max-new-tokens", "3", "-o", "gen.json", "--dtype", "fp16"])
    assert main(["probe", str(folder), "--dtype", "fp16", "--prompts", "gen.json", "--no-explain"]) == 1
    run = load(Path("qprec-run.json"))
    script = script_of(run)
    assert "One forward of the ids of step 1 shows it." in script and "past_key_values" not in script
    assert ran(script, capsys, monkeypatch) == (False, module_of(run))


def wrong_cache(monkeypatch: pytest.MonkeyPatch, fault: Callable[[int, int, int], bool]) -> None:
    """In fp16, what the last row reads from the cache of layer 1 is too large where ``fault`` says so."""
    update = DynamicCache.update

    def wrong(self: DynamicCache, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        before = self.get_seq_length(layer_idx)
        keys_all, values_all = update(self, keys, values, layer_idx, *args, **kwargs)
        if layer_idx == 1 and values.dtype == torch.float16 and fault(len(values), values.shape[2], before):
            size = torch.ones(len(values), 1, 1, 1)
            size[-1] = 1e7
            values_all = (values_all * size).to(values.dtype)
        return keys_all, values_all

    monkeypatch.setattr(DynamicCache, "update", wrong)


@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]], ids=["alone", "batch"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_step_that_only_a_cache_spoils_is_made_again_with_a_cache(
    chunk: int, prompts: list[str], healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks what goes wrong is the second of them; else the first step."""
    wrong_cache(monkeypatch, lambda rows, new, before: before > 0 and (new > 1) == bool(chunk))
    Path("chunks.yaml").write_text(f"float32_logits: {{chunk: {chunk}}}\n")
    asked = [word for text in prompts for word in ("--prompt", text)]
    words = ["generate", str(healthy), *asked, "--max-new-tokens", "3", "-o", "gen.json", "--guards", "chunks.yaml"]
    main([*words, "--dtype", "fp16"])
    assert main(["probe", str(healthy), "--dtype", "fp16", "--prompts", "gen.json"]) == 1
    run = load(Path("qprec-run.json"))
    assert first_error(run).kind == "unseen-failure"
    script = script_of(run)
    assert "as generated: one forward is finite" in script
    assert ran(script, capsys, monkeypatch) == (False, "model.layers.1.self_attn")
    monkeypatch.undo()
    assert ran(script, capsys, monkeypatch) == (True, "none")


def test_a_row_that_was_recovered_is_shown_and_not_asserted(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.down_proj_output)
    run = generations.run(folder, [LONG], dtype="fp16", max_new_tokens=3)
    assert judge(run).verdict["fp16"] == "risk"
    assert ran(script_of(run), capsys, monkeypatch) == (True, "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("sample", [True, False])
def test_a_sampler_that_is_left_nothing_fails_again(
    sample: bool, tmp_path: Path, healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are healthy: nothing of the model is at fault, and a forward of it would show nothing."""
    folder = Path(shutil.copytree(healthy, tmp_path / "model"))
    kept = {"suppress_tokens": list(range(512)), "eos_token_id": 503}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    run = generations.run(folder, [LONG], guards="off", dtype="fp16", max_new_tokens=2, do_sample=sample)
    assert first_error(run).kind == "sampling-error"
    assert ran(script_of(run), capsys, monkeypatch)[0] is False
    assert ran(script_of(run), capsys, monkeypatch, str(healthy))[0] is True


def test_a_temperature_that_overflows_does_so_again(
    healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"do_sample": True, "temperature": 1e-40}
    run = generations.run(healthy, [LONG, SHORT], guards="off", dtype="fp16", max_new_tokens=2, **flags)
    script = script_of(run)
    assert ran(script, capsys, monkeypatch)[0] is False
    assert ran(script.replace("'temperature': 1e-40", "'temperature': 1.0"), capsys, monkeypatch)[0] is True


def test_torch_s_refusal_to_draw_from_bad_logits_names_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", edit=plants.down_proj_output)
    monkeypatch.setattr(sys, "argv", ["repro.py"])
    unwatched = generations.settings(watch=False, recover=False, clamp=False, epsilon=False)
    for guards in ("off", unwatched):
        run = generations.run(folder, [LONG], guards=guards, dtype="fp16", max_new_tokens=3, do_sample=True)
        assert run.generation is not None and run.generation.error is not None
        with pytest.raises(AssertionError, match=r"model\.layers\.1\.mlp\.down_proj"):
            exec(compile(script_of(run), "repro.py", "exec"), {"__name__": "__main__"})


def test_a_healthy_generation_passes(healthy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = generations.run(healthy, [LONG, SHORT], dtype="fp16", max_new_tokens=3)
    assert ran(script_of(run), capsys, monkeypatch) == (True, "none")


# -- other families ------------------------------------------------------------------------------------------------


THERE = sorted(name for name in WRAPPERS if hasattr(transformers, name) and name != "GPT2LMHeadModel")
"""Older versions lack some."""


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mamba", *THERE])
def test_a_model_of_any_class_is_loaded_as_that_class(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, given = (WRAPPERS[name], {"architecture": name}) if name in WRAPPERS else (name, {})
    families = {plant: make_family(tmp_path / str(plant), kind, plant=plant, **given) for plant in (True, False)}
    run = run_probe(families[True].folder, TEXTS, dtypes=["fp16"])
    script = script_of(run)
    passed, module = ran(script, capsys, monkeypatch)
    assert not passed and f".{module_of(run)}".endswith(f".{module}")
    assert ran(script, capsys, monkeypatch, str(families[False].folder))[0]


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_the_script_of_every_kind_of_run_looks_as_expected(run: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{run}.repro.txt", script_of(RUNS[run]()))


@pytest.mark.parametrize("text", [*HOSTILE, "coding: utf-7", '"""', "\\", "';import os;'", "\r\nimport os"], ids=ascii)
@pytest.mark.parametrize("make", [hostile_run, hostile_text_run])
def test_strings_from_strangers_are_literals_and_comments(make: Callable[[str], Run], text: str) -> None:
    script = str(FORMATS["repro"].render(one(judge(make(text)))))
    strings = {node.value for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Constant)}
    assert text in strings  # the source, as it is
    names = {alias.name for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= {"sys", "inspect", "torch", "transformers"}
    assert text not in "\n".join(script.splitlines()[:2])  # where Python reads an encoding
    assert len(script.splitlines()) <= 40


def test_many_ids_stand_in_one_long_line() -> None:
    ids = list(range(100_000, 103_000))
    run = overflowing_run(prompts=[a_prompt(ids=ids, tokens=["w"] * len(ids))])
    script = str(FORMATS["repro"].render(one(judge(run))))
    assert len(script.splitlines()) <= 40 and f"IDS = [{ids}]" in script
    few = overflowing_run(prompts=[a_prompt(ids=ids[:40], tokens=["w"] * 40)])
    lines = script_of(few).splitlines()
    assert max(map(len, lines)) <= 130 and "IDS = " in "\n".join(lines)


def test_an_answer_that_was_finite_all_the_same_is_not_what_is_asserted() -> None:
    events = [an_event(4)]
    fp16 = a_pass("fp16", [1.5, 20.0, 300.0, 40000.0, float("inf"), 31.0], events, top1=[5])
    reference = a_pass("fp32", [1.5, 20.0, 300.0, 40000.0, 74945.8, 31.0])
    assert "assert not bad" in script_of(a_run([reference, fp16]))
    assert "assert finite" in script_of(a_run([reference, fp16.model_copy(update={"top1": [None]})]))


def test_of_several_runs_the_first_that_fails_is_shown() -> None:
    good, bad = RUNS["healthy"](), overflowing_run(model=a_model(source="bad/one"))
    assert "'bad/one'" in script_of(good, bad, overflowing_run())
    assert "'Qwen/Qwen3-8B'" in script_of(good, RUNS["divergent" if "divergent" in RUNS else "healthy"]())


def test_a_redacted_run_has_no_script_and_says_why(capsys: Capture) -> None:
    from qwen_precision.record.file import save

    run = redacted(overflowing_run())
    with pytest.raises(UsageError, match="redacted, its token ids are made up"):
        FORMATS["repro"].render(one(judge(run)))
    save(overflowing_run(), Path("run.json"))
    assert main(["report", "run.json", "--redact", "-o", "repro.py"]) == 2
    assert "--format repro" in capsys.readouterr().err and not Path("repro.py").exists()
    assert main(["report", "run.json", "--redact", "-o", "x.zip"]) == 1  # without the script
    assert main(["report", "x.zip"]) == 1


def test_a_folder_s_path_does_not_go_into_a_bundle_s_script() -> None:
    run = overflowing_run(model=a_model(source="/home/alice/models/mine", revision=None))
    assert "else 'mine'" in script_of(without_paths(run)) and "'/home/alice/models/mine'" in script_of(run)


# -- a model in a GGUF file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_the_script_of_a_gguf_file_fails_where_the_run_did(
    named: str, family: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", family, edit=plants.down_proj_output)
    batch = [PromptSpec(name="two", batch=[LONG, SHORT])]
    run = explained(path if named == "file" else tmp_path, batch, dtypes=["fp16"], explain=False)
    assert ran(script_of(run), capsys, monkeypatch) == (False, module_of(run))


def test_the_script_of_a_sound_gguf_file_passes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_probe(write_gguf(tmp_path / "tiny.gguf"), [TEXTS[0]], dtypes=["bf16"])
    assert ran(script_of(run), capsys, monkeypatch)[0]


@pytest.mark.parametrize(
    ("source", "revision", "model"),
    [
        ("owner/name/BF16/x-00002-of-00002.gguf", "ab" * 20, ("owner/name", "BF16/x-00001-of-00002.gguf")),
        ("owner/name", "ab" * 20, ("owner/name", "x-00001-of-00002.gguf")),
        ("deep/down/in/x-00001-of-00002.gguf", None, ("deep/down/in/", "x-00001-of-00002.gguf")),
        ("x-00001-of-00002.gguf", None, (".", "x-00001-of-00002.gguf")),
    ],
)
def test_the_script_names_a_gguf_file_as_transformers_asks_for_it(
    source: str, revision: str | None, model: tuple[str, str]
) -> None:
    files = [{"name": f"x-0000{n}-of-00002.gguf", "bytes": 1, "sha256": None} for n in (1, 2)]
    run = overflowing_run()
    told = run.model.model_dump() | {"source": source, "revision": revision, "files": files}
    script = script_of(run.model_copy(update={"model": type(run.model).model_validate(told)}))
    assert f"else {model[0]!r}\n" in script and f"gguf_file={model[1]!r}" in script
    assert (f"revision={revision!r}" in script) == (revision is not None)


def test_no_script_reads_one_tensor_of_a_gguf_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan

    path = write_gguf(tmp_path / "tiny.gguf", kind=Kind.F16, edit=poisoned)
    run = run_probe(path, [TEXTS[0]], dtypes=["fp16"])
    assert first_error(run).kind == "weight-nonfinite"
    assert ran(script_of(run), capsys, monkeypatch) == (False, "model.layers.1.mlp.down_proj")
