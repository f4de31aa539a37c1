"""Readings: one number an operation, gathered on the device and brought to the host in one go.

``Slots`` holds, for each device and dtype, a growing pool of zero-dimensional tensors that ``torch.aminmax``
writes its minimum and maximum into, so that no operation waits for the host and no small allocation is left
between large ones. A derived slot holds no tensor: it is computed on the host from the slot it follows from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_precision.torch_dtypes import widened

_FEW = 16
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
    """The how-manieth of this name in this module and forward, from 0."""
    abs_max: float
    """Largest magnitude; nan if any element is NaN, inf if any is infinite."""
    dtype: torch.dtype
    """Of the output."""
    forward: int = 0
    """The how-manieth call of the model in its block, from 0."""

    @property
    def headroom(self) -> float:
        """The dtype's largest number over the largest magnitude: 0 of what is not finite, inf of what is all zero."""
        if not self.finite:
            return 0.0
        return torch.finfo(self.dtype).max / self.abs_max if self.abs_max else math.inf

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
        """Room for more pairs: for few at first, because thousands of prompts' embeddings take a pool each for one."""
        room = min(max(len(self.pairs), _FEW), _POOL)
        block = torch.zeros((2, room), dtype=self.dtype, device=self.device)
        self.blocks.append(block)
        self.pairs.extend(zip(block[0].unbind(), block[1].unbind(), strict=True))

    def magnitudes(self) -> Tensor:
        """Largest magnitude of every used pair, still on the device; the pool is empty afterwards."""
        both = torch.cat(self.blocks, dim=1)[:, : self.used] if self.used else torch.zeros((2, 0), device=self.device)
        self.used = 0
        # abs() of a NaN is NaN and amax carries it, so NaN wins over infinity.
        return widened(both).abs().amax(dim=0)


@dataclass(frozen=True)
class Raw:
    """What one forward left, on the host but not yet spelled out."""

    log: list[tuple[str, str, _Pool | None, int, torch.dtype]]
    values: dict[_Pool, list[float]]
    begins: list[int]
    """Places in the log at which a module was called from outside."""


@dataclass(frozen=True)
class Aside:
    """What one forward left, still on the device."""

    log: list[tuple[str, str, _Pool | None, int, torch.dtype]]
    pools: list[_Pool]
    begins: list[int]


def bring(asides: Sequence[Aside], more: Sequence[Tensor] = ()) -> tuple[list[Raw], list[list[float]]]:
    """The numbers of several forwards, on the host: one transfer a device.

    Args:
        asides: what they left; their pools are free again.
        more: one-dimensional tensors whose numbers come along.
    """
    pools = [pool for aside in asides for pool in aside.pools]
    with torch.inference_mode():
        columns = [pool.magnitudes() for pool in pools] + [widened(each) for each in more]
        found = _on_the_host(columns)
    for pool in pools:
        _SPARE.setdefault((pool.dtype, pool.blocks[0].get_device()), []).append(pool)
    values = dict(zip(pools, found, strict=False))
    return [Raw(each.log, values, each.begins) for each in asides], found[len(pools) :]


def _on_the_host(columns: Sequence[Tensor]) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in columns]
    for device in dict.fromkeys(each.device for each in columns):
        mine = [place for place, each in enumerate(columns) if each.device == device]
        numbers, start = torch.cat([columns[place] for place in mine]).tolist(), 0
        for place in mine:
            found[place] = numbers[start : start + len(columns[place])]
            start += len(columns[place])
    return found


@dataclass
class Counted:
    """How far forwards and calls are counted, from one transfer to the next of the same block."""

    forward: int = -1
    calls: dict[tuple[str, str], int] = field(default_factory=dict)

    def begin(self) -> None:
        """Another forward: its calls count from 0."""
        self.forward += 1
        self.calls.clear()


_SPARE: dict[tuple[torch.dtype, int], list[_Pool]] = {}
"""Pools that nobody uses just now; making the views of a new one takes longer than reading a layer."""


class Slots:
    """The readings of one forward while it runs."""

    def __init__(self) -> None:
        self._pools: dict[tuple[torch.dtype, int], _Pool] = {}
        # (path, operation, pool, index in it, dtype), or without a pool: (…, None, slot it follows from, dtype)
        self._log: list[tuple[str, str, _Pool | None, int, torch.dtype]] = []
        self._begins: list[int] = []

    def begin(self) -> None:
        """A module is called from outside: another forward."""
        self._begins.append(len(self._log))

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

    def set_aside(self) -> Aside:
        """The numbers, still on the device; the slots are empty afterwards."""
        aside = Aside(self._log, list(self._pools.values()), self._begins)
        self._log, self._pools, self._begins = [], {}, []
        return aside

    def bring(self) -> Raw:
        """The numbers, on the host; the slots are empty afterwards."""
        (raw,), _ = bring([self.set_aside()])
        return raw

    def take(self) -> list[Reading]:
        """All readings in order; the slots are empty afterwards."""
        return spell_out(self.bring())


def spell_out(raw: Raw, counted: Counted | None = None) -> list[Reading]:
    """Readings from numbers: derived ones computed, calls counted.

    Args:
        raw: what was brought.
        counted: counts on from there, forward by forward; None to count all that was brought as one forward.
    """
    magnitudes: list[float] = []
    begins = [] if counted is None else list(reversed(raw.begins))
    counted = counted or Counted()
    readings = []
    for place, (path, op, pool, index, dtype) in enumerate(raw.log):
        while begins and begins[-1] <= place:
            begins.pop()
            counted.begin()
        value = raw.values[pool][index] if pool is not None else _follow(magnitudes[index], dtype, op)
        magnitudes.append(value)
        call = counted.calls.get((path, op), 0)
        counted.calls[path, op] = call + 1
        readings.append(Reading(path, op, call, value, dtype, max(counted.forward, 0)))
    for _ in begins:  # called, and nothing was read yet
        counted.begin()
    return readings


def _follow(value: float, dtype: torch.dtype, op: str) -> float:
    """Rounding is monotonic, so the cast (the square) of the largest magnitude is the largest of the casts."""
    result = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)
    return float(result * result if op == "pow" else result)
