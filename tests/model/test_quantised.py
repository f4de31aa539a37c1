"""A quantised checkpoint is probed as the numbers it stands for: equal, bit for bit, to a folder that holds those."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_precision.cli.app import main
from qwen_precision.model import unpack
from qwen_precision.model.folder import open_checkpoint
from qwen_precision.model.weights import read_tensor
from support.checkpoints import edit_json
from support.families import make_family
from support.quantise import EXPERTS, MXFP4, SCHEMES, Parts, gptq, group_of, quantised, rewrite, settings_of
from support.runs import run_probe, sentence

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("scratch")

TEXTS = ["Hello there", "上海有个非常出名的地方，"]


def column(folder: Path, **settings: Any) -> Any:
    return [each.model_dump() for each in run_probe(folder, TEXTS, **settings).passes]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_is_the_number_its_parts_stand_for(name: str, healthy: Path, tmp_path: Path) -> None:
    folder, twin = (open_checkpoint(each, "x") for each in quantised(healthy, tmp_path / "q", SCHEMES[name]))
    assert folder.tensors.keys() == twin.tensors.keys() and folder.parameters == twin.parameters
    assert folder.quantised.startswith(SCHEMES[name].says)
    for tensor in twin.tensors:
        ours, theirs = read_tensor(folder, tensor), read_tensor(twin, tensor)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), tensor
    assert sum(info.packed is not None for info in folder.tensors.values()) == 2 * 7 + 3


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["fp8 blocks", "ct nvfp4", "ct mxfp4", "gptq sorted", "awq", "ct int4 zeros"])
def test_a_probe_equals_that_of_the_folder_with_the_same_numbers(
    name: str, memory: str, healthy: Path, tmp_path: Path
) -> None:
    folder, twin = quantised(healthy, tmp_path / "q", SCHEMES[name])
    assert column(folder, memory=memory) == column(twin, memory=memory)
    assert column(folder) != column(healthy)


@pytest.mark.transformers
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["fp8 blocks", "ct int4"])
def test_experts_that_files_keep_one_by_one_are_dequantised_and_put_together(
    name: str, memory: str, healthy_moe: Path, tmp_path: Path
) -> None:
    folder, twin = quantised(healthy_moe, tmp_path / "q", SCHEMES[name])
    assert column(folder, memory=memory) == column(twin, memory=memory)


@pytest.fixture
def gpt_oss(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny one as it is published, and its twin with the same numbers."""
    return quantised(make_family(tmp_path / "plain", "gpt_oss").folder, tmp_path / "q", MXFP4, EXPERTS)


@pytest.mark.transformers
def test_experts_that_files_keep_in_one_tensor_are_the_numbers_their_parts_stand_for(
    gpt_oss: tuple[Path, Path],
) -> None:
    folder, twin = (open_checkpoint(each, "x") for each in gpt_oss)
    assert folder.tensors.keys() == twin.tensors.keys() and folder.parameters == twin.parameters
    assert folder.quantised is not None and folder.quantised.startswith(MXFP4.says)
    for tensor in twin.tensors:
        ours, theirs = read_tensor(folder, tensor), read_tensor(twin, tensor)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), tensor
        assert ours.shape == folder.tensors[tensor].shape
    assert sum(info.packed is not None for info in folder.tensors.values()) == 2 * 4


@pytest.mark.transformers
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_probe_of_gpt_oss_equals_that_of_the_folder_with_the_same_numbers(
    memory: str, gpt_oss: tuple[Path, Path]
) -> None:
    folder, twin = gpt_oss
    assert column(folder, memory=memory) == column(twin, memory=memory)
    assert column(folder) != column(folder.with_name("plain"))


@pytest.mark.transformers
def test_generate_of_gpt_oss_gives_the_tokens_of_the_folder_with_the_same_numbers(
    gpt_oss: tuple[Path, Path], capsys: Capture
) -> None:
    printed = []
    for folder in gpt_oss:
        arguments = ["--dtype", "bf16", "--prompt", "Hello", "--max-new-tokens", "8", "--text", "-o", "gen.json"]
        assert main(["generate", str(folder), *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].strip()


def test_a_zero_point_is_a_number_where_a_scale_of_a_byte_is_an_exponent() -> None:
    zero = torch.tensor([[3]], dtype=torch.uint8)
    pieces = {"weight": torch.tensor([[5, -7]], dtype=torch.int8), "scale": torch.tensor([[0.5]]), "zero": zero}
    assert unpack.plain(pieces, None).tolist() == [[1.0, -5.0]]
    pieces = {"weight": torch.tensor([[5, -7]], dtype=torch.int8), "scale": torch.tensor([[128]], dtype=torch.uint8)}
    assert unpack.plain(pieces, None).tolist() == [[10.0, -14.0]]


def test_a_quantised_lm_head_is_sliced_like_a_plain_one(healthy: Path, tmp_path: Path) -> None:
    folder, twin = quantised(healthy, tmp_path / "q", SCHEMES["fp8 blocks"])
    parts, value = SCHEMES["fp8 blocks"].make(read_tensor(open_checkpoint(twin, "x"), "lm_head.weight").float().numpy())
    rewrite(folder, lambda tensors: tensors.update({f"lm_head.{leaf}": part for leaf, part in parts.items()}))
    rewrite(twin, lambda tensors: tensors.update({"lm_head.weight": torch.from_numpy(value)}))
    for memory in ("resident", "streamed"):
        assert column(folder, memory=memory) == column(twin, memory=memory)


def test_the_report_says_that_weights_were_dequantised_and_activations_are_not_imitated(
    healthy: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES["fp8 blocks"])
    assert main(["probe", str(folder), "--prompt", "Hello", "--dtype", "bf16", "--full"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "weights dequantised from FP8 (16 x 32 blocks)" in out and "are not imitated" in out
    assert "parameters in FP8" in out
    model = json.loads(Path("qprec-run.json").read_text())["model"]
    plain = open_checkpoint(healthy, "x")
    assert model["parameters"] == plain.parameters and model["weight_bytes"] < plain.weight_bytes


def test_an_overflow_in_a_quantised_model_is_named_as_in_a_plain_one(tmp_path: Path, demo_folder: Path) -> None:
    scheme = SCHEMES["fp8 blocks"]
    folder, twin = quantised(demo_folder, tmp_path / "q", scheme)
    ours, theirs = (
        [(each.dtype, event.site, event.position, event.channel) for each in run.passes for event in each.events]
        for run in (run_probe(folder, TEXTS), run_probe(twin, TEXTS))
    )
    assert ours == theirs and ours


@pytest.mark.transformers
def test_generate_gives_the_tokens_of_the_folder_with_the_same_numbers(
    demo_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    made = []
    for folder in quantised(demo_folder, tmp_path / "q", SCHEMES["gptq"]):
        arguments = ["--dtype", "bf16", "--prompt", "上海有个非常出名的地方，", "--max-new-tokens", "8"]
        assert main(["generate", str(folder), *arguments, "-o", "gen.json"]) == 0
        made.append(json.loads(Path("gen.json").read_text())["generation"]["rows"])
        capsys.readouterr()
    assert made[0] == made[1]


def test_a_first_token_sweep_runs_on_quantised_weights(healthy: Path, tmp_path: Path, capsys: Capture) -> None:
    swept = []
    for folder in quantised(healthy, tmp_path / "q", SCHEMES["ct nvfp4"]):
        arguments = ["--prompt", "Hello", "--dtype", "fp16", "--sweep", "first-token", "--sweep-limit", "64"]
        assert main(["probe", str(folder), *arguments]) == 0
        found = json.loads(Path("qprec-run.json").read_text())["sweep"]
        swept.append({key: value for key, value in found.items() if key != "seconds"})
        capsys.readouterr()
    assert swept[0] == swept[1]


def test_a_rescue_of_quantised_weights_is_refused_before_anything_runs(
    healthy: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES["fp8 blocks"])
    assert main(["probe", str(folder), "--rescue-to", "out"]) == 2
    line = sentence(capsys)
    assert "--rescue-to out" in line and "FP8 (16 x 32 blocks)" in line and "made from" in line
    assert not Path("out").exists() and not Path("qprec-run.json").exists()


def test_groups_of_compressed_tensors_are_told_apart_by_their_targets(healthy: Path, tmp_path: Path) -> None:
    """FP8 in one layer, int4 in all others: the pattern counts before the class."""
    scheme, other = SCHEMES["ct int4"], SCHEMES["ct fp8 channel"]
    folder, twin = quantised(healthy, tmp_path / "q", scheme)
    name = "model.layers.2.mlp.up_proj"
    parts, value = other.make(read_tensor(open_checkpoint(healthy, "x"), f"{name}.weight").float().numpy())

    def swap(tensors: Parts) -> None:
        for leaf in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{leaf}"]
        tensors.update({f"{name}.{leaf}": part for leaf, part in parts.items()})

    rewrite(folder, swap)
    rewrite(twin, lambda tensors: tensors.update({f"{name}.weight": torch.from_numpy(value.astype(np.float32))}))
    groups = {
        **{key: {**each, "format": "pack-quantized"} for key, each in scheme.config["config_groups"].items()},
        "group_1": {
            "targets": [r"re:model\.layers\.2\..*up_proj$"],
            "weights": other.config["config_groups"]["group_0"]["weights"],
            "format": "float-quantized",
        },
    }
    edit_json(folder / "config.json", quantization_config={**scheme.config, "config_groups": groups})
    assert column(folder) == column(twin)


def test_modules_that_gptq_gives_settings_of_their_own_are_read_by_those(healthy: Path, tmp_path: Path) -> None:
    """8 bits and groups of 16 in one layer's down_proj, 4 bits in all others."""
    folder, twin = quantised(healthy, tmp_path / "q", SCHEMES["gptq"])
    name = "model.layers.2.mlp.down_proj"
    parts, value = gptq(read_tensor(open_checkpoint(healthy, "x"), f"{name}.weight").float().numpy(), bits=8, group=16)
    rewrite(folder, lambda tensors: tensors.update({f"{name}.{leaf}": part for leaf, part in parts.items()}))
    rewrite(twin, lambda tensors: tensors.update({f"{name}.weight": torch.from_numpy(value)}))
    own = {"-:.*layers.1.self_attn": {}, r"+:.*layers\.2\..*down_proj": {"bits": 8, "group_size": 16}}
    edit_json(folder / "config.json", quantization_config={**settings_of(folder), "dynamic": own})
    assert column(folder) == column(twin)


# -- malformed --------------------------------------------------------


MATRIX = "model.layers.2.mlp.up_proj."
TOGETHER = "model.layers.2.mlp.experts.gate_up_proj"


def _without(leaf: str, of: str = MATRIX) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop(f"{of}{leaf}"))

    return damage


def _as(leaf: str, change: Callable[[torch.Tensor], torch.Tensor], of: str = MATRIX) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        name = f"{of}{leaf}"
        rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))

    return damage


def _saying(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / "config.json", quantization_config={**settings_of(folder), **changes})

    return damage


@pytest.mark.parametrize(
    ("scheme", "damage", "words"),
    [
        ("fp8 blocks", _without("weight_scale_inv"), ["up_proj.weight_scale_inv", "in none of its files"]),
        (
            "fp8 blocks",
            _as("weight_scale_inv", lambda t: t[:-1]),
            ["up_proj.weight", "has scale of shape [7, 2]", "[8, 2]"],
        ),
        ("fp8 blocks", _as("weight_scale_inv", lambda t: t.int()), ["weight_scale_inv", "I32", "no format of scales"]),
        ("fp8 blocks", _as("weight", lambda t: t[:, :32]), ["up_proj.weight", "scale of shape"]),
        ("fp8 blocks", _saying(quant_method="quark"), ["quark", "fp8", "probe the checkpoint"]),
        ("fp8 blocks", _saying(quant_method=None), ["unnamed method"]),
        ("fp8 blocks", _saying(weight_block_size=[128]), ["weight_block_size", "two positive numbers"]),
        ("gptq", _saying(bits=3), ["config.json", "bits 3", "2, 4, 8"]),
        ("gptq", _saying(bits=8), ["down_proj.qweight", "[2, 64] is expected"]),
        ("gptq", _saying(dynamic={"(": {"bits": 8}}), ["config.json", "'('", "no pattern"]),
        ("gptq", _saying(dynamic={r"(\w|.)+[0-9]$": {"bits": 8}}), ["config.json", "takes too long"]),
        ("gptq", _saying(dynamic={"a": 8}), ["config.json", "dynamic", "object"]),
        ("gptq", _saying(group_size=0), ["group_size 0"]),
        ("gptq", _saying(checkpoint_format="marlin"), ["checkpoint_format 'marlin'"]),
        ("gptq", _without("qzeros"), ["up_proj.qzeros", "in none"]),
        ("gptq", _as("g_idx", lambda t: t + 9), ["up_proj.qweight", "contradict", "groups"]),
        ("awq", _saying(version="gemv"), ["version 'gemv'"]),
        ("awq", _saying(bits=8), ["bits 8"]),
        ("ct int4", _saying(format="marlin-24"), ["marlin-24", "pack-quantized"]),
        ("ct int4", _saying(config_groups={}), ["config_groups"]),
        (
            "ct int4",
            _saying(config_groups={"a": {"targets": ["re:(.|.)+!?[0-9]$"]}}),
            ["config.json", "takes too long"],
        ),
        ("ct int4", _saying(transform_config={"config_groups": {"a": {}}}), ["transform_config"]),
        ("ct int4", _as("weight_shape", lambda t: t + 1), ["contradict", "[129, 65]"]),
        ("ct nvfp4", _without("weight_global_scale"), ["up_proj.weight_global_scale"]),
        ("ct mxfp4", _as("weight_scale", lambda t: t.int()), ["weight_scale", "I32", "no format of scales"]),
        ("ct mxfp4", _as("weight_scale", lambda t: t[:, :1]), ["up_proj.weight_packed", "scale of shape"]),
        (
            "ct mxfp8",
            _saying(**group_of("mxfp8-quantized", num_bits=8, group_size=32, symmetric=False)),
            ["zero points", "powers of two"],
        ),
        ("fp8 blocks", _saying(**group_of("pack-quantized", num_bits=4, group_size=32)), ["no tensor", "together"]),
    ],
)
def test_a_malformed_quantised_checkpoint_gets_one_sentence(
    scheme: str, damage: Callable[[Path], None], words: list[str], healthy: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = quantised(healthy, tmp_path / "q", SCHEMES[scheme])
    damage(folder)
    said = refused(folder, capsys)
    assert all(word in said for word in words), said


def refused(folder: Path, capsys: Capture) -> str:
    code = main(["probe", str(folder), "--prompt", "Hello"])
    captured = capsys.readouterr()
    said = " ".join((captured.err + captured.out).split())
    assert code == 3 and "Traceback" not in said, said
    return said


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("_scales", TOGETHER), ["gate_up_proj_scales", "in none of its files", "MXFP4"]),
        (_without("_blocks", TOGETHER), ["gate_up_proj_scales", "stored as U8", "no part of a quantised weight"]),
        (
            _as("_scales", lambda t: t[:, :-1], TOGETHER),
            ["gate_up_proj_blocks", "has scales of shape [8, 255, 2]", "[8, 256, 2] is expected"],
        ),
        (_as("_scales", lambda t: t.float(), TOGETHER), ["gate_up_proj_scales", "F32", "no format of scales"]),
        (_as("_scales", lambda t: t.view(torch.int8), TOGETHER), ["gate_up_proj_scales", "I8", "no format of scales"]),
        (_as("_blocks", lambda t: t[..., :8], TOGETHER), ["gate_up_proj_blocks", "[8, 256, 2, 8]", "16 bytes"]),
        (_as("_blocks", lambda t: t.flatten(2), TOGETHER), ["gate_up_proj_blocks", "[8, 256, 32]", "16 bytes"]),
        (_as("_blocks", lambda t: t[:0], TOGETHER), ["gate_up_proj_blocks", "[0, 256, 2, 16]", "16 bytes"]),
        (
            _as("_blocks", lambda t: t.view(torch.int8), TOGETHER),
            ["gate_up_proj_blocks", "stored as I8", "no part of a quantised weight"],
        ),
        (
            lambda folder: edit_json(folder / "config.json", hidden_size=128),
            ["config.json", "do not belong together"],
        ),
        (_saying(**SCHEMES["fp8 blocks"].config), ["no tensor", "together"]),
    ],
)
def test_a_malformed_gpt_oss_gets_one_sentence(
    damage: Callable[[Path], None], words: list[str], gpt_oss: tuple[Path, Path], capsys: Capture
) -> None:
    damage(gpt_oss[0])
    said = refused(gpt_oss[0], capsys)
    assert all(word in said for word in words), said
