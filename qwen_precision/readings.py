"""Readings: one number an operation, gathered on the device and brought to the host in one go.

``Slots`` holds, for each device and dtype, a growing pool of zero-dimensional tensors that ``torch.aminmax``
writes its minimum and maximum into, so that no operation waits for the host and no small allocation is left
between large ones. A derived slot holds no tensor: it is computed on the host from the slot it follows from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_POOL = 512


@dataclass(frozen=True)
class Reading:
    """What one operation produced."""

    module: str
    """Path of the module whose forward ran it."""
    op: str
    """The operation's name."""
    call: int
    """The how-manieth of this name in this module, from 0."""
    abs_max: float
    """Largest magnitude; nan if any element is NaN, inf if any is infinite."""
    dtype: torch.dtype
    """Of the output."""

    @property
    def finite(self) -> bool:
        """Whether every element was finite."""
        return math.isfinite(self.abs_max)


class _Pool:
    """Pairs of zero-dimensional tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks: list[Tensor] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.used = 0
        self.dtype, self.device = dtype, device

    def next(self) -> tuple[Tensor, Tensor]:
        if self.used == len(self.pairs):
            block = torch.zeros((_POOL, 2), dtype=self.dtype, device=self.device)
            self.blocks.append(block)
            self.pairs.extend((row[0], row[1]) for row in block.unbind())
        pair = self.pairs[self.used]
        self.used += 1
        return pair

    def values(self) -> list[float]:
        """Largest magnitude of every used pair: the one transfer to the host."""
        if not self.used:
            return []
        both = torch.cat(self.blocks)[: self.used]
        wide = both.to(torch.float64) if both.device.type != "mps" else both.to(torch.float32)
        # abs() of a NaN is NaN and amax carries it, so NaN wins over infinity.
        result: list[float] = wide.abs().amax(dim=1).tolist()
        self.used = 0
        return result


class Slots:
    """The readings of one forward while it runs."""

    def __init__(self) -> None:
        self._pools: dict[tuple[torch.dtype, torch.device], _Pool] = {}
        # (path, op), then either (pool, index in it) or (slot it follows from, how)
        self._keys: list[tuple[str, str]] = []
        self._where: list[tuple[_Pool | None, int, torch.dtype, str]] = []

    def read(self, key: tuple[str, str], flat: Tensor) -> int:
        """Look at a tensor now; gives the slot's number."""
        pool_key = (flat.dtype, flat.device)
        pool = self._pools.get(pool_key)
        if pool is None:
            pool = self._pools[pool_key] = _Pool(*pool_key)
        index = pool.used
        torch.aminmax(flat, out=pool.next())
        self._keys.append(key)
        self._where.append((pool, index, flat.dtype, ""))
        return len(self._keys) - 1

    def derive(self, key: tuple[str, str], slot: int, dtype: torch.dtype, how: str) -> int:
        """A slot whose value follows from an earlier one: its cast to ``dtype``, or its square."""
        self._keys.append(key)
        self._where.append((None, slot, dtype, how))
        return len(self._keys) - 1

    def take(self) -> list[Reading]:
        """All readings in order; the slots are empty afterwards."""
        with torch.inference_mode():
            values = {pool: pool.values() for pool in self._pools.values()}
            magnitudes: list[float] = []
            for pool, index, dtype, how in self._where:
                if pool is not None:
                    magnitudes.append(values[pool][index])
                else:
                    magnitudes.append(_follow(magnitudes[index], dtype, how))
        calls: dict[tuple[str, str], int] = {}
        readings = []
        for key, place, value in zip(self._keys, self._where, magnitudes, strict=True):
            call = calls.get(key, 0)
            calls[key] = call + 1
            readings.append(Reading(key[0], key[1], call, value, place[2]))
        self._keys, self._where = [], []
        return readings


def _follow(value: float, dtype: torch.dtype, how: str) -> float:
    """Rounding is monotonic, so the cast (the square) of the largest magnitude is the largest of the casts."""
    result = torch.tensor(value, dtype=torch.float64).to(dtype)
    return float(result * result if how == "pow" else result)


class Readings:
    """What ``watch`` gives: a sequence of ``Reading``, filled when the block ends."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._all: list[Reading] = []

    def refresh(self) -> None:
        """Bring what was measured so far to the host."""
        self._all.extend(self._slots.take())

    def __iter__(self) -> Iterator[Reading]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Reading:
        return self._all[index]

    def worst(self, count: int = 10) -> list[Reading]:
        """The readings with the largest magnitudes, non-finite ones first."""

        def rank(reading: Reading) -> float:
            return math.inf if math.isnan(reading.abs_max) else reading.abs_max

        return sorted(self._all, key=rank, reverse=True)[:count]

    def first_nonfinite(self) -> Reading | None:
        """The first operation whose output held a NaN or an infinity."""
        return next((reading for reading in self._all if not reading.finite), None)
