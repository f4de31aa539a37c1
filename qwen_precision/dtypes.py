"""The number formats as plain numbers, so that judging and rendering need no torch.

Each value is the IEEE 754 (fp16, fp32) or Google Brain (bf16) constant; a test compares every row with
``torch.finfo``. A new dtype is a row in ``DTYPES``: command-line choices, help, limits and tests read it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One floating-point format."""

    name: str
    """The word used on the command line, in records and in reports."""
    torch_name: str
    """The attribute of ``torch`` that holds it."""
    max: float
    """The largest finite number."""
    smallest_normal: float
    """The smallest positive number that keeps all significand bits."""
    smallest_subnormal: float
    """The smallest positive number at all; half of it rounds to zero."""
    eps: float
    """The distance from 1 to the next larger number."""
    bytes: int
    """Bytes an element."""

    @property
    def overflows_from(self) -> float:
        """The least magnitude that rounds to infinity: the largest number and half the step to the next (65520)."""
        return self.max + self.eps * 2.0 ** (math.frexp(self.max)[1] - 2)


DTYPES: dict[str, Dtype] = {
    row.name: row
    for row in (
        Dtype("fp16", "float16", 65504.0, 2.0**-14, 2.0**-24, 2.0**-10, 2),
        Dtype("bf16", "bfloat16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7, 2),
        Dtype("fp32", "float32", (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23, 4),
    )
}

DTYPE_ALIASES: dict[str, str] = {
    **{row.torch_name: row.name for row in DTYPES.values()},
    **{"half": "fp16", "float": "fp32", "f16": "fp16", "f32": "fp32"},
}
"""Other words for the formats, as torch, safetensors and engines have them."""

REFERENCE = "fp32"
"""The dtype of the reference pass: headroom and origin are read off it."""

RESCUED = "fp16"
"""The format that a checkpoint is rescaled for; bf16 has fp32's range and needs no rescue."""

WIDER_MAX: dict[str, float] = {"fp64": (2 - 2.0**-52) * 2.0**1023}
"""Largest finite numbers of formats that operations may compute in although no pass runs in them."""


def narrowest(names: Iterable[str]) -> str | None:
    """Of these, the format whose range activations can leave; None where all are as wide as fp32."""
    narrow = [name for name in names if DTYPES[name].max < 1e30]
    return min(narrow, key=lambda name: DTYPES[name].max, default=None)


def overflows_from(name: str) -> float:
    """``Dtype.overflows_from`` by the short name; of a format beyond the table its largest number."""
    return DTYPES[name].overflows_from if name in DTYPES else WIDER_MAX[name]


def largest(name: str) -> float:
    """The largest finite number of a format by its short name."""
    return DTYPES[name].max if name in DTYPES else WIDER_MAX[name]
