"""What qprec does not read is called what it is, with what to do; what it can read is not refused for what is near."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.cli.app import main
from support.checkpoints import edit_json
from support.quantise import rewrite
from support.runs import sentence

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("scratch")


def _instead(*names: str, config: bool = True) -> Callable[[Path], None]:
    """These files in place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if not config:
            (folder / "config.json").unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")

    return change


def _adapter(folder: Path) -> None:
    _instead("adapter_model.safetensors", config=False)(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B"}))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize("verb", ["probe", "generate"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_adapter, ["adapter (LoRA) for Qwen/Qwen3-8B", "python -c", "merge_and_unload", "probe model-merged"]),
        (_instead("adapter_config.json"), ["adapter (LoRA)", "names no base", "peft"]),
        (_instead("model.onnx", config=False), ["ONNX", "made from"]),
        (_instead("onnx/model.onnx"), ["ONNX", "made from"]),
        (_config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}), ["ModelOpt", "made from"]),
        (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), ["ModelOpt", "compressed-tensors"]),
        (
            _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ["bitsandbytes (4-bit)", "made from", "dequantize()"],
        ),
        (
            _config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            ["bitsandbytes (8-bit)"],
        ),
        (_config(quantization={"group_size": 64, "bits": 4}), ["MLX", "--dequantize"]),
        (
            _instead("modules.json", "0_Transformer/config.json", config=False),
            ["sentence-transf", "model/0_Transformer"],
        ),
        (_instead("pytorch_model.bin"), ["pytorch_model.bin", "pickle", "safetensors"]),
    ],
)
def test_a_folder_that_is_not_read_is_called_what_it_is(
    verb: str, change: Callable[[Path], None], words: list[str], broken: Path, capsys: Capture
) -> None:
    change(broken)
    assert main([verb, "./model", "--prompt", "Hello", "-o", "run.json"]) == 3
    line = sentence(capsys)
    assert all(word in line for word in words), line
    assert "download it again" not in line and "right folder" not in line


def test_the_command_that_merges_an_adapter_is_python_and_survives_odd_names(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "it's my adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/it's"}))
    assert main(["probe", str(folder)]) == 3
    command = shlex.split(sentence(capsys).split("probe it's my adapter-merged: ")[1].removesuffix("."))
    assert command[:2] == ["python", "-c"]
    compile(command[2], "command", "exec")
    assert repr(str(folder)) in command[2] and repr("owner/it's") in command[2]


def test_the_command_opens_an_adapter_as_what_it_is_and_with_its_own_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    told = {"base_model_name_or_path": "owner/base", "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    (folder / "tokenizer_config.json").write_text("{}")
    assert main(["probe", str(folder)]) == 3
    line = sentence(capsys)
    assert "AutoPeftModelForSequenceClassification" in line and "owner/base" in line
    assert f"T.from_pretrained({str(folder)!r})" in shlex.split(line.split("adapter-merged: ")[1])[2]
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    assert main(["probe", str(folder)]) == 3
    line = sentence(capsys)
    assert "names no base" in line and "None" not in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.onnx", ["ONNX"]),
        ("a.bin", ["pickle"]),
        ("a.txt", ["the checkpoint's folder"]),
    ],
)
def test_a_file_in_place_of_a_folder_is_called_what_it_is(
    name: str, words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / name).write_text("")
    assert main(["probe", f"./{name}"]) == 3
    line = sentence(capsys)
    assert name in line and all(word in line for word in words)


def test_an_adapter_beside_a_whole_model_is_said_not_to_be_applied(broken: Path, capsys: Capture) -> None:
    (broken / "adapter_config.json").write_text("{}")
    for command in (["probe", "--dtype", "bf16"], ["generate", "--dtype", "bf16", "--max-new-tokens", "2"]):
        assert main([command[0], "./model", "--prompt", "Hello", *command[1:]]) == 0
        assert "adapter not applied (adapter_config.json is there" in " ".join(capsys.readouterr().out.split())


def test_what_follows_a_model_of_sentence_transformers_is_said_not_to_be_run(broken: Path, capsys: Capture) -> None:
    (broken / "modules.json").write_text("[]")
    assert main(["probe", "./model", "--prompt", "Hello", "--dtype", "bf16"]) == 0
    assert "pooling not run (modules.json is sentence-transformers'" in " ".join(capsys.readouterr().out.split())


def test_code_of_a_model_that_transformers_knows_is_not_run_and_not_needed(broken: Path, capsys: Capture) -> None:
    edit_json(broken / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (broken / "modeling_evil.py").write_text("raise SystemExit('ran')")
    for command in (["probe", "--dtype", "bf16"], ["generate", "--dtype", "bf16", "--max-new-tokens", "2"]):
        assert main([command[0], "./model", "--prompt", "Hello", *command[1:]]) == 0
        assert "code transformers' own (config.json points at code" in " ".join(capsys.readouterr().out.split())


def test_a_tensor_that_no_parameter_is_made_of_may_be_anything(broken: Path, capsys: Capture) -> None:
    extra = {"model.position_ids": torch.arange(8), "model.layers.0.mask": torch.ones(2, dtype=torch.bool)}
    rewrite(broken, lambda tensors: tensors.update(extra))
    assert main(["probe", "./model", "--prompt", "Hello", "--dtype", "bf16"]) == 0
    assert "tensors not used model." in " ".join(capsys.readouterr().out.split())
    assert main(["generate", "./model", "--prompt", "Hello", "--dtype", "bf16", "--max-new-tokens", "2"]) == 0


@pytest.mark.transformers
@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")])
@pytest.mark.parametrize("verb", ["probe", "generate"])
def test_a_parameter_of_no_float_format_is_named(
    verb: str, dtype: torch.dtype, name: str, broken: Path, capsys: Capture
) -> None:
    rewrite(broken, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(dtype)}))
    assert main([verb, "./model", "--prompt", "Hello"]) == 3
    line = sentence(capsys)
    assert "model.norm.weight" in line and name in line and "quantised" in line


def test_generate_says_of_a_bare_model_what_probe_says_of_it(broken: Path, capsys: Capture) -> None:
    rewrite(broken, lambda tensors: tensors.pop("lm_head.weight"))
    assert main(["probe", "./model", "--prompt", "Hello", "--dtype", "bf16"]) == 0
    assert "lm_head not run" in capsys.readouterr().out
    assert main(["generate", "./model", "--prompt", "Hello"]) == 3
    line = sentence(capsys)
    assert "no lm_head" in line and "qprec probe" in line and "incomplete" not in line
