"""Run a part of the model watched, and once more, closely, where something was not finite or near a limit."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qwen_precision.dtypes import REFERENCE, narrowest, overflows_from
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.task import Task
from qwen_precision.qwen3 import row_of
from qwen_precision.torch_dtypes import torch_dtype
from qwen_precision.watcher import Clamp, Inspector, Located, Onlooker, Reading, Spot, Watcher, computing, storages


@dataclass(frozen=True)
class Section:
    """A part of the model, ready to be run; always with the same result."""

    key: tuple[str, int]
    """Dtype and prompt."""
    valid: Tensor
    """``[batch, tokens]`` bool, False at padding."""
    module: nn.Module
    """Whose weights are used."""
    forward: Callable[[], Tensor]
    enter: Callable[[], None] = lambda: None
    """Sets the watcher's path and masks before each run."""
    slice_at: tuple[int, int] | None = None
    """For a part that is a slice of one operation, its first position and first channel."""


class WatchedRun:
    """Puts the readings of watched parts into the collector.

    Args:
        watcher: attached to the model.
        collector: takes what was measured.
        task: which dtypes run, and from where on to look closely.
        strict: as for ``Inspector``.
    """

    def __init__(self, watcher: Watcher, collector: Collector, task: Task, strict: bool = False) -> None:
        self.watcher, self.collector, self._near, self._strict = watcher, collector, task.near, strict
        self._computing = computing(task.arithmetic)
        self._narrow = narrowest(task.dtypes)
        self._limit = overflows_from(self._narrow) if self._narrow is not None else None
        self._largest: dict[int, dict[Spot, list[tuple[int, ...]]]] = {}

    def run(self, section: Section) -> tuple[Tensor, list[Reading]]:
        """Run a part; gives what it gives, and the reading of every operation."""
        self.watcher.forget()
        section.enter()
        with self._computing, self.watcher:
            out = section.forward()
        readings = self.watcher.take()
        self.collector.add(*section.key, readings, fold=section.slice_at is not None)
        return out, readings

    def wide(self, ran: Mapping[tuple[str, int], list[Reading]], prompt: int) -> set[Spot]:
        """Of what ran of a prompt, by dtype: the operations that the narrowest dtype computes in a wider format."""
        if self._narrow is None:
            return set()
        own = torch_dtype(self._narrow)
        return {each.spot for each in ran[self._narrow, prompt] if each.dtype != own}

    def is_asked(self, dtype: str, readings: list[Reading], wide: Container[Spot] = ()) -> bool:
        """Whether ``look`` would run a part again; arguments as there."""
        return suspicious(readings, self._near) or self._beyond(dtype, readings, wide)

    def look(self, section: Section, readings: list[Reading], wide: Container[Spot] = ()) -> None:
        """Run a part that was run before once more, closely, if anything in it was not finite or near a limit.

        The reference is looked at where it leaves the narrowest range, too. Of several elements that failed
        alike, the one is named where it is largest: so look at the reference first.

        Args:
            section: the part.
            readings: that it gave.
            wide: operations that the narrowest dtype computes in a wider format.
        """
        if suspicious(readings, self._near):
            largest = self._largest.get(section.key[1], {})
            inspector = Inspector(
                section.valid, self._near, storages(section.module), prefer=largest, strict=self._strict
            )
            self._again(section, inspector)
            self._keep(section, [self._tried(section, each) for each in inspector.found])
        if self._beyond(section.key[0], readings, wide):
            self._foresee(section, wide)

    def _foresee(self, section: Section, wide: Container[Spot]) -> None:
        """Run a part of the reference again, to see where it leaves the range of the narrowest dtype by itself."""
        inspector = Inspector(section.valid, self._near, storages(section.module), self._limit, strict=self._strict)
        self._again(section, inspector)
        found = [each for each in inspector.found if each.spot not in wide]
        largest = self._largest[section.key[1]] = {}
        for each in found:
            largest.setdefault(each.spot, []).append(each.index)
        self._keep(section, found)

    def _beyond(self, dtype: str, readings: list[Reading], wide: Container[Spot]) -> bool:
        """Whether this is the reference, and it leaves the narrowest dtype's range."""
        if self._limit is None or dtype != REFERENCE:
            return False
        large = [each for each in readings if not each.abs_max < self._limit]
        return any(each.spot not in wide for each in large)

    def _again(self, section: Section, onlooker: Onlooker) -> Tensor:
        section.enter()
        self.watcher.inspect = onlooker
        try:
            with self._computing, self.watcher:
                return section.forward()
        finally:
            self.watcher.inspect = None
            self.watcher.take()

    def _tried(self, section: Section, each: Located) -> Located:
        """An origin that gave infinities alone, with whether they made any difference.

        With the largest finite number in their place the same finite bits must come out: of a softmax (or what does
        its work), where one reads the operation, else of the whole part. Every number between the two then does the
        same, and the true one, which overflowed, is between them: what reads it is monotonic.
        """
        event, spot = each.event, each.spot
        if not (each.infinite and event.clean_inputs and event.clean_weights):
            return each
        softened = row_of(*spot).role in _SOFTENED
        before, after = Clamp(spot, clamp=False), Clamp(spot, clamp=True)
        out = self._again(section, before)
        one = self._mine(section, event.row, before.read if softened else out, softened)
        if one is None or not bool(torch.isfinite(one).all()):
            return replace(each, event=event.model_copy(update={"harmless": False}))
        out = self._again(section, after)
        other = self._mine(section, event.row, after.read if softened else out, softened)
        same = other is not None and _same_bits(one, other)
        return replace(each, event=event.model_copy(update={"harmless": same}))

    def _mine(self, section: Section, row: int | None, read: Tensor | None, softened: bool) -> Tensor | None:
        """What counts of a row: its real tokens, but of a layer's output all, for the next layer reads padding too.

        Args:
            section: the part that ran.
            row: of the batch.
            read: ``[batch, …, tokens, …]``, ``[batch * tokens, experts]``, or of a whole model ``[batch, labels]``.
        """
        rows, tokens = section.valid.shape
        if read is None or row is None:
            return read
        last = softened or self._strict
        valid = section.valid[row] if last else torch.ones_like(section.valid[row])
        if read.dim() == 4 and read.shape[0] == rows and read.shape[2] == tokens:
            return read[row][:, valid]
        if read.dim() == 3 and read.shape[:2] == (rows, tokens):
            return read[row, valid]
        if read.shape[0] == rows * tokens:
            return read.view(rows, tokens, -1)[row, valid]
        return read[row] if read.shape[0] == rows else read

    def _keep(self, section: Section, found: list[Located]) -> None:
        moved = [each.shifted(*section.slice_at) for each in found] if section.slice_at else found
        self.collector.add_located(*section.key, moved, fold=section.slice_at is not None)


_SOFTENED = ("scores", "router")
"""Roles of operations whose output a softmax (or what does its work) reads."""


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def suspicious(readings: list[Reading], near: float) -> bool:
    """Whether any reading is not finite or has less headroom than ``near``."""
    return any(not (reading.abs_max * near < torch.finfo(reading.dtype).max) for reading in readings)
