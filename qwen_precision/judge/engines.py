"""A verdict for each engine from one Run: which of the values that pass through fp16 there leave its range. No torch.

A Run holds the fp32 magnitude of every operation. Engines differ in which of these numbers are ever stored in fp16
(``settings/engines.py``), so what breaks where is read off the reference, with no further forward. It is about the
range alone. What the fp16 pass showed counts too, where there was one: an overflow that did no harm is no failure, and
a sum that left the range on its way is one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from qwen_precision.dtypes import DTYPES, REFERENCE, RESCUED
from qwen_precision.judge.columns import Array, Columns, narrow_sums, place_of
from qwen_precision.judge.findings import EngineVerdict, Finding, Place, Report, limits_of
from qwen_precision.qwen3 import CACHED, is_product, layer_of, name_of, operands, row_of
from qwen_precision.settings import ALL, EVIDENCE, Engine, Option, Rule, load_engines

FORMAT = DTYPES[RESCUED]
"""The format that all rules are about."""


def with_engines(report: Report, engines: Sequence[Engine] = ()) -> Report:
    """The report with a verdict for each of these engines; of none, for all that are known where it matters."""
    values = _Values(report)
    asked = engines or (load_engines([ALL]) if _at_risk(report) else ())
    return replace(report, engines=tuple(_verdict(values, engine) for engine in asked))


def _at_risk(report: Report) -> bool:
    """Whether fp16 fails or is at risk somewhere, so that it matters which engine it is."""
    return report.run.generation is None and report.verdict.get(RESCUED) in ("fail", "risk")


class _Passing(NamedTuple):
    """A value that passes through fp16: the output of an operation, or at a place that is none."""

    where: int | Place
    value: str
    rule: Rule
    magnitude: float
    order: float
    """Of the forward."""
    fails: bool

    @property
    def headroom(self) -> float:
        return FORMAT.max / self.magnitude if self.magnitude else math.inf


def _verdict(values: "_Values", engine: Engine) -> EngineVerdict:
    dead = values.dead
    if dead is not None:  # not a matter of fp16
        return EngineVerdict(engine, "fail", dead.place, None, None, dead.magnitude.reference, 0.0, ())
    rules = [rule for rule in engine.rules if not rule.models or values.run.model.architecture in rule.models]
    passing = list(_passing(values, rules))
    missing = values.missing(each for rule in rules for each in rule.values)
    absent = tuple(_absent(values, engine, rules))
    failing = [each for each in passing if each.fails]
    near = [each for each in passing if each.headroom < values.near]
    verdict = "fail" if failing else "risk" if near else "incomplete" if missing or absent else "ok"
    if not passing:
        return EngineVerdict(engine, verdict, None, None, None, None, None, missing, absent)
    shown = min(failing, key=lambda each: each.order) if failing else min(passing, key=lambda each: each.headroom)
    place = shown.where if isinstance(shown.where, Place) else values.place(shown.where)
    bad = failing or near
    by = [rule for rule in rules if any(each.rule is rule for each in bad)]
    kinds = tuple(dict.fromkeys(each.value for each in bad))
    numbers = shown.value, shown.rule, shown.magnitude, shown.headroom
    return EngineVerdict(engine, verdict, place, *numbers, missing, absent, tuple(by), kinds, tuple(_ways(by)))


def _ways(rules: Sequence[Rule]) -> list[tuple[Option, ...]]:
    """What avoids all of these rules: each option that does alone; else options that do together, one for each rule."""
    if not rules:
        return []
    told: dict[str, Option] = {}  # where one is told in several rules, with the weakest evidence
    for option in (each for rule in rules for each in rule.avoid):
        known = told.setdefault(option.option, option)
        if EVIDENCE.index(option.evidence) > EVIDENCE.index(known.evidence):
            told[option.option] = option
    avoided = [[option.option for option in rule.avoid] for rule in rules]
    alone = [name for name in avoided[0] if all(name in each for each in avoided)]
    if alone or not all(avoided):
        return [(told[name],) for name in alone]
    together: list[str] = []
    for names in avoided:
        if not set(names) & set(together):
            together.append(max(names, key=lambda name: sum(name in each for each in avoided)))
    return [tuple(told[name] for name in together)]


def _absent(values: "_Values", engine: Engine, rules: Sequence[Rule]) -> Iterator[str]:
    """What rules are about and the run has none of, although it has others of the kind."""
    if engine.rules and not rules:
        yield f"none of its rules is about {values.run.model.architecture}"
    for rule in rules:
        for value in rule.values:
            kind = values.sites(value)
            if values.ran and value in SITES and not values.sites(value, rule) and (kind or value in _BY_TYPE):
                more = f" and {len(rule.modules) - _NAMED} more" if len(rule.modules) > _NAMED else ""
                within = f" in {', '.join(rule.modules[:_NAMED])}{more}" if kind else ""
                yield f"{value}{within}: no operation of this kind in the run"


_BY_TYPE = ("outputs", "outputs but scores", "products", "sums")
"""Kinds that are told by what an operation is; of others a record may hold some and not know them by name."""
_NAMED = 2
"""Paths of a rule that are named; the rest is counted."""


def _passing(values: "_Values", rules: Sequence[Rule]) -> Iterator[_Passing]:
    """By rule, of what passes through fp16 as each kind of value: the first that fails, what has the least headroom.

    Of an operation that saturates by one rule no other fails.
    """
    saturating = {site for rule in rules if rule.saturates for each in rule.values for site in values.sites(each, rule)}
    for rule in rules:
        for value in rule.values:
            if value == "weights":
                yield from values.weights(rule)
            yield from values.measured(value, rule)
            mine = values.sites(value, rule)
            first = values.first_beyond(mine - saturating)
            for site in {each for each in (first, values.tightest(mine)) if each is not None}:
                size, order = float(values.peaks[0][site]), values.run.casts.get(site, site)
                yield _Passing(site, value, rule, size, order, site == first)


class _Values:
    """The numbers of a Run by what they are to an engine."""

    def __init__(self, report: Report) -> None:
        self.run = report.run
        self.columns = Columns(report.run, limits_of(report.run.settings))
        self.near = self.columns.limits.near_overflow
        self._findings = report.findings
        self._sites: dict[str, set[int]] = {}

    @cached_property
    def dead(self) -> Finding | None:
        """What is not finite in fp32 either: then no engine answers."""
        return next((each for each in self._findings if each.dtype == REFERENCE and each.severity == "error"), None)

    @cached_property
    def peaks(self) -> tuple[Array, Array]:
        """By site: largest finite magnitude in the reference, -1 where it did not run there; and on which prompt.

        A cast that only a 16-bit pass has takes what it casts.
        """
        size, prompt = np.full(len(self.run.sites), -1.0), np.zeros(len(self.run.sites), dtype=int)
        for each in self.columns.passes(REFERENCE):
            found = np.array([-1.0 if value is None else value for value in each.abs_max])
            larger = np.isfinite(found) & (found > size)
            size[larger], prompt[larger] = found[larger], each.prompt
        for site, source in sorted(self.run.casts.items()):
            if size[site] < 0:
                size[site], prompt[site] = size[source], prompt[source]
        return size, prompt

    @cached_property
    def rows(self) -> list[tuple[str | None, str, str | None]]:
        """By site: its name in the table of operations, the same with its module's, its role."""
        rows = [(site, row_of(site.module, site.op, site.call)) for site in self.run.sites]
        return [(row.name, name_of(site.module, site.op, site.call), row.role) for site, row in rows]

    @cached_property
    def wide(self) -> set[int]:
        """Operations that a 16-bit pass of transformers computes in fp32; the insides of norms, if there was none."""
        sixteen = next((each for each in (RESCUED, "bf16") if self.columns.passes(each)), None)
        return (self.columns.wider(sixteen) if sixteen else set()) | _INSIDE(self)

    @property
    def ran(self) -> bool:
        """Whether anything ran in the reference."""
        return bool((self.peaks[0] >= 0).any())

    @cached_property
    def operands(self) -> tuple[set[int], list[str]]:
        """What products read, and products of which that is not known."""
        return operands(self.run.sites)

    def sites(self, value: str, rule: Rule | None = None) -> set[int]:
        """The operations whose outputs pass through fp16 as this, and that ran; none for what is no output."""
        if value not in self._sites:
            found = SITES[value](self) if value in SITES else set()
            self._sites[value] = {site for site in found if self.peaks[0][site] >= 0}
        if rule is None or not rule.modules:
            return self._sites[value]
        return {site for site in self._sites[value] if rule.holds_for(self.run.sites[site].module)}

    def tightest(self, sites: set[int]) -> int | None:
        """Of these operations the one with the least headroom."""
        numbers = np.array(sorted(sites), dtype=int)
        return int(numbers[self.peaks[0][numbers].argmax()]) if len(numbers) else None

    def first_beyond(self, sites: set[int]) -> int | None:
        """Of these operations the first that leaves the range and does harm; a cast stands where what it casts does."""
        numbers = np.array(sorted(sites), dtype=int)
        beyond = numbers[self.peaks[0][numbers] >= FORMAT.overflows_from].tolist()
        in_order = sorted(beyond, key=lambda site: self.run.casts.get(site, site))
        return next((site for site in in_order if not self.spared(site)), None)

    def place(self, site: int) -> Place:
        """An operation, and where in it the reference is largest, if the record tells."""
        reference = self.columns.by_key[REFERENCE, int(self.peaks[1][site])]
        seen = (each for each in reference.events if each.site == site and not (each.nan or each.inf))
        return place_of(self.columns, reference, site, next(seen, None))

    def spared(self, site: int) -> bool:
        """Whether an overflow was seen to do no harm, or lies at pad positions that no token reads."""
        prompt = int(self.peaks[1][site])
        own = self.columns.by_key.get((RESCUED, prompt))
        began = [event for event in self.columns.origins(own) if event.site == site] if own is not None else []
        if own is not None and began:
            return all(event.harmless or self.columns.spared(own, event) for event in began)
        seen = [event for event in self.columns.by_key[REFERENCE, prompt].events if event.site == site]
        return bool(seen) and all(event.in_padding for event in seen) and not self.columns.is_read(site)

    def weights(self, rule: Rule) -> Iterator[_Passing]:
        """Weights that fp16 cannot hold."""
        for weight in self.run.weights:
            module, _, leaf = weight.parameter.rpartition(".")
            if weight.overflow.get(RESCUED) and rule.holds_for(module):
                name = f"{module.rpartition('.')[2] or weight.parameter} {leaf}"
                place = Place(layer=layer_of(module), module=module, op="weight", name=name)
                yield _Passing(place, "weights", rule, float(weight.abs_max), -1, not rule.saturates)

    def measured(self, value: str, rule: Rule) -> Iterator[_Passing]:
        """Overflows of the fp16 pass itself although fp32's magnitude is inside: a sum left the range on its way."""
        if value not in (("sums",) if narrow_sums(self.run) else ("outputs", "outputs but scores")):
            return
        for each in self._findings:
            site, size = each.place.site, each.magnitude.reference
            if (each.dtype, each.kind, each.severity) != (RESCUED, "overflow", "error") or site is None:
                continue
            if not rule.holds_for(self.run.sites[site].module) or (value in SITES and site not in self.sites(value)):
                continue
            if is_product(self.run.sites[site]) and size is not None and size < FORMAT.overflows_from:
                yield _Passing(each.place, "sums", rule, size, site, not rule.saturates)

    def missing(self, values: Iterator[str]) -> tuple[str, ...]:
        """What the record lacks of these."""
        if self.run.generation is not None:
            return ("magnitudes: a generation has none; probe the checkpoint",)
        if not self.columns.passes(REFERENCE):
            return ("magnitudes in fp32",)
        found = [said for value in values for said in self._lacking(value)]
        if self.run.stopped:
            found.append(f"what was not reached ({self.run.stopped})")
        return tuple(dict.fromkeys(found))

    def _lacking(self, value: str) -> Iterator[str]:
        if value == "weights" and RESCUED not in {each.dtype for each in self.run.weight_totals}:
            yield f"weights against fp16: probe with --dtype {RESCUED}"
        elif value == "sums" and not (narrow_sums(self.run) and self.columns.passes(RESCUED)):
            yield "partial sums: probe with --arithmetic fp16-accumulate"
        elif value == "operands" and self.operands[1]:
            unknown = self.operands[1]
            more = f" and {len(unknown) - 2} more" if len(unknown) > 2 else ""
            yield f"what is multiplied for {', '.join(unknown[:2])}{more}"
        elif value.endswith("squares") and any(site.op.endswith(_FUSED) for site in self.run.sites):
            yield "the insides of norms, which ran as one kernel"
        elif value in SITES and value not in _BY_TYPE and not self.sites(value):
            yield f"{value}: none is known by name"


_FUSED = ("layer_norm", "rms_norm")
"""Ends of the names of operations that are a whole norm."""

_Select = Callable[[_Values], set[int]]


def _named(*names: str) -> _Select:
    """Operations that have one of these names, alone or with their module's."""
    return lambda values: {
        number for number, (name, whole, _) in enumerate(values.rows) if name in names or whole in names
    }


def _in_role(*roles: str) -> _Select:
    return lambda values: {number for number, (_, _, role) in enumerate(values.rows) if role in roles}


def _products(values: _Values) -> set[int]:
    """A sum ends in the output of its product, and may leave the range before."""
    return {number for number, site in enumerate(values.run.sites) if is_product(site)}


def _outputs(values: _Values) -> set[int]:
    return set(range(len(values.run.sites))) - values.wide


_INSIDE = _named("square", "mean square", "mean square plus eps", "reciprocal root")

SITES: dict[str, _Select] = {
    "outputs": _outputs,
    "outputs but scores": lambda values: _outputs(values) - _in_role("scores")(values),
    "products": _products,
    "sums": _products,
    "operands": lambda values: values.operands[0],
    "residual": _in_role("residual", "embedding"),
    "keys and values": _named(*CACHED),
    "squares": _named("square"),
    "mean squares": _named("mean square"),
}
"""Which operations' outputs each of ``settings.VALUES`` is; weights are none."""
