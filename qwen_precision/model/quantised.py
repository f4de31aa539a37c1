"""Quantised weights: how each scheme is recognised, which tensors make up one weight, and how that becomes float32.

A scheme is a function in ``METHODS``: from ``quantization_config`` to the layout of a module's weight. config.json
tells the numbers (block, group, bits), the files tell which weights are quantised: what a scheme left alone
(``ignore``, ``modules_to_not_convert``) is there as a plain tensor. What comes out is an index with one entry a weight,
as if it had never been quantised; ``Packed`` in such an entry says how it is made.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.model import unpack
from qwen_precision.model.index import FLOAT_TYPES, Packed, TensorInfo

Infos = Mapping[str, TensorInfo]
Shape = tuple[int, ...]
Settings = dict[str, Any]
_SCALES = frozenset({*FLOAT_TYPES, "F8_E4M3", "F8_E8M0"})


@dataclass(frozen=True)
class Layout:
    """How one scheme keeps a module's weight."""

    what: str
    """In words, for the report."""
    dtype: str
    """What the record calls the format."""
    types: frozenset[str]
    """Formats, by safetensors' name, of the tensor that is there in place of the weight."""
    leaves: dict[str, tuple[str, ...]]
    """By role: how that tensor is spelled, behind the module's name. The first role is the one of ``types``."""
    may: frozenset[str]
    """Roles that may be missing."""
    drop: tuple[str, ...]
    """Tensors beside them that are about activations, or are not needed."""
    shape: Callable[[Infos], Shape]
    """The shape of the weight; raises ValueError where those of its parts do not fit together."""
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    """The weight in float32; raises ValueError where the parts contradict each other."""
    scales: tuple[str, ...] = ("scale",)
    """Roles that are scales, for the static check: the first is the one of the blocks."""
    kept: frozenset[str] = _SCALES
    """Formats, by safetensors' name, that scales may have."""
    turned: bool = False
    """Whether scales are ``[across, down]`` of the weight."""
    glue: str = "."
    """What ends the module's name; with any but a dot it is the weight that has this name, and no module."""


Pick = Callable[[str], Layout | None]
"""From a module's name to the layout of its weight."""


def unquantised(tensors: dict[str, TensorInfo], settings: Settings, folder: Path) -> dict[str, TensorInfo]:
    """The index with one entry a weight; what is not quantised stays as it is.

    Raises:
        QprecError: an unknown scheme, settings that it does not have, a part that is missing or of a wrong shape.
    """
    path, method = folder / "config.json", str(settings.get("quant_method") or "")
    if method not in METHODS:
        raise QprecError(
            f"{path}: the weights are quantised by {method or 'an unnamed method'!r}, which qprec does not read "
            f"(it reads {', '.join(METHODS)}); probe the checkpoint they were made from."
        )
    try:
        pick = METHODS[method](settings)
    except ValueError as error:
        raise QprecError(f"{path}: quantization_config ({method}) {error}.") from error
    found, parts = dict[str, TensorInfo](), set[str]()
    for name, info in tensors.items():
        layout = pick(name.rpartition(".")[0])
        if layout is None or info.dtype not in layout.types:
            continue
        module, _, leaf = name.rpartition(layout.glue)
        if leaf in layout.leaves[_first(layout)]:
            packed = _packed(tensors, module, layout, folder)
            parts |= {*packed.names.values(), *(f"{module}{layout.glue}{leaf}" for leaf in layout.drop)}
            found[f"{module}.weight" if layout.glue == "." else module] = _entry(packed, layout, folder)
    if not found:
        raise QprecError(
            f"{path}: quantization_config says {method}, but no tensor of the files is kept so; "
            "the two do not belong together."
        )
    return {**{name: info for name, info in tensors.items() if name not in parts}, **found}


def _first(layout: Layout) -> str:
    return next(iter(layout.leaves))


def _packed(tensors: Infos, module: str, layout: Layout, folder: Path) -> Packed:
    """The parts of one weight."""
    names: dict[str, str] = {}
    for role, leaves in layout.leaves.items():
        spelled = [f"{module}{layout.glue}{leaf}" for leaf in leaves]
        there = [name for name in spelled if name in tensors]
        if there:
            names[role] = there[0]
        elif role not in layout.may:
            raise QprecError(
                f"{folder}: the tensor {spelled[0]} is in none of its files, and the weight of {module} is "
                f"{layout.what}; download the checkpoint again."
            )
    infos = {role: tensors[name] for role, name in names.items()}
    for role in layout.scales:
        if infos[role].dtype not in layout.kept:
            raise QprecError(
                f"{folder / infos[role].file}: {names[role]} is stored as {infos[role].dtype}, which is no format of "
                f"scales; {_WRONG}."
            )
    return Packed(layout.what, names, infos, layout.unpack, layout.scales, layout.turned)


def _entry(packed: Packed, layout: Layout, folder: Path) -> TensorInfo:
    """One weight as if it were a tensor of its own."""
    main = packed.infos[_first(layout)]
    try:
        shape = layout.shape(packed.infos)
    except ValueError as error:
        raise QprecError(f"{folder / main.file}: {packed.names[_first(layout)]} {error}; {_WRONG}.") from error
    size = sum(info.size for info in packed.infos.values())
    return replace(main, dtype=layout.dtype, shape=shape, size=size, packed=packed)


_WRONG = "the file and its config.json do not belong together"

# -- what config.json says ------------------------------------------------------------------------------------


def _one_of(settings: Settings, key: str, allowed: tuple[int, ...], default: int | None = None) -> int:
    value = settings.get(key, default)
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"has {key} {value!r}; qprec reads {', '.join(map(str, allowed))}")
    return int(value)


def _group(settings: Settings) -> int:
    """Channels that share a scale; all of them where it says -1."""
    value = settings.get("group_size")
    if value in (None, -1):
        return 2**31
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"has group_size {value!r}; it should be a positive number or -1")
    return value


def _block(settings: Settings, key: str) -> tuple[int, int] | None:
    value = settings.get(key)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) and each > 0 for each in value)):
        raise ValueError(f"has {key} {value!r}; it should be two positive numbers, rows and columns")
    return value[0], value[1]


def _in_blocks(block: tuple[int, int] | None) -> str:
    return f"{block[0]} x {block[1]} blocks" if block else "a scale a tensor or channel"


# -- what the shapes must be ----------------------------------------------------------------------------------


def _two(info: TensorInfo) -> tuple[int, int]:
    if len(info.shape) != 2 or 0 in info.shape:
        raise ValueError(f"has shape {list(info.shape)}; a matrix is expected")
    return info.shape[0], info.shape[1]


def _expect(infos: Infos, role: str, allowed: set[Shape]) -> None:
    if role in infos and infos[role].shape not in allowed:
        wanted = " or ".join(str(list(shape)) for shape in sorted(allowed))
        raise ValueError(f"has {role} of shape {list(infos[role].shape)}, {wanted} is expected")


def _blocks_fit(infos: Infos, rows: int, columns: int, block: tuple[int, int] | None, roles: tuple[str, ...]) -> None:
    """Scales (and zero points) are one a tensor or row, or one a block."""
    allowed: set[Shape] = {(), (1,), (1, 1), (rows,), (rows, 1)}
    if block is not None:
        allowed = {(math.ceil(rows / block[0]), math.ceil(columns / block[1]))}
    for role in roles:
        _expect(infos, role, allowed)


def _plain_shape(infos: Infos, block: tuple[int, int] | None) -> Shape:
    rows, columns = _two(infos["weight"])
    _blocks_fit(infos, rows, columns, block, ("scale", "zero"))
    return rows, columns


def _gptq_shape(infos: Infos, bits: int, group: int) -> Shape:
    words, outputs = _two(infos["qweight"])
    inputs = words * 32 // bits
    groups = math.ceil(inputs / group)
    _expect(infos, "scales", {(groups, outputs)})
    _expect(infos, "qzeros", {(groups, outputs * bits // 32)})
    _expect(infos, "g_idx", {(inputs,)})
    return outputs, inputs


def _awq_shape(infos: Infos, group: int) -> Shape:
    inputs, words = _two(infos["qweight"])
    outputs, groups = words * 8, math.ceil(inputs / group)
    _expect(infos, "scales", {(groups, outputs)})
    _expect(infos, "qzeros", {(groups, words)})
    return outputs, inputs


def _integers_shape(infos: Infos, bits: int, group: int) -> Shape:
    outputs, words = _two(infos["packed"])
    inputs = words * 32 // bits
    groups = math.ceil(inputs / group)
    _expect(infos, "scale", {(outputs, groups)})
    _expect(infos, "zero", {(math.ceil(outputs * bits / 32), groups)})
    _expect(infos, "g_idx", {(inputs,)})
    _expect(infos, "shape", {(2,)})
    return outputs, inputs


def _nvfp4_shape(infos: Infos) -> Shape:
    outputs, half = _two(infos["packed"])
    _expect(infos, "scale", {(outputs, math.ceil(half / 8))})
    _expect(infos, "global", {(), (1,)})
    return outputs, half * 2


def _mxfp4_shape(infos: Infos) -> Shape:
    shape = infos["blocks"].shape
    if len(shape) != 4 or shape[3] != 16 or 0 in shape:
        raise ValueError(f"has shape {list(shape)}; experts, outputs, groups and 16 bytes a group are expected")
    _expect(infos, "scales", {shape[:3]})
    return shape[0], shape[2] * 32, shape[1]


# -- the schemes ----------------------------------------------------------------------------------------------

_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


def _plain(what: str, dtype: str, types: frozenset[str], block: tuple[int, int] | None) -> Layout:
    """FP8 or int8 in the weight's own place, its scales beside it."""
    return Layout(
        what=f"{what} ({_in_blocks(block)})",
        dtype=dtype,
        types=types,
        leaves={
            "weight": ("weight",),
            "scale": ("weight_scale_inv", "weight_scale"),
            "zero": ("weight_zero_point",),
        },
        may=frozenset({"zero"}),
        drop=("input_scale", "activation_scale", "input_zero_point"),
        shape=partial(_plain_shape, block=block),
        unpack=partial(unpack.plain, block=block),
    )


def _fp8(settings: Settings) -> Pick:
    """FP8 as Qwen and DeepSeek publish it, as AutoFP8 and fbgemm write it: the scale is multiplied with.

    Source: transformers, integrations/finegrained_fp8.py; vLLM, model_executor/layers/quantization/fp8.py.
    """
    layout = _plain("FP8", "FP8", _FP8, _block(settings, "weight_block_size"))
    return lambda module: layout


def _gptq(settings: Settings) -> Pick:
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
    return lambda module: next((layout for pattern, layout in made if _fits(pattern, module)), usual)


def _gptq_layout(settings: Settings) -> Layout:
    bits, group = _one_of(settings, "bits", (2, 4, 8)), _group(settings)
    kept = settings.get("checkpoint_format") or "gptq"
    if kept not in ("gptq", "gptq_v2"):
        raise ValueError(f"has checkpoint_format {kept!r}; qprec reads gptq and gptq_v2")
    return Layout(
        what=f"GPTQ int{bits} ({_in_groups(group)})",
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


def _awq(settings: Settings) -> Pick:
    _one_of({"bits": settings.get("bits", settings.get("w_bit"))}, "bits", (4,))
    group = _group({"group_size": settings.get("group_size", settings.get("q_group_size"))})
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"has version {version!r}; qprec reads gemm")
    layout = Layout(
        what=f"AWQ int4 ({_in_groups(group)})",
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


def _in_groups(group: int) -> str:
    return f"groups of {group}" if group < 2**31 else "a scale a channel"


def _compressed(settings: Settings) -> Pick:
    """compressed-tensors: groups of modules, each with its scheme (config/base.py and quantization/quant_config.py)."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
        raise ValueError("has no config_groups")
    for key, harmless in (("sparsity_config", {"dense", None}), ("transform_config", {None})):
        told = settings.get(key) or {}
        if told and (key == "transform_config" or told.get("format") not in harmless):
            raise ValueError(f"has a {key}, which changes the weights or activations; qprec does not read that")
    rows = [(_targets(group), _compressed_layout(group, settings)) for group in groups.values()]

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
    if any(_fits(each.removeprefix("re:"), module) for each in targets if each.startswith("re:")):
        return 1
    return 2 if any(not each.startswith("re:") and "." not in each for each in targets) else None


def _fits(pattern: str, module: str) -> bool:
    """Whether a pattern of the config fits the beginning of a module's name; a stranger's may take for ever, so
    it is given a second, which ``re`` has no way to say."""
    try:
        return regex.match(pattern, module, timeout=1.0) is not None
    except (regex.error, TimeoutError) as error:
        why = "takes too long" if isinstance(error, TimeoutError) else str(error)
        raise QprecError(
            f"config.json: quantization_config has {pattern!r:.200}, which is no pattern of modules' names ({why}); "
            "download the file again."
        ) from error


def _compressed_layout(group: Settings, settings: Settings) -> Layout | None:
    weights = group.get("weights")
    if weights is None:
        return None  # a group that quantises activations alone
    if not isinstance(weights, dict):
        raise ValueError("has a group whose weights are no object")
    kept = str(group.get("format") or settings.get("format"))
    if kept not in FORMATS:
        raise ValueError(f"has format {kept!r}; qprec reads {', '.join(FORMATS)}")
    return FORMATS[kept](weights)


def _compressed_plain(weights: Settings) -> Layout:
    whole = weights.get("type") == "int"
    _one_of(weights, "num_bits", (8,))
    strategy = weights.get("strategy")
    block = _block(weights, "block_structure") if strategy == "block" else None
    if strategy == "group":
        block = (1, _group(weights))
    elif strategy not in ("tensor", "channel", "block"):
        raise ValueError(f"has strategy {strategy!r}; qprec reads tensor, channel, group and block")
    return _plain("int8" if whole else "FP8", "INT8" if whole else "FP8", frozenset({"I8"}) if whole else _FP8, block)


def _compressed_integers(weights: Settings) -> Layout:
    bits, group = _one_of(weights, "num_bits", (2, 4, 8)), _group(weights)
    if weights.get("type", "int") != "int":
        raise ValueError(f"has packed weights of type {weights.get('type')!r}; qprec reads int")
    return Layout(
        what=f"packed int{bits} ({_in_groups(group)})",
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


def _compressed_nvfp4(weights: Settings) -> Layout:
    _one_of(weights, "num_bits", (4,))
    _one_of(weights, "group_size", (16,), 16)
    return Layout(
        what="NVFP4 (blocks of 16, FP8 scales)",
        dtype="NVFP4",
        types=frozenset({"U8"}),
        leaves={"packed": ("weight_packed",), "scale": ("weight_scale",), "global": ("weight_global_scale",)},
        may=frozenset(),
        drop=("input_global_scale",),
        shape=_nvfp4_shape,
        unpack=unpack.nvfp4,
        scales=("scale", "global"),
    )


def _mxfp4(settings: Settings) -> Pick:
    """MXFP4 as gpt-oss is published: all experts of a layer in one tensor, which the model keeps turned.

    Source: transformers, integrations/mxfp4.py, ``convert_moe_packed_tensors``.
    """
    layout = Layout(
        what="MXFP4 (groups of 32, powers of two as scales)",
        dtype="MXFP4",
        types=frozenset({"U8"}),
        leaves={"blocks": ("blocks",), "scales": ("scales",)},
        may=frozenset(),
        drop=(),
        shape=_mxfp4_shape,
        unpack=unpack.mxfp4,
        scales=("scales",),
        kept=frozenset({"U8", "F8_E8M0"}),
        glue="_",
    )
    return lambda module: layout


FORMATS: dict[str, Callable[[Settings], Layout]] = {
    "float-quantized": _compressed_plain,
    "int-quantized": _compressed_plain,
    "naive-quantized": _compressed_plain,
    "pack-quantized": _compressed_integers,
    "nvfp4-pack-quantized": _compressed_nvfp4,
}
"""Of compressed-tensors, by its own names."""

METHODS: dict[str, Callable[[Settings], Pick]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
}
"""By ``quant_method``: a scheme is a row here."""
