"""How a scheme keeps a module's weight, and what every scheme asks of config.json and of the shapes of the parts.

What is not as it should be raises ValueError, whose words go on a sentence that begins with the file.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex
from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.model import unpack
from qwen_precision.model.index import FLOAT_TYPES, TensorInfo

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
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale where the last of a row or column may be cut short; None where none is."""
    glue: str = "."
    """What ends the module's name; with any but a dot it is the weight that has this name, and no module."""

    @property
    def main(self) -> str:
        """The role of the tensor that is there in place of the weight."""
        return next(iter(self.leaves))


Pick = Callable[[str], Layout | None]
"""From a module's name to the layout of its weight."""


# -- what config.json says ------------------------------------------------------------------------------------


def one_of(settings: Settings, key: str, allowed: tuple[int, ...], default: int | None = None) -> int:
    """A number of the config, if it is one that qprec reads."""
    value = settings.get(key, default)
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"has {key} {value!r}; qprec reads {', '.join(map(str, allowed))}")
    return int(value)


def group_size(settings: Settings) -> int:
    """Channels that share a scale; all of them where it says -1."""
    value = settings.get("group_size")
    if value in (None, -1):
        return 2**31
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"has group_size {value!r}; it should be a positive number or -1")
    return value


def block_of(settings: Settings, key: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where it does not say."""
    value = settings.get(key)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) and each > 0 for each in value)):
        raise ValueError(f"has {key} {value!r}; it should be two positive numbers, rows and columns")
    return value[0], value[1]


def in_blocks(block: tuple[int, int] | None) -> str:
    """What shares a scale, in words."""
    return f"{block[0]} x {block[1]} blocks" if block else "a scale a tensor or channel"


def in_groups(group: int) -> str:
    """The same of channels in groups."""
    return f"groups of {group}" if group < 2**31 else "a scale a channel"


def fits(pattern: str, module: str) -> bool:
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


# -- what the shapes must be ----------------------------------------------------------------------------------


def matrix(info: TensorInfo) -> tuple[int, int]:
    """Rows and columns of a part that has to have them."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise ValueError(f"has shape {list(info.shape)}; a matrix is expected")
    return info.shape[0], info.shape[1]


def expect(infos: Infos, role: str, allowed: set[Shape]) -> None:
    """Refuse a part, where it is there, of a shape that does not fit the others."""
    if role in infos and infos[role].shape not in allowed:
        wanted = " or ".join(str(list(shape)) for shape in sorted(allowed))
        raise ValueError(f"has {role} of shape {list(infos[role].shape)}, {wanted} is expected")


def _blocks_fit(infos: Infos, rows: int, columns: int, block: tuple[int, int] | None, roles: tuple[str, ...]) -> None:
    """Scales (and zero points) are one a tensor or row, or one a block."""
    allowed: set[Shape] = {(), (1,), (1, 1), (rows,), (rows, 1)}
    if block is not None:
        allowed = {(math.ceil(rows / block[0]), math.ceil(columns / block[1]))}
    for role in roles:
        expect(infos, role, allowed)


# -- what several schemes share -------------------------------------------------------------------------------

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})

EXPONENTS = frozenset({"U8", "F8_E8M0"})
"""Formats of scales that are powers of two."""

MXFP4 = "MXFP4 (groups of 32, powers of two as scales)"


def plain_layout(what: str, dtype: str, types: frozenset[str], block: tuple[int, int] | None) -> Layout:
    """FP8 or int8 in the weight's own place, its scales beside it."""
    return Layout(
        what=f"{what} ({in_blocks(block)})",
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
        block=block,
    )


def _plain_shape(infos: Infos, block: tuple[int, int] | None) -> Shape:
    rows, columns = matrix(infos["weight"])
    _blocks_fit(infos, rows, columns, block, ("scale", "zero"))
    return rows, columns
