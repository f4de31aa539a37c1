"""A Run as the checks look at it: columns by dtype and prompt, limits by site, headroom by site."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_precision.dtypes import REFERENCE, largest, overflows_from
from qwen_precision.judge.findings import Corpus, Headroom, Limits, Place, Token
from qwen_precision.judge.logits import Bought, bought
from qwen_precision.judge.precision import Sums, sums
from qwen_precision.qwen3 import has_qk_norm, name_of, row_of
from qwen_precision.record import Event, Pass, Run, Site

Array = NDArray[Any]
Where = tuple[int, int | None]
"""An operation, by number, and the expert whose it is."""

_MIXING = ("scaled_dot_product_attention", "matmul", "bmm", "softmax")
"""Operations in which one token reads others."""
_EXPERT = re.compile(r"experts\.\d+")

_NOTHING = -1.0  # stands for null in an array; magnitudes are not negative


class Columns:
    """Columns of a Run by dtype and prompt, and what headroom means for each site.

    Args:
        run: the columns.
        limits: from where on something is worth a finding.
        corpus: of what more prompts the run's stand for.
        record: where the run is saved, as a word of a command line.
    """

    def __init__(self, run: Run, limits: Limits, corpus: Corpus | None = None, record: str = "RUN") -> None:
        self.run, self.limits, self.record = run, limits, record
        self._corpus = corpus
        self.by_key = {(each.dtype, each.prompt): each for each in run.passes}
        self.sparse = {site.layer for site in run.sites if ".experts" in site.module}
        """Layers that have experts."""
        self.qk_norm = has_qk_norm(site.module for site in run.sites)
        """Whether q and k have norms of their own."""
        self._foreseen = {
            each.prompt: [
                event
                for event in each.events
                if event.clean_inputs and event.clean_weights and not (event.nan or event.inf)
            ]
            for each in run.passes
            if each.dtype == REFERENCE
        }
        self._passes: dict[str, list[Pass]] = {}
        for each in run.passes:
            self._passes.setdefault(each.dtype, []).append(each)
        self._outcome: dict[str, tuple[list[int], list[int]]] = {}
        self._clean_ids: dict[str, set[int]] = {}
        self._headroom: dict[str, list[Headroom]] = {}
        self._columns: dict[tuple[str, int], Array] = {}
        self._known: dict[tuple[str, int], Array] = {}

    @cached_property
    def sums(self) -> Mapping[str, Sums]:
        """By dtype: what its precision is made of."""
        return self._corpus.sums if self._corpus is not None else sums(self.run)

    @cached_property
    def bought(self) -> Mapping[str, Bought]:
        """By dtype: what a softmax in float32 is worth, over all prompts."""
        return self._corpus.bought if self._corpus is not None else bought(self.run)

    def failing(self, dtype: str) -> tuple[int, int] | None:
        """How many prompts fail, of how many; None where the run holds all of them."""
        across = self._corpus.across if self._corpus is not None else ()
        found = next((each for each in across if each.dtype == dtype), None)
        return (found.failing, self._corpus.prompts) if found is not None and self._corpus is not None else None

    def passes(self, dtype: str) -> list[Pass]:
        """All passes of a dtype, prompt by prompt."""
        return self._passes.get(dtype, [])

    def by_outcome(self, dtype: str) -> tuple[list[int], list[int]]:
        """Prompts on which a dtype failed, and the others; found once, for every finding asks."""
        if dtype not in self._outcome:
            told = [(each.prompt, each.failed) for each in self.passes(dtype)]
            self._outcome[dtype] = [n for n, failed in told if failed], [n for n, failed in told if not failed]
        return self._outcome[dtype]

    def clean_ids(self, dtype: str) -> set[int]:
        """All token ids of the prompts on which a dtype did not fail."""
        if dtype not in self._clean_ids:
            rows = (row for number in self.by_outcome(dtype)[1] for row in self.run.prompts[number].rows)
            self._clean_ids[dtype] = {token for row in rows for token in row.ids}
        return self._clean_ids[dtype]

    def limit(self, dtype: str, site: int) -> float:
        """The largest finite number of the format the site computes in."""
        return largest(self.run.wider.get(dtype, {}).get(site, dtype))

    def wider(self, dtype: str) -> set[int]:
        """Sites that compute in another format than the dtype."""
        return {site for site, name in self.run.wider.get(dtype, {}).items() if name != dtype}

    def edge(self, dtype: str, site: int) -> float:
        """The least magnitude that overflows in the format the site computes in."""
        return overflows_from(self.run.wider.get(dtype, {}).get(site, dtype))

    def foreseen(self, prompt: int) -> list[Event]:
        """Where the reference leaves the narrowest range by itself, row by row; all that went in was inside."""
        return self._foreseen.get(prompt, [])

    def place(self, event: Event) -> Where:
        """What would have to change: the operation, in whichever call of it; of experts, that of one."""
        return self._places[event.site], event.expert

    def origins(self, each: Pass) -> list[Event]:
        """Where something not finite began, in the order it ran.

        Behind a clamp (the reference itself was beyond the range when a dead row was to be continued from it) the row
        is nobody's, and what it does there is no evidence.
        """
        return [
            event
            for event in sorted(each.events, key=lambda event: event.step)
            if (event.nan or event.inf)
            and event.clean_inputs
            and event.clean_weights
            and not any(
                seed.clamped and (event.row or 0) in seed.rows and seed.layer <= self.depth(event.site)
                for seed in each.reseeded
            )
        ]

    def spared(self, each: Pass, event: Event) -> bool:
        """Whether only pad positions went bad in a pass, and what real tokens give came out finite all the same."""
        row = event.row or 0
        answered = row < len(each.top1) and each.top1[row] is not None  # of a replaced stream nothing is kept
        return answered and all(one.in_padding for one in each.events if one.nan or one.inf)

    def came_to_nothing(self, each: Pass, site: int) -> bool:
        """Whether a pass has no number of its own at a site: it was bad there, or had been replaced before."""
        dead = any(event.site == site and (event.nan or event.inf) for event in each.events)
        return dead or any(seed.layer <= self.depth(site) for seed in each.reseeded)

    def is_meant(self, each: Pass, site: int) -> bool:
        """Whether the reference is infinite at a site as well, and takes no harm: the model says never by it."""
        reference = self.by_key.get((REFERENCE, each.prompt))
        return reference is not None and any(event.site == site and event.harmless for event in reference.events)

    def is_read(self, site: int) -> bool:
        """Whether other tokens read what a site gives at one: attention follows."""
        return any(each.op in _MIXING for each in self.run.sites[site + 1 :])

    def uses(self, site: int, module: str) -> bool:
        """Whether a site works with the weights of a module; tied, lm_head has those of the embedding."""
        own = self.run.sites[site]
        tied = self.run.model.tied_embeddings and row_of(module, "embedding", 0).role == "embedding"
        return own.module == module or (tied and row_of(own.module, own.op, own.call).role == "logits")

    @cached_property
    def _places(self) -> list[int]:
        """By site: a number, the same for calls that nobody can tell apart (a module run again, a loop's turns)."""
        numbers: dict[tuple[str, str], int] = {}
        keys = ((site.module, name_of(*_spot(site))) for site in self.run.sites)
        return [numbers.setdefault(key, len(numbers)) for key in keys]

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """By site: a number, the same for all turns of a loop, over experts say, which only together are whole."""
        numbers: dict[tuple[Any, ...], int] = {}
        keys = [
            (_EXPERT.sub("experts", site.module), site.op, row_of(*_spot(site), site.layer in self.sparse).call)
            for site in self.run.sites
        ]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def depth(self, site: int) -> float:
        """The layer of a site; before all layers for what ran before them (embeddings), behind them for the rest."""
        layer = self.run.sites[site].layer
        if layer is not None:
            return layer
        return -1 if site < self._first_layered else math.inf

    def depth_of(self, site: Site) -> float:
        """``depth`` of a site that another run names."""
        if site.layer is not None:
            return site.layer
        alike = (number for number, each in enumerate(self.run.sites) if each.module == site.module)
        return self.depth(next(alike, len(self.run.sites) - 1))

    @cached_property
    def _first_layered(self) -> int:
        return next((number for number, site in enumerate(self.run.sites) if site.layer is not None), 0)

    def magnitude(self, each: Pass, site: int) -> float | None:
        """Largest magnitude the site would have: the reference's if it ran it, else the dtype's own.

        A cast has no counterpart in the reference, which has nothing to cast: its input's is taken.
        """
        value = float(self._magnitudes(each)[site])
        return None if value == _NOTHING else value

    def judged(self, dtype: str) -> tuple[list[Pass], Array, Array]:
        """Passes of a dtype, ``[passes, sites]`` magnitudes, and where a site ran and computes in the dtype itself."""
        passes = self.passes(dtype)
        sites = len(self.run.sites)
        if not passes or not sites:
            return passes, np.zeros((0, sites)), np.zeros((0, sites), dtype=bool)
        values = np.stack([self._magnitudes(each) for each in passes])
        ran = np.stack([self._column(each) for each in passes]) != _NOTHING
        ran[:, sorted(self.wider(dtype))] = False
        return passes, values, ran

    def _magnitudes(self, each: Pass) -> Array:
        """``magnitude`` of every site; -1 where there is none."""
        key = (each.dtype, each.prompt)
        if key not in self._known:
            self._known[key] = self._looked_up(each)
        return self._known[key]

    def _looked_up(self, each: Pass) -> Array:
        own = self._column(each)
        reference = self.by_key.get((REFERENCE, each.prompt))
        if reference is None or each.dtype == REFERENCE:
            return own
        theirs = self._column(reference)
        values = theirs.copy()
        for site, source in self.run.casts.items():
            if theirs[site] == _NOTHING:
                values[site] = theirs[source]
        return np.where(values == _NOTHING, own, values)

    def _column(self, each: Pass) -> Array:
        key = (each.dtype, each.prompt)
        if key not in self._columns:
            self._columns[key] = np.array([_NOTHING if v is None else v for v in each.abs_max], dtype=np.float64)
        return self._columns[key]

    def headroom(self, dtype: str) -> list[Headroom]:
        """The least headroom of every site that computes in the dtype itself, smallest first."""
        if dtype not in self._headroom:
            self._headroom[dtype] = self._least(dtype)
        return self._headroom[dtype]

    def rooms(self, dtype: str) -> tuple[list[Pass], Array, Array]:
        """Passes of a dtype, ``[passes, sites]`` magnitudes and headroom; NaN where a site has none in the dtype."""
        passes, values, ran = self.judged(dtype)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            room = np.where(np.isfinite(values), np.where(values == 0, math.inf, largest(dtype) / values), 0.0)
        return passes, values, np.where(ran, room, math.nan)

    def _least(self, dtype: str) -> list[Headroom]:
        passes, values, room = self.rooms(dtype)
        some = np.flatnonzero(~np.isnan(room).all(axis=0))
        if not len(some):
            return []
        first = np.nanargmin(room[:, some], axis=0)
        order = np.argsort(room[first, some], kind="stable")
        sites, rows = some[order], first[order]
        columns = (sites, rows, values[rows, sites], room[rows, sites])
        return [
            Headroom(dtype, site, value, left, passes[row].prompt)
            for site, row, value, left in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _spot(site: Site) -> tuple[str, str, int]:
    return site.module, site.op, site.call


def narrow_sums(run: Run) -> bool:
    """Whether sums of fp16 products were kept in fp16: by the run's arithmetic, or by torch's flag on a card."""
    asked = run.settings.get("arithmetic") == "fp16-accumulate"
    return asked or run.environment.get("allow_fp16_accumulation") == "True"


def place_of(columns: Columns, each: Pass, number: int, event: Event | None) -> Place:
    """A site, and where in it, if an event tells."""
    site = columns.run.sites[number]
    place = Place(
        layer=site.layer,
        module=site.module,
        op=site.op,
        name=name_of(site.module, site.op, site.call),
        site=number,
        prompt=columns.run.prompts[each.prompt].name,
    )
    if event is None:
        return place
    token = token_of(columns.run, each, event)
    place = replace(place, token=token, channel=event.channel, head=event.head, expert=event.expert)
    if row_of(site.module, site.op, site.call).role != "scores" or event.channel is None:
        return place
    return replace(place, channel=None, key=token_of(columns.run, each, event, event.channel))


def token_of(run: Run, each: Pass, event: Event, position: int | None = None) -> Token | None:
    """The token an event was placed at, or another of its row; None where it has no place."""
    if event.position is None or event.row is None:
        return None
    position = event.position if position is None else position
    row = run.prompts[each.prompt].rows[event.row]
    index = position - row.padding
    padding = index < 0 or index >= len(row.ids)
    return Token(
        position=position,
        id=None if padding else row.ids[index],
        text=None if padding or index >= len(row.tokens) else row.tokens[index],
        row=event.row,
        padding=padding,
    )
