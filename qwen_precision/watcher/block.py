"""Watch whatever a model does in a block, and ask what was measured: in the block, after it, as a table.

    with qwen_precision.watch(model) as readings:
        model(**inputs)
    print(readings)

Numbers stay on the device until somebody asks; asking brings those that are new.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any
from weakref import WeakSet

from torch import nn

from qwen_precision.errors import QprecError
from qwen_precision.qwen3 import name_of
from qwen_precision.torch_dtypes import short_name
from qwen_precision.watcher.mode import Watcher, attached, unwatched
from qwen_precision.watcher.readings import Counted, Raw, Reading, Spot, spell_out

_ROWS = 10
"""Operations that the table shows; the rest has more headroom and is counted."""
_COLUMNS = ("forward", "module", "op", "call", "name", "dtype", "abs_max", "headroom")

_WHOLE = "(model)"
"""The watched module itself, whose path is empty."""

_WATCHED: WeakSet[nn.Module] = WeakSet()
"""Models that are being watched just now."""


class Readings:
    """What ``watch`` gives: a sequence of ``Reading`` in the order in which operations ran; as text, the worst ones."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher: Watcher | None = watcher
        self._last: Raw | None = None
        self._counted = Counted()
        self._spelled: list[Reading] = []

    def refresh(self) -> None:
        """Bring what was measured since the last time to the host; whatever asks for readings does it by itself."""
        raw = self._last if self._watcher is None else self._watcher.so_far()
        if raw is not None:
            with unwatched():
                self._spelled += spell_out(raw, self._counted)
            self._last = None

    def close(self) -> None:
        """Bring the last of it, to be spelled out when somebody asks; nothing is added from here on."""
        if self._watcher is not None:
            self._last, self._watcher = self._watcher.so_far(), None

    def __iter__(self) -> Iterator[Reading]:
        self.refresh()
        return iter(self._spelled)

    def __len__(self) -> int:
        self.refresh()
        return len(self._spelled)

    def __getitem__(self, index: int) -> Reading:
        self.refresh()
        return self._spelled[index]

    def worst(self, count: int = _ROWS) -> list[Reading]:
        """The readings with the least headroom in their own dtype; of what is not finite, the first to run first.

        Raises:
            QprecError: nothing was measured.
        """
        return sorted(self._measured(), key=lambda reading: reading.headroom)[:count]

    def first_nonfinite(self) -> Reading | None:
        """The first operation whose output held a NaN or an infinity; None where all that ran was finite.

        Raises:
            QprecError: nothing was measured.
        """
        return next((reading for reading in self._measured() if not reading.finite), None)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, a row a reading: forward, module, op, call, name, dtype, abs_max, headroom.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            QprecError: nothing was measured.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError as error:
            if error.name != "pandas":
                raise
            sentence = "to_pandas() needs pandas, which is not installed; install it with: pip install pandas"
            raise ModuleNotFoundError(sentence, name="pandas") from error
        return pandas.DataFrame([_row(reading) for reading in self._measured()], columns=list(_COLUMNS))

    def __repr__(self) -> str:
        if not len(self):
            return "Readings: nothing was measured yet"
        worst: dict[Spot, Reading] = {}
        for reading in sorted(self._spelled, key=lambda reading: reading.headroom):
            worst.setdefault(reading.spot, reading)
        rows = [_cells(reading) for reading in list(worst.values())[:_ROWS]]
        table = [("module", "operation", "dtype", "largest", "headroom"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        rest = len(worst) - len(rows)
        return "\n".join([self._summary(len(worst)), *lines, *([f"… and {rest:,} more"] if rest else [])])

    def _summary(self, operations: int) -> str:
        forwards = self._spelled[-1].forward + 1
        text = f"{_counted(operations, 'operation')}, {_counted(forwards, 'forward')}: "
        bad = [reading for reading in self._spelled if not reading.finite]
        if not bad:
            return text + "every output finite; those with the least headroom:"
        return text + f"{_counted(len(bad), 'output')} not finite; the first to run stand first:"

    def _measured(self) -> list[Reading]:
        self.refresh()
        if not self._spelled:
            raise QprecError("nothing was measured: call the model, uncompiled, inside the `with` block.")
        return self._spelled


def _counted(how_many: int, thing: str) -> str:
    return f"{how_many:,} {thing}" + ("" if how_many == 1 else "s")


def _row(reading: Reading) -> tuple[Any, ...]:
    name = _name(reading)
    size = (short_name(reading.dtype), reading.abs_max, reading.headroom)
    return (reading.forward, *reading.spot, name, *size)


def _name(reading: Reading) -> str:
    return name_of(reading.module or _WHOLE, reading.op, reading.call)


def _cells(reading: Reading) -> tuple[str, ...]:
    room = "none" if not reading.headroom else "all" if math.isinf(reading.headroom) else f"{reading.headroom:.3g}x"
    return reading.module or _WHOLE, _name(reading), short_name(reading.dtype), f"{reading.abs_max:.4g}", room


def watch(model: nn.Module) -> AbstractContextManager[Readings]:
    """As ``qwen_precision.watch``, which documents it.

    Raises:
        TypeError: not a module.
    """
    if inspect.isclass(model):
        raise TypeError(f"watch: takes a loaded model, not the class {model.__name__}; give an instance of it.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"watch: takes a loaded model (a torch.nn.Module), not {type(model).__name__}; "
            "for a checkpoint that is not loaded use qwen_precision.probe_model."
        )
    return _watching(model)


@contextmanager
def _watching(model: nn.Module) -> Iterator[Readings]:
    if model in _WATCHED:
        raise QprecError("watch: this model is being watched already; ask the readings of the outer `with` block.")
    watcher = Watcher()
    readings = Readings(watcher)
    _WATCHED.add(model)
    try:
        with attached(model, watcher), watcher:
            yield readings
    finally:
        _WATCHED.discard(model)
        readings.close()
