"""Schemes of one layout, or of one a pattern: FP8 in the weight's place, GPTQ, AWQ, MXFP4."""

import math
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


def fp8(settings: Settings) -> Pick:
    """FP8 as Qwen and DeepSeek publish it, as AutoFP8 and fbgemm write it: the scale is multiplied with.

    Source: transformers, integrations/finegrained_fp8.py; vLLM, model_executor/layers/quantization/fp8.py.
    """
    layout = plain_layout("FP8", "FP8", FP8, block_of(settings, "weight_block_size"))
    return lambda module: layout


def gptq(settings: Settings) -> Pick:
    """GPTQ, with GPTQModel's ``dynamic``: by a pattern of their names, some modules have settings of their own.

    Source: GPTQModel, quantization/config.py, ``dynamic_get``: the first that fits; what ``-:`` names is plain.
    """
    rules, usual = settings.get("dynamic") or {}, _gptq_layout(settings)
    if not isinstance(rules, dict) or not all(isinstance(own, dict) for own in rules.values()):
        raise ValueError("has a dynamic that is no object of objects")
    made = [
        (pattern[2:] if pattern[:2] in ("-:", "+:") else pattern, _gptq_layout({**settings, **own}) if own else usual)
        for pattern, own in rules.items()
    ]
    return lambda module: next((layout for pattern, layout in made if fits(pattern, module)), usual)


def _gptq_layout(settings: Settings) -> Layout:
    bits, group = one_of(settings, "bits", (2, 4, 8)), group_size(settings)
    kept = settings.get("checkpoint_format") or "gptq"
    if kept not in ("gptq", "gptq_v2"):
        raise ValueError(f"has checkpoint_format {kept!r}; qprec reads gptq and gptq_v2")
    return Layout(
        what=f"GPTQ int{bits} ({in_groups(group)})",
        dtype=f"INT{bits}",
        types=frozenset({"I32"}),
        leaves={"qweight": ("qweight",), "qzeros": ("qzeros",), "scales": ("scales",), "g_idx": ("g_idx",)},
        may=frozenset({"g_idx"}),
        drop=(),
        shape=partial(_gptq_shape, bits=bits, group=group),
        unpack=partial(unpack.gptq, bits=bits, group=group, above=1 if kept == "gptq" else 0),
        scales=("scales",),
        turned=True,
    )


def awq(settings: Settings) -> Pick:
    """AWQ, by AutoAWQ's names or transformers'."""
    one_of({"bits": settings.get("bits", settings.get("w_bit"))}, "bits", (4,))
    group = group_size({"group_size": settings.get("group_size", settings.get("q_group_size"))})
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"has version {version!r}; qprec reads gemm")
    layout = Layout(
        what=f"AWQ int4 ({in_groups(group)})",
        dtype="INT4",
        types=frozenset({"I32"}),
        leaves={"qweight": ("qweight",), "qzeros": ("qzeros",), "scales": ("scales",)},
        may=frozenset(),
        drop=(),
        shape=partial(_awq_shape, group=group),
        unpack=partial(unpack.awq, group=group),
        scales=("scales",),
        turned=True,
    )
    return lambda module: layout


def mxfp4(settings: Settings) -> Pick:
    """MXFP4 as gpt-oss is published: all experts of a layer in one tensor, which the model keeps turned.

    Source: transformers, integrations/mxfp4.py, ``convert_moe_packed_tensors``.
    """
    layout = Layout(
        what=MXFP4,
        dtype="MXFP4",
        types=frozenset({"U8"}),
        leaves={"blocks": ("blocks",), "scales": ("scales",)},
        may=frozenset(),
        drop=(),
        shape=_mxfp4_shape,
        unpack=unpack.mxfp4_experts,
        scales=("scales",),
        kept=EXPONENTS,
        glue="_",
    )
    return lambda module: layout


def _gptq_shape(infos: Infos, bits: int, group: int) -> Shape:
    words, outputs = matrix(infos["qweight"])
    inputs = words * 32 // bits
    groups = math.ceil(inputs / group)
    expect(infos, "scales", {(groups, outputs)})
    expect(infos, "qzeros", {(groups, outputs * bits // 32)})
    expect(infos, "g_idx", {(inputs,)})
    return outputs, inputs


def _awq_shape(infos: Infos, group: int) -> Shape:
    inputs, words = matrix(infos["qweight"])
    outputs, groups = words * 8, math.ceil(inputs / group)
    expect(infos, "scales", {(groups, outputs)})
    expect(infos, "qzeros", {(groups, words)})
    return outputs, inputs


def _mxfp4_shape(infos: Infos) -> Shape:
    shape = infos["blocks"].shape
    if len(shape) != 4 or shape[3] != 16 or 0 in shape:
        raise ValueError(f"has shape {list(shape)}; experts, outputs, groups and 16 bytes a group are expected")
    expect(infos, "scales", {shape[:3]})
    return shape[0], shape[2] * 32, shape[1]
