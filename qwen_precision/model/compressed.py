"""compressed-tensors: groups of modules, each with its scheme."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from qwen_precision.model import unpack
from qwen_precision.model.layout import (
    EXPONENTS,
    FP8,
    MXFP4,
    Infos,
    Layout,
    Pick,
    Settings,
    Shape,
    block_of,
    expect,
    fits,
    group_size,
    in_groups,
    matrix,
    one_of,
    plain_layout,
)


def compressed(settings: Settings) -> Pick:
    """compressed-tensors: groups of modules, each with its scheme (config/base.py and quantization/quant_config.py)."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
        raise ValueError("has no config_groups")
    for key, harmless in (("sparsity_config", {"dense", None}), ("transform_config", {None})):
        told = settings.get(key) or {}
        if told and (key == "transform_config" or told.get("format") not in harmless):
            raise ValueError(f"has a {key}, which changes the weights or activations; qprec does not read that")
    rows = [(_targets(group), _layout(group, settings)) for group in groups.values()]

    def pick(module: str) -> Layout | None:
        fitting = [(rank, layout) for targets, layout in rows if (rank := _rank(targets, module)) is not None]
        return min(fitting, key=lambda each: each[0])[1] if fitting else None

    return pick


def _targets(group: Settings) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise ValueError("has a group without targets")
    return [str(each) for each in targets]


def _rank(targets: list[str], module: str) -> int | None:
    """How closely a group names a module: by its own name, by a pattern, by its class; None where it does not.

    Every quantised module of a causal language model is a Linear, so a class is not looked up.
    """
    if module in targets:
        return 0
    if any(fits(each.removeprefix("re:"), module) for each in targets if each.startswith("re:")):
        return 1
    return 2 if any(not each.startswith("re:") and "." not in each for each in targets) else None


def _layout(group: Settings, settings: Settings) -> Layout | None:
    weights = group.get("weights")
    if weights is None:
        return None  # a group that quantises activations alone
    if not isinstance(weights, dict):
        raise ValueError("has a group whose weights are no object")
    kept = str(group.get("format") or settings.get("format"))
    if kept not in FORMATS:
        raise ValueError(f"has format {kept!r}; qprec reads {', '.join(FORMATS)}")
    return FORMATS[kept](weights)


def _plain(weights: Settings) -> Layout:
    whole = weights.get("type") == "int"
    one_of(weights, "num_bits", (8,))
    strategy = weights.get("strategy")
    block = block_of(weights, "block_structure") if strategy == "block" else None
    if strategy == "group":
        block = (1, group_size(weights))
    elif strategy not in ("tensor", "channel", "block"):
        raise ValueError(f"has strategy {strategy!r}; qprec reads tensor, channel, group and block")
    if whole:
        return plain_layout("int8", "INT8", frozenset({"I8"}), block)
    return plain_layout("FP8", "FP8", FP8, block)


def _integers(weights: Settings) -> Layout:
    bits, group = one_of(weights, "num_bits", (2, 4, 8)), group_size(weights)
    if weights.get("type", "int") != "int":
        raise ValueError(f"has packed weights of type {weights.get('type')!r}; qprec reads int")
    return Layout(
        what=f"packed int{bits} ({in_groups(group)})",
        dtype=f"INT{bits}",
        types=frozenset({"I32"}),
        leaves={
            "packed": ("weight_packed",),
            "scale": ("weight_scale",),
            "zero": ("weight_zero_point",),
            "g_idx": ("weight_g_idx",),
            "shape": ("weight_shape",),
        },
        may=frozenset({"zero", "g_idx", "shape"}) if weights.get("symmetric", True) else frozenset({"g_idx", "shape"}),
        drop=(),
        shape=partial(_integers_shape, bits=bits, group=group),
        unpack=partial(unpack.packed_integers, bits=bits, group=group),
    )


def _nvfp4(weights: Settings) -> Layout:
    one_of(weights, "num_bits", (4,))
    one_of(weights, "group_size", (16,), 16)
    return Layout(
        what="NVFP4 (blocks of 16, FP8 scales)",
        dtype="NVFP4",
        types=frozenset({"U8"}),
        leaves={"packed": ("weight_packed",), "scale": ("weight_scale",), "global": ("weight_global_scale",)},
        may=frozenset(),
        drop=("input_global_scale",),
        shape=partial(_fp4_shape, group=16),
        unpack=unpack.nvfp4,
        scales=("scale", "global"),
    )


def _mxfp4(weights: Settings) -> Layout:
    _mx_group(weights, 4)
    return Layout(
        what=MXFP4,
        dtype="MXFP4",
        types=frozenset({"U8"}),
        leaves={"packed": ("weight_packed",), "scale": ("weight_scale",)},
        may=frozenset(),
        drop=("input_global_scale",),
        shape=partial(_fp4_shape, group=unpack.MX_GROUP),
        unpack=unpack.mxfp4,
        kept=EXPONENTS,
    )


def _mxfp8(weights: Settings) -> Layout:
    _mx_group(weights, 8)
    plain = plain_layout("MXFP8", "MXFP8", FP8, (1, unpack.MX_GROUP))
    return replace(
        plain,
        what="MXFP8 (groups of 32, powers of two as scales)",
        leaves={role: leaves for role, leaves in plain.leaves.items() if role != "zero"},
        drop=(*plain.drop, "weight_zero_point"),
        kept=EXPONENTS,
    )


def _mx_group(weights: Settings, bits: int) -> None:
    one_of(weights, "num_bits", (bits,))
    one_of(weights, "group_size", (unpack.MX_GROUP,), unpack.MX_GROUP)
    if not weights.get("symmetric", True):
        raise ValueError("has zero points beside scales that are powers of two; qprec does not read that")


def _integers_shape(infos: Infos, bits: int, group: int) -> Shape:
    outputs, words = matrix(infos["packed"])
    inputs = words * 32 // bits
    groups = math.ceil(inputs / group)
    expect(infos, "scale", {(outputs, groups)})
    expect(infos, "zero", {(math.ceil(outputs * bits / 32), groups)})
    expect(infos, "g_idx", {(inputs,)})
    expect(infos, "shape", {(2,)})
    return outputs, inputs


def _fp4_shape(infos: Infos, group: int) -> Shape:
    outputs, half = matrix(infos["packed"])
    expect(infos, "scale", {(outputs, math.ceil(half * 2 / group))})
    expect(infos, "global", {(), (1,)})  # of NVFP4
    return outputs, half * 2


FORMATS: dict[str, Callable[[Settings], Layout]] = {
    "float-quantized": _plain,
    "int-quantized": _plain,
    "naive-quantized": _plain,
    "pack-quantized": _integers,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "mxfp8-quantized": _mxfp8,
}
"""Of compressed-tensors, by its own names."""
