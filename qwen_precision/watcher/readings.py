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


Spot = tuple[str, str, int]
"""Path of the module, name of the operation, the how-manieth."""


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
    def spot(self) -> Spot:
        """Which operation it is."""
        return self.module, self.op, self.call

    @property
    def finite(self) -> bool:
        """Whether every element was finite."""
        return math.isfinite(self.abs_max)


class _Pool:
    """Pairs of zero-dimensional tensors of one dtype on one device; used again for the next forward."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks: list[Tensor] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.used = 0
        self.dtype, self.device = dtype, device

    def grow(self) -> None:
        """Room for more pairs."""
        block = torch.zeros((2, _POOL), dtype=self.dtype, device=self.device)
        self.blocks.append(block)
        self.pairs.extend(zip(block[0].unbind(), block[1].unbind(), strict=True))

    def values(self) -> list[float]:
        """Largest magnitude of every used pair: the one transfer to the host."""
        if not self.used:
            return []
        both = torch.cat(self.blocks, dim=1)[:, : self.used]
        wide = both.to(torch.float64) if both.device.type != "mps" else both.to(torch.float32)
        # abs() of a NaN is NaN and amax carries it, so NaN wins over infinity.
        result: list[float] = wide.abs().amax(dim=0).tolist()
        self.used = 0
        return result


@dataclass(frozen=True)
class _Raw:
    """What one forward left, on the host but not yet spelled out."""

    log: list[tuple[str, str, _Pool | None, int, torch.dtype]]
    values: dict[_Pool, list[float]]


_SPARE: dict[tuple[torch.dtype, int], list[_Pool]] = {}
"""Pools that nobody uses just now; making the views of a new one takes longer than reading a layer."""


class Slots:
    """The readings of one forward while it runs."""

    def __init__(self) -> None:
        self._pools: dict[tuple[torch.dtype, int], _Pool] = {}
        # (path, operation, pool, index in it, dtype), or without a pool: (…, None, slot it follows from, dtype)
        self._log: list[tuple[str, str, _Pool | None, int, torch.dtype]] = []

    def read(self, path: str, op: str, flat: Tensor) -> int:
        """Look at a tensor now; gives the slot's number."""
        pool = self._pools.get((flat.dtype, flat.get_device()))
        if pool is None:
            key = (flat.dtype, flat.get_device())
            spare = _SPARE.get(key)
            pool = self._pools[key] = spare.pop() if spare else _Pool(flat.dtype, flat.device)
        index = pool.used
        if index == len(pool.pairs):
            pool.grow()
        torch.aminmax(flat, out=pool.pairs[index])
        pool.used = index + 1
        self._log.append((path, op, pool, index, flat.dtype))
        return len(self._log) - 1

    def derive(self, path: str, op: str, slot: int, dtype: torch.dtype) -> int:
        """A slot whose value follows from an earlier one: its cast to ``dtype``, or its square."""
        self._log.append((path, op, None, slot, dtype))
        return len(self._log) - 1

    def bring(self) -> _Raw:
        """The numbers, on the host; the slots are empty afterwards."""
        with torch.inference_mode():
            values = {pool: pool.values() for pool in self._pools.values()}
        for key, pool in self._pools.items():
            _SPARE.setdefault(key, []).append(pool)
        raw = _Raw(self._log, values)
        self._log, self._pools = [], {}
        return raw

    def take(self) -> list[Reading]:
        """All readings in order; the slots are empty afterwards."""
        return spell_out(self.bring())


def spell_out(raw: _Raw) -> list[Reading]:
    """Readings from numbers: derived ones computed, calls counted."""
    magnitudes: list[float] = []
    calls: dict[tuple[str, str], int] = {}
    readings = []
    for path, op, pool, index, dtype in raw.log:
        value = raw.values[pool][index] if pool is not None else _follow(magnitudes[index], dtype, op)
        magnitudes.append(value)
        call = calls.get((path, op), 0)
        calls[path, op] = call + 1
        readings.append(Reading(path, op, call, value, dtype))
    return readings


def _follow(value: float, dtype: torch.dtype, op: str) -> float:
    """Rounding is monotonic, so the cast (the square) of the largest magnitude is the largest of the casts."""
    result = torch.tensor(value, dtype=torch.float64).to(dtype)
    return float(result * result if op == "pow" else result)


class Readings:
    """What ``watch`` gives: a sequence of ``Reading``, filled when the block ends."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._raw: list[_Raw] = []
        self._spelled: list[Reading] = []

    def refresh(self) -> None:
        """Bring what was measured so far to the host."""
        self._raw.append(self._slots.bring())

    @property
    def _all(self) -> list[Reading]:
        while self._raw:
            self._spelled.extend(spell_out(self._raw.pop(0)))
        return self._spelled

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
