"""The command line through `main`: exit codes, one sentence a mistake, results on stdout alone, no half files."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_precision.cli.app import main
from qwen_precision.model import open_checkpoint
from qwen_precision.record.run import SCHEMA
from support.checkpoints import ROOT, edit_json, make_checkpoint
from support.runs import sentence

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("scratch")


def test_the_demo_fails_in_fp16_and_the_table_names_the_planted_layer_and_operation(capsys: Capture) -> None:
    assert main(["probe", "demo", "--dtype", "fp16"]) == 1
    out, err = capsys.readouterr()
    assert "Starts    layer 3, down_proj output" in out and "qprec report qprec-run.json" in out
    assert "saved qprec-run.json" in err
    assert json.loads(Path("qprec-run.json").read_text())["schema"] == SCHEMA


def test_report_shows_the_same_table_again_from_the_saved_run(capsys: Capture) -> None:
    assert main(["probe", "demo", "-o", "run.json", "--full"]) == 1
    first = capsys.readouterr().out
    assert main(["report", "run.json"]) == 1
    assert capsys.readouterr().out == first


def test_a_healthy_dtype_gives_exit_code_0(capsys: Capture) -> None:
    assert main(["probe", "demo", "--dtype", "bf16", "--prompt", "Hello"]) == 0
    out = capsys.readouterr().out
    assert "bf16      OK" in out and "fp16" not in out


@pytest.mark.parametrize(("level", "code"), [("fail", 1), ("risk", 1), ("never", 0)])
def test_fail_on_decides_the_exit_code(level: str, code: int, capsys: Capture) -> None:
    assert main(["probe", "demo", "--dtype", "fp16", "--prompt", "Hello", "--fail-on", level]) == code
    assert main(["report", "qprec-run.json", "--fail-on", level]) == code


def test_the_report_as_json_has_the_promised_keys(capsys: Capture) -> None:
    main(["probe", "demo"])
    capsys.readouterr()
    assert main(["report", "qprec-run.json", "--format", "json"]) == 1
    data = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"bare {word}"))
    assert data["schema"] == 1 and data["exit_code"] == 1
    assert data["verdict"] == {"fp16": "fail", "bf16": "ok", "fp32": "ok"}
    first = data["findings"][0]
    promised = (
        "kind severity dtype prompt layer module op name origin reference_abs_max headroom nan inf propagated "
        "token channel cause advice"
    )
    assert set(promised.split()) <= set(first)
    assert (first["kind"], first["layer"], first["module"]) == ("overflow", 3, "model.layers.3.mlp.down_proj")
    assert first["token"]["position"] == 1 and first["channel"] == 42 and first["head"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["probe", "demo", "--dtype", "fp8"], ["--dtype", "fp8", "fp16, bf16, fp32"]),
        (["probe", "demo", "--attn", "flash"], ["--attn", "sdpa, eager"]),
        (["probe", "demo", "--memory", "disk"], ["--memory", "auto, resident, streamed"]),
        (["probe", "demo", "--fail-on", "x"], ["--fail-on", "fail, risk, never"]),
        (["probe", "demo", "--max-tokens", "0"], ["--max-tokens"]),
        (["report", "x.json", "--format", "pdf"], ["--format", "table, markdown"]),
        (["probe"], ["MODEL"]),
        (["nonsense"], ["nonsense"]),
        (["probe", "demo", "--nonsense"], ["--nonsense"]),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(
    arguments: list[str], words: list[str], capsys: Capture
) -> None:
    assert main(arguments) == 2
    line = sentence(capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "--prompt", ""], 2, ["--prompt", "empty"]),
        (["demo", "--prompt", "a", "--prompts", "b"], 2, ["--prompt", "--prompts"]),
        (["demo", "--prompts", "nowhere.yaml"], 2, ["--prompts", "nowhere.yaml"]),
        (["demo", "--device", "tpu"], 2, ["--device tpu", "cuda"]),
        (["demo", "--device", "cuda:x"], 2, ["--device cuda:x"]),
        (["demo", "--config", "nowhere"], 2, ["--config nowhere", "ci, default"]),
        (["demo", "--prompt", "word " * 600], 2, ["512", "--max-tokens"]),
        (["demo", "-o", "nowhere/run.json"], 3, ["-o nowhere/run.json", "nowhere"]),
        (["./nowhere"], 3, ["./nowhere", "no such folder"]),
        (["/nowhere/at/all"], 3, ["/nowhere/at/all", "no such folder"]),
        (["justaword"], 3, ["justaword", "owner/name"]),
    ],
)
def test_a_request_that_cannot_be_met_gets_one_sentence(
    arguments: list[str], code: int, words: list[str], capsys: Capture
) -> None:
    assert main(["probe", *arguments]) == code
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert not list(Path().glob("*.json")) and not list(Path().glob(".*json*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_device_that_is_not_there_is_named(capsys: Capture) -> None:
    assert main(["probe", "demo", "--device", "cuda"]) == 3
    assert "--device cuda" in sentence(capsys)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def _no_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["BertModel"])


def _remote_code(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"}, model_type="evil")


def _unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="nonesuch")


def _quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "hqq"})


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickle(folder: Path) -> None:
    _no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage " * 100)


def _missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _wrong_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=128)


def _integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _wrong_tokenizer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:40].clone()
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", vocab_size=40, eos_token_id=None, pad_token_id=None)


def _shards(folder: Path) -> Path:
    shutil.rmtree(folder)
    make_checkpoint(folder, shard="100KB")
    return folder / "model.safetensors.index.json"


def _missing_shard(folder: Path) -> None:
    _shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _truncated_shard(folder: Path) -> None:
    _shards(folder)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def _index_names_what_is_not_there(folder: Path) -> None:
    index = _shards(folder)
    data = json.loads(index.read_text())
    data["weight_map"]["model.ghost.weight"] = sorted(set(data["weight_map"].values()))[0]
    index.write_text(json.dumps(data))


def _index_leaves_the_folder(folder: Path) -> None:
    index = _shards(folder)
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    index.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_config, ["config.json", "missing"]),
        (_config_not_json, ["config.json", "not readable JSON"]),
        (_no_architecture, ["config.json", "BertModel", "no qwen3 model"]),
        (_remote_code, ["config.json", "'evil'", "does not run", "trust_remote_code"]),
        (_unknown_type, ["config.json", "nonesuch"]),
        (_quantised, ["config.json", "quantised by 'hqq'", "made from"]),
        (_no_weights, ["no weights", "model.safetensors"]),
        (_only_pickle, ["pytorch_model.bin", "pickle", "safetensors"]),
        (_truncated, ["model.safetensors", "truncated"]),
        (_empty_weights, ["model.safetensors", "truncated or not"]),
        (_garbage_weights, ["model.safetensors", "truncated or not"]),
        (_missing_tensor, ["model.layers.2.mlp.up_proj.weight"]),
        (_wrong_shape, ["shape", "config.json"]),
        (_integers, ["model.norm.weight", "I32"]),
        (_no_tokenizer, ["tokenizer"]),
        (_missing_shard, ["model-00002", "missing"]),
        (_truncated_shard, ["model-00002", "truncated"]),
        (_index_names_what_is_not_there, ["index.json", "model.ghost.weight"]),
        (_index_leaves_the_folder, ["index.json", "../../etc/passwd", "refused"]),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_") or None,
)
def test_a_broken_checkpoint_gets_one_sentence_and_exit_code_3(
    damage: Callable[[Path], None], words: list[str], broken: Path, capsys: Capture
) -> None:
    damage(broken)
    assert main(["probe", "./model", "-o", "run.json"]) == 3
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert not Path("run.json").exists()


def test_a_tokenizer_that_does_not_fit_the_embedding_is_named(broken: Path, capsys: Capture) -> None:
    _wrong_tokenizer(broken)
    assert main(["probe", "./model", "-o", "run.json"]) == 2
    assert "tokenizer and weights do not belong together" in sentence(capsys)


def test_sharded_equals_single_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "many", shard="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        assert main(["probe", f"./{name}", "-o", f"{name}.json", "--memory", "streamed"]) == 0
    one, many = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "many"))
    assert one["passes"] == many["passes"]


def test_a_checkpoint_saved_from_the_bare_model_is_probed_without_its_head(broken: Path, capsys: Capture) -> None:
    """Embedding models come so: no "model." in front of the names, no lm_head."""
    tensors = load_file(broken / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(bare, broken / "model.safetensors")
    assert main(["probe", "./model", "-o", "run.json"]) == 1
    assert "lm_head not run" in capsys.readouterr().out
    assert main(["probe", "./model", "-o", "run.json", "--memory", "streamed"]) == 1


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize("verb", ["probe", "generate"])
def test_a_dependency_that_is_not_installed_is_named_with_how_to_install_it(verb: str, missing: str) -> None:
    """In a process of its own: here torch is imported long since."""
    hide = f"import sys; sys.modules[{missing!r}] = None"
    code = f"{hide}; from qwen_precision.cli import main; sys.exit(main(sys.argv[1:]))"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, verb, "demo", "--prompt", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, env=path)
    assert done.returncode == 3 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"needs {missing}" in done.stderr and f"pip install {missing}" in done.stderr and "bug" not in done.stderr


def test_ctrl_c_saves_what_was_read_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from qwen_precision.probe.shadow import Shadow

    original = Shadow._layer

    def interrupted(self: Shadow, index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt
        original(self, index)

    monkeypatch.setattr(Shadow, "_layer", interrupted)
    assert main(["probe", "demo", "-o", "run.json"]) == 3
    out = capsys.readouterr().out
    assert "Stopped   interrupted" in out and "INCOMPLETE" in out
    data = json.loads(Path("run.json").read_text())
    assert data["stopped"] == "interrupted"
    assert {site["layer"] for site in data["sites"]} == {None, 0, 1}
    assert main(["report", "run.json"]) == 3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_saves_what_was_read_and_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from qwen_precision.probe.shadow import Shadow

    original = Shadow._layer

    def exhausted(self: Shadow, index: int) -> None:
        if index == 5:
            raise error
        original(self, index)

    monkeypatch.setattr(Shadow, "_layer", exhausted)
    assert main(["probe", "demo", "-o", "run.json"]) == 1  # layer 3 was reached: the failure is known
    assert "--memory streamed" in capsys.readouterr().out


def test_a_shard_that_breaks_half_way_leaves_what_was_read(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tensors = open_checkpoint(broken, "model").tensors
    bad = {info.start for name, info in tensors.items() if "layers.2." in name}
    original = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if start in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", failing)
    assert main(["probe", "./model", "-o", "run.json"]) == 3
    assert "Input/output error" in capsys.readouterr().out
    assert json.loads(Path("run.json").read_text())["stopped"]


def test_stdout_holds_only_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "demo", "-o", "run.json"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("qprec probe demo") and "saved" not in out
    lines = [line for line in err.splitlines() if line.strip()]  # no progress bar off a terminal
    assert [line.split()[0] for line in lines] == ["telling", "saved"]


def test_no_reference_measures_the_dtype_alone(capsys: Capture) -> None:
    assert main(["probe", "demo", "--dtype", "fp16", "--no-reference"]) == 1
    out = capsys.readouterr().out
    assert "layer 3, down_proj output" in out and "fp32 does not tell how far" in out
    data = json.loads(Path("qprec-run.json").read_text())
    assert {each["dtype"] for each in data["passes"]} == {"fp16"}


def test_a_profile_is_found_by_name_and_flags_win_over_it(capsys: Capture) -> None:
    assert main(["probe", "demo", "--config", "ci", "--prompt", "Hello", "--fail-on", "never"]) == 0
    data = json.loads(Path("qprec-run.json").read_text())
    assert data["settings"]["dtypes"] == ["fp16"] and data["settings"]["near_overflow"] == 4.0
    assert data["settings"]["fail_on"] == "never"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtype: fp16", ["'dtype'", "'dtypes'"]),
        ("zzz: 1", ["'zzz'", "known"]),
        ("memory: disk", ["memory", "disk", "streamed"]),
        ("near_overflow: many", ["near_overflow"]),
        ("- a list", ["keys and values"]),
        ("a: [", ["not valid YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_a_wrong_profile_names_the_key_and_the_nearest(text: str, words: list[str], capsys: Capture) -> None:
    Path("profile.yaml").write_text(text)
    assert main(["probe", "demo", "--config", "profile.yaml"]) == 2
    line = sentence(capsys)
    assert "--config profile.yaml" in line and all(word in line for word in words), line


def test_prompts_come_from_yaml_or_one_a_line(capsys: Capture) -> None:
    Path("prompts.yaml").write_text("- Hello\n- {name: two, batch: [a, b c]}\n- {chat: Hi}\n")
    assert main(["probe", "demo", "--dtype", "bf16", "--prompts", "prompts.yaml"]) == 0
    names = [prompt["name"] for prompt in json.loads(Path("qprec-run.json").read_text())["prompts"]]
    assert names == ["prompt 1", "two", "prompt 3"]
    Path("prompts.txt").write_text("Hello\n\nThe second [red] one\n")
    assert main(["probe", "demo", "--dtype", "bf16", "--prompts", "prompts.txt"]) == 0
    rows = [prompt["rows"][0]["text"] for prompt in json.loads(Path("qprec-run.json").read_text())["prompts"]]
    assert rows == ["Hello", "The second [red] one"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- {name: x}", "exactly one"),
        ("- {name: x, text: ''}", "empty"),
        ("- {name: x, text: a, batch: [b]}", "exactly one"),
        ("- {name: x, batch: []}", "empty"),
        ("- {name: x, txt: a}", "txt"),
        ("- {name: x, text: 7}", "text"),
        ("- {name: x, text: a}\n- {name: x, text: b}", "'x'"),
        ("just text", "list"),
        ("[]", "list"),
    ],
)
def test_a_wrong_prompt_file_names_the_prompt(text: str, word: str, capsys: Capture) -> None:
    Path("prompts.yaml").write_text(text)
    assert main(["probe", "demo", "--prompts", "prompts.yaml"]) == 2
    line = sentence(capsys)
    assert "prompts.yaml" in line and word in line


def test_the_built_in_prompts_hold_what_fails_in_the_field(demo_run) -> None:
    texts = [row.text for prompt in demo_run.prompts for row in prompt.rows]
    assert "上海有个非常出名的地方，" in texts and "importance of" in texts
    assert any(len(prompt.rows) > 1 and any(row.padding for row in prompt.rows) for prompt in demo_run.prompts)
    assert any(len(prompt.rows[0].ids) == 1 for prompt in demo_run.prompts)
    chat = next(prompt for prompt in demo_run.prompts if prompt.name == "chat")
    assert "<|im_start|>" in chat.rows[0].tokens


def test_without_a_chat_template_the_chat_prompt_is_left_out_and_that_is_said(broken: Path, capsys: Capture) -> None:
    (broken / "chat_template.jinja").unlink()
    edit_json(broken / "tokenizer_config.json", chat_template=None)
    assert main(["probe", "./model", "--dtype", "bf16"]) == 0
    assert "prompts left out chat" in capsys.readouterr().out


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_and_report_never_import_torch(demo_run, tmp_path: Path) -> None:
    from qwen_precision.record.file import save

    save(demo_run, tmp_path / "run.json")
    for arguments in (["--help"], ["probe", "--help"], ["report", "--help"], ["report", str(tmp_path / "run.json")]):
        code = f"import sys; from qwen_precision.cli import main; main({arguments!r}); print('torch' in sys.modules)"
        assert run_python(code).splitlines()[-1] == "False"


def test_the_version_is_shown(capsys: Capture) -> None:
    from qwen_precision import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qprec {__version__}\n"


def test_an_output_that_is_an_input_is_refused_and_the_input_stays(broken: Path, demo_run, capsys: Capture) -> None:
    from qwen_precision.record.file import save

    save(demo_run, Path("run.json"))
    Path("prompts.txt").write_text("Hello\n")
    for arguments, kept in [
        (["probe", "./model", "-o", "model/model.safetensors"], broken / "model.safetensors"),
        (["probe", "./model", "-o", "model/new.json"], broken / "config.json"),
        (["probe", "demo", "--prompts", "prompts.txt", "-o", "prompts.txt"], Path("prompts.txt")),
        (["report", "run.json", "-o", "run.json"], Path("run.json")),
    ]:
        before = kept.read_bytes()
        assert main(arguments) == 3
        assert "would write over" in sentence(capsys)
        assert kept.read_bytes() == before
    assert not (broken / "new.json").exists()


def test_an_output_that_is_a_link_is_followed_and_a_pipe_is_never_replaced(demo_run, capsys: Capture) -> None:
    import threading

    from qwen_precision.record.file import save

    save(demo_run, Path("run.json"))
    Path("link").symlink_to("target.txt")
    assert main(["report", "run.json", "-o", "link"]) == 1
    assert Path("link").is_symlink() and "FAIL" in Path("target.txt").read_text()
    os.mkfifo("pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_text()))
    reader.start()
    assert main(["report", "run.json", "-o", "pipe"]) == 1
    reader.join(10)
    assert Path("pipe").is_fifo() and "FAIL" in got[0]


@pytest.mark.parametrize("template", ["{{ raise_exception('only system turns') }}", "{% if %}"])
def test_a_chat_template_that_fails_leaves_the_chat_prompt_out_or_is_one_sentence(
    template: str, broken: Path, capsys: Capture
) -> None:
    (broken / "chat_template.jinja").write_text(template)
    assert main(["probe", "./model", "--dtype", "fp16", "--no-explain", "--full"]) == 1
    assert "the checkpoint's chat template fails" in " ".join(capsys.readouterr().out.split())
    Path("chat.yaml").write_text("- {name: a turn, chat: Hello}\n")
    assert main(["probe", "./model", "--prompts", "chat.yaml"]) == 3
    line = sentence(capsys)
    assert "only chat prompts" in line and "chat template fails" in line and "--prompts" in line


def test_a_crash_is_not_taken_for_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def crash(*args: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("qwen_precision.diagnose.run.judge", crash)
    assert main(["probe", "demo", "--dtype", "bf16", "--prompt", "Hello"]) == 3
    err = capsys.readouterr().err
    assert "boom" in err and "bug in qprec" in err


def test_a_single_file_beside_an_index_is_what_is_probed_as_in_transformers(tmp_path: Path, capsys: Capture) -> None:
    make_checkpoint(tmp_path / "old", shard="100KB")
    make_checkpoint(tmp_path / "new", num_hidden_layers=3, edit=lambda model: model.model.norm.weight.mul_(2.0))
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    for name in ("old", "new"):
        assert main(["probe", f"./{name}", "--dtype", "bf16", "-o", f"{name}.json"]) == 0
    old, new = (json.loads(Path(f"{name}.json").read_text())["passes"] for name in ("old", "new"))
    assert old == new


def test_tensors_that_the_config_does_not_ask_for_are_told(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    assert main(["probe", "./model"]) == 1
    assert "tensors not used model.layers.5" in capsys.readouterr().out


def test_a_revision_of_a_folder_is_refused(capsys: Capture) -> None:
    Path("model").mkdir()
    assert main(["probe", "./model", "--revision", "main"]) == 2
    assert "--revision main" in sentence(capsys)


def test_no_reference_leaves_fp32_out_unless_it_is_asked_for(capsys: Capture) -> None:
    assert main(["probe", "demo", "--no-reference", "--prompt", "Hello"]) == 1
    data = json.loads(Path("qprec-run.json").read_text())
    assert {each["dtype"] for each in data["passes"]} == {"fp16", "bf16"} and data["reference"] is False
    assert main(["probe", "demo", "--no-reference", "--dtype", "fp32", "--dtype", "fp16", "--prompt", "Hello"]) == 1
    assert json.loads(Path("qprec-run.json").read_text())["reference"] is True


def test_a_terminal_without_unicode_still_gets_the_table(demo_run, tmp_path: Path) -> None:
    from qwen_precision.record.file import save

    save(demo_run, tmp_path / "run.json")
    done = subprocess.run(
        [sys.executable, "-m", "qwen_precision", "report", str(tmp_path / "run.json")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "down_proj output" in done.stdout and done.stderr == ""


def test_an_interrupt_before_anything_was_read_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_precision.probe.run.locate", stop)
    assert main(["probe", "demo"]) == 3
    assert "interrupted" in sentence(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "-1"], ["--budget"]),
        (["--budget", "3", "--no-explain"], ["--budget", "--no-explain"]),
        (["--sweep", "all"], ["all", "first-token"]),
        (["--sweep-limit", "3"], ["--sweep-limit", "--sweep first-token"]),
        (["--sweep-texts", "x.txt", "--sweep", "length"], ["--sweep-texts", "--sweep first-token"]),
        (["--sweep", "first-token", "--sweep-texts", "missing.txt"], ["missing.txt", "a text a line"]),
        (["--rescue-margin", "0.5"], ["--rescue-margin"]),
        (["--rescue-dtype", "bf16"], ["--rescue-dtype", "--rescue-to"]),
        (["--rescue-to", "out", "--rescue-dtype", "fp8"], ["fp8", "source"]),
        (["--rescue-to", "out", "--dtype", "bf16"], ["--rescue-to", "--dtype fp16"]),
        (["--rescue-to", "out", "--no-reference"], ["--rescue-to", "--no-reference"]),
        (["--rescue-to", "qprec-run.json"], ["-o", "--rescue-to"]),
        (["--keep-unverified"], ["--keep-unverified", "--rescue-to"]),
    ],
)
def test_a_wrong_wish_for_causes_or_a_rescue_gets_one_sentence(
    options: list[str], words: list[str], capsys: Capture
) -> None:
    assert main(["probe", "demo", *options]) == 2
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert not list(Path().iterdir())


@pytest.mark.parametrize("option", ["-o", "--rescue-to"])
def test_a_name_that_is_too_long_for_the_disk_is_told_before_the_work(option: str, capsys: Capture) -> None:
    assert main(["probe", "demo", option, "x" * 300]) == 3
    assert "too long" in sentence(capsys)
    assert main(["probe", "demo", "--prompt", "a", "-o", "y" * 250, "--fail-on", "never"]) == 0


def test_an_interrupt_after_the_run_was_saved_says_where_it_is(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_precision.cli import terminal

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "render", interrupted)
    assert main(["probe", "demo", "--prompt", "a", "-o", "kept.json"]) == 3
    assert "the run is in kept.json" in capsys.readouterr().err and Path("kept.json").is_file()


def test_with_a_rescue_the_exit_code_is_that_of_what_was_exported(capsys: Capture) -> None:
    assert main(["probe", "demo", "--rescue-to", "safe"]) == 0
    assert Path("safe/qprec-rescue.json").is_file()
    assert main(["probe", "safe", "-o", "again.json"]) == 0
    assert main(["probe", "safe", "-o", "again.json", "--rescue-to", "twice"]) == 0
    assert (
        "no rescaled checkpoint was written: nothing to rescue in fp16" in capsys.readouterr().err
        and not Path("twice").exists()
    )
    assert main(["report", "qprec-run.json"]) == 0
