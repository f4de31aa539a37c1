"""How the numbers of a tensor are distributed over bit patterns: what any power of two would do to them in fp16.

A 16-bit format has 65,536 patterns, so one count of a tensor answers for every factor at once. Of a wider format the
11 significant bits that fp16 keeps anyway are counted: what a factor loses on top of those is asked here.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_precision.dtypes import DTYPES

_CHUNK = 1 << 20
_SIGNIFICANT = 11  # bits of fp16's significand
_LAST_BIT = -24  # exponent of fp16's smallest number
_DROPPED = 13  # of fp32's 23 mantissa bits fp16 keeps 10


class WeightBits:
    """Distinct finite values of a tensor, not 0, and how often each is there.

    Args:
        tensor: in fp16, bf16, fp32 or fp64.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.elements = tensor.numel()
        counts = _counted(tensor.reshape(-1))
        patterns = np.flatnonzero(counts)
        values = _values(patterns, tensor.dtype)
        keep = np.isfinite(values) & (values != 0)
        self._values, self._counts = values[keep], counts[patterns[keep]]
        self.abs_max = float(np.abs(self._values).max(initial=0.0))
        mantissa, exponent = np.frexp(np.abs(self._values))
        significand = (mantissa * 2.0**_SIGNIFICANT).astype(np.int64)
        zeros = np.log2((significand & -significand).astype(np.float64)).astype(np.int64) if len(keep) else exponent
        self._last_bit = exponent - _SIGNIFICANT + zeros
        self._bits = _SIGNIFICANT - zeros

    def room(self) -> int:
        """The largest power of two it could be multiplied by and still fit into fp16."""
        if self.abs_max == 0:
            return 120
        room = math.floor(math.log2(DTYPES["fp16"].max / self.abs_max))
        return max(-120, min(120, room))

    def bits_lost(self, exponent: int) -> int:
        """Significant bits that fp16 drops of all elements times 2^exponent; a weight that becomes zero loses all."""
        below = _LAST_BIT - (self._last_bit + exponent)
        return int((self._counts * np.clip(below, 0, self._bits)).sum())

    def lost(self, exponent: int) -> "Lost":
        """What fp16 does not hold of the tensor times 2^exponent."""
        wanted = self._values * 2.0**exponent
        with np.errstate(over="ignore"):
            held = wanted.astype(np.float16).astype(np.float64)
        wrong = held != wanted
        error = np.where(np.isfinite(held), held, 0.0) - wanted
        return Lost(
            self.elements,
            int(self._counts[wrong].sum()),
            int(self._counts[held == 0].sum()),
            int(self._counts[np.abs(error) > 0.01 * np.abs(wanted)].sum()),
            float((self._counts * error**2).sum()) * 4.0**-exponent,
            float((self._counts * self._values**2).sum()),
        )


class Lost:
    """Weights that a format does not hold exactly; adds up over tensors.

    Args:
        elements: in all.
        inexact: whose value changes.
        to_zero: that become zero.
        badly: that change by more than 1 %.
        error: sum of the squared changes, in units of the original tensor.
        total: sum of the squares of all elements.
    """

    def __init__(self, elements: int, inexact: int, to_zero: int, badly: int, error: float, total: float) -> None:
        self.elements, self.inexact, self.to_zero, self.badly = elements, inexact, to_zero, badly
        self.error, self.total = error, total

    def __add__(self, other: "Lost") -> "Lost":
        return Lost(
            self.elements + other.elements,
            self.inexact + other.inexact,
            self.to_zero + other.to_zero,
            self.badly + other.badly,
            self.error + other.error,
            self.total + other.total,
        )

    @property
    def relative(self) -> float:
        """Root mean square of the changes over that of the elements."""
        return math.sqrt(self.error / self.total) if self.total else 0.0


NOTHING_LOST = Lost(0, 0, 0, 0, 0.0, 0.0)


def _counted(flat: Tensor) -> NDArray[np.int64]:
    wide = flat.dtype not in (torch.float16, torch.bfloat16)
    counts = np.zeros(1 << (32 - _DROPPED if wide else 16), dtype=np.int64)
    for piece in torch.split(flat, _CHUNK):
        if wide:
            bits = piece.to(torch.float32).cpu().numpy().view(np.uint32)
            # Rounded to nearest, ties to even, as the cast does it; a carry into the exponent is what it should be.
            half = np.uint32((1 << (_DROPPED - 1)) - 1) + ((bits >> np.uint32(_DROPPED)) & np.uint32(1))
            patterns = np.where(np.isfinite(bits.view(np.float32)), bits + half, bits) >> np.uint32(_DROPPED)
        else:
            patterns = piece.view(torch.int16).cpu().numpy().view(np.uint16)
        counts += np.bincount(patterns, minlength=len(counts))
    return counts


def _values(patterns: NDArray[np.int64], dtype: torch.dtype) -> NDArray[np.float64]:
    if dtype == torch.float16:
        return patterns.astype(np.uint16).view(np.float16).astype(np.float64)
    shift = 16 if dtype == torch.bfloat16 else _DROPPED
    return (patterns.astype(np.uint32) << np.uint32(shift)).view(np.float32).astype(np.float64)
