"""Gathers readings and close looks into the columns of a record while a probe runs."""

import math
from dataclasses import dataclass, field

from qwen_precision.dtypes import REFERENCE
from qwen_precision.qwen3 import layer_of
from qwen_precision.record import Event, LogitsCost, Massive, Pass, Reseed, Site, Upcast, rounded
from qwen_precision.torch_dtypes import short_name
from qwen_precision.watcher import Located, Reading

_STEPS_A_PART = 1_000_000  # more operations than any part (a layer, the head) of a model has


@dataclass
class _Column:
    abs_max: dict[int, float] = field(default_factory=dict)
    events: dict[tuple[int, int | None, int | None, bool], Event] = field(default_factory=dict)
    reseeded: list[Reseed] = field(default_factory=list)
    top1: list[int | None] = field(default_factory=list)
    layer_error: list[float | None] = field(default_factory=list)
    kl: list[float | None] = field(default_factory=list)
    massive: list[Massive] = field(default_factory=list)
    local_error: list[float | None] = field(default_factory=list)
    logprob_error: list[float | None] = field(default_factory=list)
    upcast: list[Upcast | None] = field(default_factory=list)
    parts: int = 0


class Collector:
    """Sites by name, columns by (dtype, prompt); gives ``Pass`` parts at any time, also half-way."""

    def __init__(self) -> None:
        self.sites: dict[tuple[str, str, int], int] = {}
        self.wider: dict[str, dict[int, str]] = {}
        self.casts: dict[int, int] = {}
        self.unsteady: set[str] = set()
        """Dtypes in which a part that was run again did something else."""
        self.logits: LogitsCost | None = None
        """What the logits took; None until all are there."""
        self._columns: dict[tuple[str, int], _Column] = {}

    def column(self, dtype: str, prompt: int) -> _Column:
        """The column of one pass, made when first asked for."""
        return self._columns.setdefault((dtype, prompt), _Column())

    def add(self, dtype: str, prompt: int, readings: list[Reading], fold: bool = False) -> None:
        """Take readings in; ``fold`` makes one site of calls that are slices of one operation."""
        self.column(dtype, prompt).parts += 1
        column = self.column(dtype, prompt).abs_max
        before_site: int | None = None
        for reading in readings:
            site = self._site(reading.module, reading.op, 0 if fold else reading.call)
            value, before = rounded(reading.abs_max), column.get(site)
            if before is None or math.isnan(value) or value > before:
                column[site] = value if before is None or not math.isnan(before) else before
            if reading.op == "cast" and before_site is not None:
                self.casts.setdefault(site, before_site)
            before_site = site
            computed = short_name(reading.dtype)
            if computed != dtype:
                self.wider.setdefault(dtype, {})[site] = computed

    def add_located(self, dtype: str, prompt: int, found: list[Located], fold: bool = False) -> None:
        """Take close looks in; of several alike at one site, row of the batch and expert the first stays."""
        column = self.column(dtype, prompt)
        for each in found:
            site = self._site(each.path, each.op, 0 if fold else each.call)
            step = column.parts * _STEPS_A_PART + each.event.step
            update = {"site": site, "value": rounded(each.event.value), "step": step}
            key = site, each.event.row, each.event.expert, each.event.clean_weights
            column.events.setdefault(key, each.event.model_copy(update=update))

    def _site(self, module: str, op: str, call: int) -> int:
        return self.sites.setdefault((module, op, call), len(self.sites))

    def site_parts(self) -> list[Site]:
        """All sites in the order they first ran."""
        return [Site(layer=layer_of(m), module=m, op=op, call=call) for m, op, call in self.sites]

    def passes(self) -> list[Pass]:
        """A ``Pass`` for every column; sites that did not run are null."""
        return [
            Pass(
                dtype=dtype,
                prompt=prompt,
                abs_max=[column.abs_max.get(site) for site in range(len(self.sites))],
                events=self._events(dtype, column),
                reseeded=column.reseeded,
                top1=column.top1,
                layer_error=column.layer_error,
                kl=column.kl,
                massive=column.massive,
                local_error=column.local_error,
                logprob_error=column.logprob_error,
                upcast=column.upcast,
            )
            for (dtype, prompt), column in self._columns.items()
        ]

    def _events(self, dtype: str, column: _Column) -> list[Event]:
        """In the order of the sites; not where the reference leaves a range that is not asked of anybody (norms)."""
        wide = {site for sites in self.wider.values() for site in sites} if dtype == REFERENCE else set()
        events = sorted(column.events.values(), key=lambda event: (event.site, event.row or 0, event.expert or 0))
        return [event for event in events if event.nan or event.inf or event.site not in wide]
