"""Run a part of the model watched, and once more, closely, where something was not finite or near a limit."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from qwen_precision.dtypes import REFERENCE, narrowest, overflows_from
from qwen_precision.probe.collect import Collector
from qwen_precision.probe.task import Task
from qwen_precision.qwen3 import row_of
from qwen_precision.torch_dtypes import torch_dtype
from qwen_precision.watcher import (
    Aside,
    Clamp,
    Inspector,
    Located,
    Onlooker,
    Reading,
    Spot,
    Watcher,
    bring,
    computing,
    spell_out,
    storages,
)


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
        out, aside = self.start(section)
        (readings,), _ = self.finish([(section, aside)])
        return out, readings

    def run_all(self, sections: Sequence[Section]) -> list[Tensor]:
        """Run several parts, readings of all in one transfer, and each once more, closely, where ``look`` would."""
        outs, started = self.start_all(sections)
        found, _ = self.finish(started)
        for section, readings in zip(sections, found, strict=True):
            self.look(section, readings)
        return outs

    def start_all(self, sections: Sequence[Section]) -> tuple[list[Tensor], list[tuple[Section, Aside]]]:
        """Run several parts, and leave their readings on the device, for ``finish``; what they gave stands first."""
        outs: list[Tensor] = []
        started: list[tuple[Section, Aside]] = []
        try:
            for section in sections:
                out, aside = self.start(section)
                outs.append(out)
                started.append((section, aside))
        except BaseException:
            self.finish(started)  # what ran before is kept
            raise
        return outs, started

    def start(self, section: Section) -> tuple[Tensor, Aside]:
        """Run a part, and leave its readings on the device."""
        self.watcher.forget()
        section.enter()
        with self._computing, self.watcher:
            out = section.forward()
        return out, self.watcher.set_aside()

    def rehearse(self, section: Section) -> None:
        """Run a part and wait for its readings, which nobody takes."""
        _, aside = self.start(section)
        bring([aside])

    def finish(
        self, started: Sequence[tuple[Section, Aside]], more: Sequence[Tensor] = ()
    ) -> tuple[list[list[Reading]], list[list[float]]]:
        """Readings of all that was started, in one transfer, and with them the numbers of more tensors."""
        raws, numbers = bring([aside for _, aside in started], more)
        found = [spell_out(raw) for raw in raws]
        for (section, _), readings in zip(started, found, strict=True):
            self.collector.add(*section.key, readings, fold=section.slice_at is not None)
        return found, numbers

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
            self._closely(section, inspector, readings)
            self._keep(section, self._tried(section, inspector.found))
        if self._beyond(section.key[0], readings, wide):
            self._foresee(section, readings, wide)

    def _closely(self, section: Section, inspector: Inspector, readings: list[Reading]) -> None:
        """Run a part again under an inspector; only if it does the same again are the places true.

        Operations that run in one of the two alone say nothing: some families set themselves up in their first forward.
        """
        _, again = self._again(section, inspector)
        before = {each.spot: repr(each.abs_max) for each in readings}  # NaN is what it is
        if any(before.get(each.spot, repr(each.abs_max)) != repr(each.abs_max) for each in again):
            self.collector.unsteady.add(section.key[0])

    def _foresee(self, section: Section, readings: list[Reading], wide: Container[Spot]) -> None:
        """Run a part of the reference again, to see where it leaves the range of the narrowest dtype by itself."""
        inspector = Inspector(section.valid, self._near, storages(section.module), self._limit, strict=self._strict)
        self._closely(section, inspector, readings)
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

    def _again(self, section: Section, onlooker: Onlooker) -> tuple[Tensor, list[Reading]]:
        self.watcher.forget()
        section.enter()
        self.watcher.inspect = onlooker
        try:
            with self._computing, self.watcher:
                out = section.forward()
        finally:
            self.watcher.inspect = None
            readings = self.watcher.take()
        return out, readings

    def _tried(self, section: Section, found: list[Located]) -> list[Located]:
        """All of them; origins that gave infinities alone with whether they made any difference.

        With the largest finite number in their place the same finite bits must come out: of a softmax (or what does
        its work), where one reads the operation, else of the whole part. Every number between the two then does the
        same, and the true one, which overflowed, is between them: what reads it is monotonic.
        """
        tried: list[Located] = []
        for spot, alike in groupby(found, key=lambda each: each.spot):
            members = list(alike)
            harmless = self._harmless_rows(section, spot, {each.event.row for each in members if _may_do_nothing(each)})
            for each in members:
                known = harmless[each.event.row] if _may_do_nothing(each) else None
                tried.append(replace(each, event=each.event.model_copy(update={"harmless": known})))
        return tried

    def _harmless_rows(self, section: Section, spot: Spot, rows: set[int | None]) -> dict[int | None, bool]:
        """Of rows of the batch: whether the infinities of an operation come to nothing."""
        if not rows:
            return {}
        softened = row_of(*spot).role in _SOFTENED

        def read(clamp: bool) -> dict[int | None, Tensor | None]:
            onlooker = Clamp(spot, clamp=clamp)
            out, _ = self._again(section, onlooker)
            return {row: self._mine(section, row, onlooker.read if softened else out, softened) for row in rows}

        before = {row: one for row, one in read(clamp=False).items() if one is not None and torch.isfinite(one).all()}
        after = read(clamp=True) if before else {}
        return {row: row in before and _same_bits(before[row], after[row]) for row in rows}

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


def _may_do_nothing(each: Located) -> bool:
    return each.infinite and each.event.clean_inputs and each.event.clean_weights


def _same_bits(one: Tensor, other: Tensor | None) -> bool:
    if other is None:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def suspicious(readings: list[Reading], near: float) -> bool:
    """Whether any reading is not finite or has less headroom than ``near``."""
    return any(not (reading.abs_max * near < torch.finfo(reading.dtype).max) for reading in readings)
