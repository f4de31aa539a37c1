"""Quantised copies of tiny checkpoints, by code that shares nothing with the package's.

Each scheme chooses integers and scales, writes them down as its format has it, and gives the value they stand for from
those integers and scales: nothing here ever unpacks. A copy comes with a twin that holds those values in float32.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import edit_json

Parts = dict[str, torch.Tensor]
Made = tuple[Parts, np.ndarray]


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """``[rows, columns]`` small unsigned integers, packed along the columns; ``order`` says which comes first."""
    each = 32 // bits
    rows, columns = values.shape
    out = np.zeros((rows, columns // each), dtype=np.uint64)
    for word in range(columns // each):
        for place in range(each):
            column = word * each + (order[place] if order else place)
            out[:, word] |= values[:, column].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def fp8_blocks(weight: np.ndarray, block: tuple[int, int] = (16, 32)) -> Made:
    """As Qwen publishes it, with smaller blocks; the last of a row or column may be cut short."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    stored, value = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), np.zeros_like(weight)
    scales = np.zeros((down, across), dtype=np.float32)
    for i in range(down):
        for j in range(across):
            here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = (np.abs(weight[here]).max() or 1) / np.float32(448)
            stored[here] = torch.from_numpy(weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
            value[here] = stored[here].float().numpy() * scales[i, j]
    return {"weight": stored, "weight_scale_inv": torch.from_numpy(scales)}, value


def fp8_one(weight: np.ndarray) -> Made:
    """One scale a tensor."""
    scale = np.float32(np.abs(weight).max() / 448)
    stored = torch.from_numpy(weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": stored, "weight_scale": torch.tensor([scale]), "input_scale": torch.tensor([1.0])}
    return parts, stored.float().numpy() * scale


def fp8_channels(weight: np.ndarray) -> Made:
    """One scale a row, in bf16 as LLM Compressor writes it."""
    scale = (torch.from_numpy(np.abs(weight).max(1, keepdims=True)) / 448).to(torch.bfloat16)
    stored = torch.from_numpy(weight / scale.float().numpy()).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float().numpy() * scale.float().numpy()


def int8_channels(weight: np.ndarray) -> Made:
    """W8A8's weights."""
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    stored = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
    return {"weight": torch.from_numpy(stored), "weight_scale": torch.from_numpy(scale)}, stored * scale


def _asymmetric(weight: np.ndarray, groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers ``[outputs, inputs]``, zeros and float16 scales ``[outputs, groups]``."""
    most, count = 2**bits - 1, groups.max() + 1
    integers = np.zeros(weight.shape, dtype=np.int64)
    zeros, scales = np.zeros((len(weight), count), dtype=np.int64), np.zeros((len(weight), count), dtype=np.float16)
    for group in range(count):
        mine = weight[:, groups == group]
        low, high = np.minimum(mine.min(1), 0), np.maximum(mine.max(1), 0)
        scales[:, group] = np.where(high > low, high - low, 1) / most
        wide = scales[:, group].astype(np.float32)
        zeros[:, group] = np.clip(np.rint(-low / wide), 0, most)
        fitted = np.rint(mine / wide[:, None]) + zeros[:, group, None]
        integers[:, groups == group] = np.clip(fitted, 0, most)
    return integers, zeros, scales


def _value(integers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return (integers - zeros[:, groups]).astype(np.float32) * scales.astype(np.float32)[:, groups]


def gptq(weight: np.ndarray, bits: int = 4, group: int = 32, sorted_by: int | None = None, version: int = 1) -> Made:
    """``sorted_by`` seeds an order of activation: channels of a group lie anywhere."""
    groups = np.arange(weight.shape[1]) // group
    if sorted_by is not None:
        groups = np.random.default_rng(sorted_by).permutation(groups)
    integers, zeros, scales = _asymmetric(weight, groups, bits)
    kept = (zeros - 1) % 2**bits if version == 1 else zeros
    parts = {
        "qweight": words(integers, bits).T.contiguous(),
        "qzeros": words(kept.T, bits),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return parts, _value(integers, zeros, scales, groups)


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns AutoAWQ packs first, second, …"""


def awq(weight: np.ndarray, group: int = 32) -> Made:
    groups = np.arange(weight.shape[1]) // group
    integers, zeros, scales = _asymmetric(weight, groups, 4)
    parts = {
        "qweight": words(integers.T, 4, AWQ),
        "qzeros": words(zeros.T, 4, AWQ),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return parts, _value(integers, zeros, scales, groups)


def packed(weight: np.ndarray, bits: int = 4, group: int = 32, symmetric: bool = True) -> Made:
    """compressed-tensors' W4A16 (and W8A16)."""
    groups = np.arange(weight.shape[1]) // group
    integers, zeros, scales = _asymmetric(weight, groups, bits)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    parts = {
        "weight_packed": words(integers, bits),
        "weight_scale": torch.from_numpy(scales.copy()),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return parts, _value(integers, zeros, scales, groups)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def nvfp4(weight: np.ndarray) -> Made:
    """Blocks of 16 with an FP8 scale each, and one for all that these are divided by."""
    rows, columns = weight.shape
    whole = np.float32(448 * 6 / np.abs(weight).max())
    blocks = weight.reshape(rows, columns // 16, 16)
    scales = torch.from_numpy(np.abs(blocks).max(2) / 6 * whole).to(torch.float8_e4m3fn)
    each = (scales.float().numpy() / whole)[:, :, None]
    nearest = np.abs(np.abs(blocks / each)[..., None] - FP4).argmin(-1)
    negative = blocks < 0
    value = np.where(negative, -FP4[nearest], FP4[nearest]) * each
    nibbles = (nearest + 8 * negative).reshape(rows, columns).astype(np.uint8)
    parts = {
        "weight_packed": torch.from_numpy(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)),
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([whole]),
        "input_global_scale": torch.tensor([1.0]),
    }
    return parts, value.reshape(rows, columns).astype(np.float32)


def mx_groups(weight: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """The last dimension in groups of 32, and the power of two of each that brings it below the largest number."""
    groups = weight.reshape(*weight.shape[:-1], weight.shape[-1] // 32, 32)
    return groups, np.ceil(np.log2(np.abs(groups).max(-1) / largest))


def in_fp4(groups: np.ndarray, powers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Two numbers a byte, a byte an exponent, and what they stand for."""
    each = np.exp2(powers)[..., None].astype(np.float32)
    nearest = np.abs(np.abs(groups / each)[..., None] - FP4).argmin(-1)
    negative = groups < 0
    nibbles = (nearest + 8 * negative).astype(np.uint8)
    packed = torch.from_numpy(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))
    value = np.where(negative, -FP4[nearest], FP4[nearest]) * each
    return packed, torch.from_numpy((powers + 127).astype(np.uint8)), value


def mxfp4_experts(weight: np.ndarray) -> Made:
    """As gpt-oss keeps its experts: groups of 32 of an output's inputs, a power of two each, and all of it turned."""
    experts, inputs, outputs = weight.shape
    packed, scales, value = in_fp4(*mx_groups(np.ascontiguousarray(weight.transpose(0, 2, 1)), 6))
    value = value.reshape(experts, outputs, inputs).transpose(0, 2, 1)
    return {"_blocks": packed, "_scales": scales}, value.astype(np.float32, order="C")


def mxfp4(weight: np.ndarray) -> Made:
    """As compressed-tensors keeps a matrix: a row of bytes an output."""
    packed, scales, value = in_fp4(*mx_groups(weight, 6))
    parts = {"weight_packed": packed.flatten(1), "weight_scale": scales}
    return parts, value.reshape(weight.shape).astype(np.float32)


def mxfp8(weight: np.ndarray) -> Made:
    """FP8 in groups of 32, a power of two each."""
    groups, powers = mx_groups(weight, 448)
    each = torch.from_numpy(np.exp2(powers)[..., None].astype(np.float32))
    rounded = (torch.from_numpy(groups) / each).to(torch.float8_e4m3fn)
    parts = {"weight": rounded.flatten(1), "weight_scale": torch.from_numpy((powers + 127).astype(np.uint8))}
    return parts, (rounded.float() * each).flatten(1).numpy()


def group_of(kept: str, **weights: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": kept, "config_groups": groups, "ignore": ["lm_head"]}


class Scheme(NamedTuple):
    """A way to quantise a weight, and what config.json says of it."""

    make: Callable[[np.ndarray], Made]
    config: dict[str, Any]
    says: str
    """How the report calls it."""


SCHEMES = {
    "fp8 blocks": Scheme(
        fp8_blocks,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
        "FP8 (16 x 32 blocks)",
    ),
    "fp8 cut blocks": Scheme(
        lambda weight: fp8_blocks(weight, (48, 40)),
        {"quant_method": "fp8", "weight_block_size": [48, 40]},
        "FP8 (48 x 40 blocks)",
    ),
    "fp8 tensor": Scheme(fp8_one, {"quant_method": "fp8", "activation_scheme": "static"}, "FP8 (a scale a tensor"),
    "ct fp8 tensor": Scheme(
        fp8_one, group_of("float-quantized", num_bits=8, type="float", strategy="tensor"), "FP8 (a scale a tensor"
    ),
    "ct fp8 channel": Scheme(
        fp8_channels, group_of("float-quantized", num_bits=8, type="float", strategy="channel"), "FP8 (a scale"
    ),
    "ct fp8 block": Scheme(
        lambda weight: _renamed(fp8_blocks(weight)),
        group_of("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        "FP8 (16 x 32 blocks)",
    ),
    "ct int8": Scheme(int8_channels, group_of("int-quantized", num_bits=8, type="int", strategy="channel"), "int8"),
    "ct int4": Scheme(
        packed, group_of("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), "packed int4"
    ),
    "ct int4 zeros": Scheme(
        lambda weight: packed(weight, symmetric=False),
        group_of("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        "packed int4 (groups of 32)",
    ),
    "ct int8 packed": Scheme(
        lambda weight: packed(weight, bits=8),
        group_of("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32),
        "packed int8",
    ),
    "ct nvfp4": Scheme(
        nvfp4,
        group_of("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "NVFP4",
    ),
    "ct mxfp4": Scheme(
        mxfp4,
        group_of("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        "MXFP4 (groups of 32",
    ),
    "ct mxfp8": Scheme(
        mxfp8,
        group_of("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
        "MXFP8 (groups of 32",
    ),
    "gptq": Scheme(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}, "GPTQ int4 (groups of 32)"),
    "gptq sorted": Scheme(
        lambda weight: gptq(weight, sorted_by=7),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        "GPTQ int4",
    ),
    "gptq one group": Scheme(
        lambda weight: gptq(weight, group=10**6), {"quant_method": "gptq", "bits": 4, "group_size": -1}, "GPTQ int4"
    ),
    "gptq v2": Scheme(
        lambda weight: gptq(weight, version=2),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        "GPTQ int4",
    ),
    "gptq int8": Scheme(
        lambda weight: gptq(weight, bits=8), {"quant_method": "gptq", "bits": 8, "group_size": 32}, "GPTQ int8"
    ),
    "awq": Scheme(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, "AWQ int4"
    ),
}


MXFP4 = Scheme(
    mxfp4_experts,
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
    "MXFP4 (groups of 32",
)
"""Not of a matrix, as those are, but of the experts of gpt-oss together."""

EXPERTS = r"experts\.(gate_up|down)_proj$"
"""What gpt-oss calls them."""


def _renamed(made: Made) -> Made:
    parts, value = made
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, value


def quantised(source: Path, folder: Path, scheme: Scheme, pattern: str = r"_proj\.weight$") -> tuple[Path, Path]:
    """A quantised copy of a checkpoint of one file, and its twin with the same values in float32.

    Every matrix of that name is quantised, but those of layer 1's attention: those stay as they are.
    """
    twin = folder.with_name(f"{folder.name}-twin")
    for each in (folder, twin):
        shutil.copytree(source, each)
    whole, same = Parts(), Parts()
    for name, tensor in load_file(source / "model.safetensors").items():
        if re.search(pattern, name) and "layers.1.self_attn" not in name:
            parts, value = scheme.make(tensor.float().numpy())
            whole |= {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in parts.items()}
            same[name] = torch.from_numpy(value.copy())
        else:
            whole[name] = same[name] = tensor
    save_aligned(whole, folder / "model.safetensors")
    save_aligned(same, twin / "model.safetensors")
    edit_json(folder / "config.json", quantization_config=scheme.config)
    return folder, twin


def save_aligned(tensors: Parts, path: Path) -> None:
    """Write a file whose tensors lie in memory, once it is mapped, as those that torch makes do.

    The last bit of MKL's sums depends on that, and older transformers compute on the mapped file itself.
    """
    for padding in range(64):
        save_file(tensors, path, metadata={"format": "pt", "padding": " " * padding})
        with path.open("rb") as file:
            if (8 + int.from_bytes(file.read(8), "little")) % 64 == 0:
                return
    raise AssertionError(f"{path}: no padding makes its header end at a multiple of 64")


def rewrite(folder: Path, change: Callable[[Parts], None]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    """Its ``quantization_config``."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found
