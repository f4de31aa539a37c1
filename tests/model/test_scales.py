"""What is wrong with the scales of quantised weights is in the record: which tensor, which block, how many."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.judge.checks import judge
from qwen_precision.record.file import parse, to_json
from qwen_precision.record.run import ScaleFault
from support.families import make_family
from support.quantise import EXPERTS, MXFP4, SCHEMES, Parts, quantised, rewrite
from support.runs import run_probe

LOWEST = torch.finfo(torch.float32).min


def faults(folder: Path, **settings: Any) -> list[ScaleFault]:
    run = run_probe(folder, ["Hello there"], **settings)
    assert parse(to_json(run), "x").model_dump_json() == run.model_dump_json()
    return run.scale_faults


def broken(source: Path, folder: Path, scheme: str, tensor: str, places: list[Any], value: float) -> Path:
    def change(tensors: Parts) -> None:
        scale = tensors[tensor]
        for place in places:
            scale[place] = torch.tensor(value).to(scale.dtype)

    return rewrite(quantised(source, folder, SCHEMES[scheme])[0], change)


@pytest.mark.parametrize("name", SCHEMES)
def test_sound_scales_are_no_fault(name: str, healthy: Path, tmp_path: Path) -> None:
    assert faults(quantised(healthy, tmp_path / "q", SCHEMES[name])[0]) == []


def test_nan_bytes_among_the_fp8_scales_of_nvfp4_are_found_with_their_block(healthy: Path, tmp_path: Path) -> None:
    """As ModelOpt wrote them once o_proj was quantised too: bytes 0x7F and 0xFF, both of them NaN."""
    name = "model.layers.2.self_attn.o_proj.weight_scale"

    def change(tensors: Parts) -> None:
        bytes_of = tensors[name].view(torch.uint8)
        bytes_of[5, 3], bytes_of[60, 0] = 0x7F, 0xFF

    folder = rewrite(quantised(healthy, tmp_path / "q", SCHEMES["ct nvfp4"])[0], change)
    (fault,) = faults(folder)
    assert (fault.name, fault.kind, fault.count, fault.scales) == (name, "nan", 2, 64 * 4)
    assert (fault.row, fault.column, fault.height, fault.width) == (5, 3, 1, 16)
    assert fault.parameter == "model.layers.2.self_attn.o_proj.weight" and math.isnan(fault.value)
    run = run_probe(folder, ["Hello there"])
    (weight,) = (each for each in run.weights if each.nan)
    assert (weight.parameter, weight.nan) == (fault.parameter, 2 * 16)


def test_a_scale_that_was_never_filled_is_told_from_one_that_is_large(healthy: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale"
    folder = broken(healthy, tmp_path / "q", "ct fp8 tensor", name, [0], LOWEST)
    (fault,) = faults(folder)
    assert (fault.kind, fault.row, fault.column, fault.value) == ("unwritten", 0, 0, LOWEST)
    assert (fault.height, fault.width) == (64, 128)


@pytest.mark.parametrize(
    ("value", "kind"), [(0.0, "zero"), (math.inf, "infinite"), (-math.inf, "infinite"), (math.nan, "nan")]
)
def test_a_scale_that_cannot_be_right_is_named_with_its_block(
    value: float, kind: str, healthy: Path, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight_scale_inv"
    folder = broken(healthy, tmp_path / "q", "fp8 blocks", name, [(6, 1), (7, 0)], value)
    (fault,) = faults(folder)
    assert (fault.kind, fault.count, fault.row, fault.column) == (kind, 2, 6, 1)
    assert (fault.height, fault.width, fault.dtype) == (16, 32, None)


def test_a_block_that_leaves_fp16_when_multiplied_out_is_named_and_one_just_inside_is_not(
    healthy: Path, tmp_path: Path
) -> None:
    """The largest number of every block is 448: times 146 it is inside fp16, times 147 not."""
    name = "model.layers.2.mlp.up_proj.weight_scale_inv"
    assert faults(broken(healthy, tmp_path / "in", "fp8 blocks", name, [(3, 1)], 146.0)) == []
    (fault,) = faults(broken(healthy, tmp_path / "out", "fp8 blocks", name, [(3, 1)], 147.0))
    assert (fault.kind, fault.dtype, fault.row, fault.column, fault.value) == ("overflow", "fp16", 3, 1, 147.0)
    assert (fault.count, fault.scales) == (1, 8 * 2)


def test_a_block_is_named_by_its_size_where_the_last_of_a_row_or_column_is_cut_short(
    healthy: Path, tmp_path: Path
) -> None:
    """128 rows in blocks of 48, 64 columns in blocks of 40: three and two, none of them even."""
    name = "model.layers.2.mlp.up_proj.weight_scale_inv"
    (fault,) = faults(broken(healthy, tmp_path / "q", "fp8 cut blocks", name, [(1, 0)], 147.0))
    assert (fault.kind, fault.count, fault.row, fault.column) == ("overflow", 1, 1, 0)
    assert (fault.height, fault.width) == (48, 40)


def test_groups_of_gptq_are_named_down_the_outputs_and_across_the_inputs(healthy: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.scales"  # [groups, outputs] in the file
    (fault,) = faults(broken(healthy, tmp_path / "q", "gptq", name, [(3, 50)], math.nan))
    assert (fault.kind, fault.row, fault.column, fault.height, fault.width) == ("nan", 50, 3, 1, 32)


def test_a_scale_of_one_expert_is_named_by_its_tensor(healthy_moe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.5.gate_proj.weight_scale_inv"
    (fault,) = faults(broken(healthy_moe, tmp_path / "q", "fp8 blocks", name, [(1, 0)], 0.0), memory="streamed")
    assert (fault.name, fault.kind, fault.row, fault.column) == (name, "zero", 1, 0)


def experts_with(folder: Path, scale: int, places: list[tuple[int, int, int]]) -> Path:
    """gpt-oss with bytes of layer 2's down_proj changed: the scale of some groups, and all 32 numbers there to 6."""

    def change(tensors: Parts) -> None:
        for place in places:
            tensors["model.layers.2.mlp.experts.down_proj_scales"][place] = scale
            tensors["model.layers.2.mlp.experts.down_proj_blocks"][place] = 0x77

    plain = make_family(folder / "plain", "gpt_oss").folder
    return rewrite(quantised(plain, folder / "q", MXFP4, EXPERTS)[0], change)


@pytest.mark.parametrize("scale", [127 + 13, 0])
def test_scales_of_experts_inside_fp16_are_no_fault(scale: int, tmp_path: Path) -> None:
    """6 times 2^13 is inside; the smallest there is, which all zeros have, is no zero."""
    assert faults(experts_with(tmp_path, scale, [(5, 33, 3)])) == []


@pytest.mark.parametrize(
    ("scale", "kind", "dtypes"), [(255, "nan", [None]), (127 + 14, "overflow", ["fp16"])], ids=["nan", "overflow"]
)
def test_scales_of_experts_in_one_tensor_are_named_with_their_expert(
    scale: int, kind: str, dtypes: list[str | None], tmp_path: Path
) -> None:
    folder = experts_with(tmp_path, scale, [(6, 0, 0), (5, 33, 3)])
    found = faults(folder)
    assert [each.dtype for each in found] == dtypes and found[0].kind == kind
    assert (found[0].expert, found[0].row, found[0].column) == (5, 33, 3)
    assert (found[0].height, found[0].width, found[0].count, found[0].scales) == (1, 32, 2, 8 * 64 * 4)
    assert found[0].name == "model.layers.2.mlp.experts.down_proj_scales"
    assert found[0].parameter == "model.layers.2.mlp.experts.down_proj"
    told = [each for each in judge(run_probe(folder, ["Hello there"])).findings if each.kind == "bad-scale"]
    assert {each.place.name for each in told} == {"experts down_proj scale"}
    assert "expert 5, block row 33, column 3 (outputs 33, inputs 96 to 127)" in told[0].cause.evidence[0]


def test_the_scale_of_all_blocks_is_checked_too(healthy: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight_global_scale"
    found = faults(broken(healthy, tmp_path / "q", "ct nvfp4", name, [0], 0.0))
    assert ("zero", name) in [(fault.kind, fault.name) for fault in found]
