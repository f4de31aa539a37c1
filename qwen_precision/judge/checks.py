"""Judgement: from the columns of a Run to findings, a verdict a dtype and an exit code. Pure; no torch.

A finding names an origin: the first operation whose inputs were all finite and whose output was not. What
only passes a NaN on is counted at its origin, not listed. One finding a dtype and site, whatever the number
of prompts; it names the worst one. Headroom is the largest finite number of the format an operation computes
in, divided by the largest magnitude in the reference pass (the dtype's own pass where there is no reference).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from qwen_precision.dtypes import DTYPES, REFERENCE, narrowest
from qwen_precision.judge import text
from qwen_precision.judge.advice import advice
from qwen_precision.judge.causes import advice_for, cause_of, reference_magnitude, weight_evidence
from qwen_precision.judge.columns import Columns, Where, place_of, token_of
from qwen_precision.judge.findings import (
    Cause,
    Corpus,
    Finding,
    Headroom,
    Limits,
    Magnitude,
    Place,
    Report,
    Spread,
    limits_of,
)
from qwen_precision.judge.replays import unseen_failure
from qwen_precision.judge.scales import scales
from qwen_precision.judge.unwatched import unwatched
from qwen_precision.qwen3 import layer_of, row_of
from qwen_precision.record import Event, Pass, Run, Weight
from qwen_precision.settings import SEVERITIES

Subject = Literal["prompt", "weights", "precision", "logits", "generation"]
"""What a check is about: a pass over one prompt, the weights alone, a whole dtype against fp32, the softmax of its
logits, a generated text."""


def judge(
    run: Run, limits: Limits | None = None, name: str = "", corpus: Corpus | None = None, record: str = ""
) -> Report:
    """Judge a Run.

    Args:
        run: the columns.
        limits: from where on something is worth a finding; None for those that the run was made with.
        name: of its file, where it is shown beside others.
        corpus: of what more prompts it stands for.
        record: where it is saved, as a word of a command line; empty where it is not, or not known.
    """
    columns = Columns(run, limits or limits_of(run.settings), corpus, record or "RUN")
    findings = [finding for check in CHECKS.values() for finding in check.find(columns)]
    findings.sort(key=partial(_order, columns))
    headroom = {dtype: columns.headroom(dtype) for dtype in run.dtypes}
    verdict = {dtype: _verdict(run, dtype, findings) for dtype in run.dtypes}
    return Report(verdict, findings, headroom, run.stopped, run, name, corpus=corpus, record=record)


def _order(columns: Columns, finding: Finding) -> tuple[int, bool, float]:
    """Errors in the order of the forward, or of the steps, so that the first is the first; then by headroom."""
    severity = -SEVERITIES.index(finding.severity)
    if finding.place.step is not None:
        return severity, False, finding.place.step
    if finding.severity != "error":
        return severity, False, finding.magnitude.headroom if finding.magnitude.headroom is not None else 0.0
    place = finding.place
    if place.site is not None:
        return severity, finding.predicted, columns.depth(place.site)
    before_layers = row_of(place.module, place.op, 0).role == "embedding"
    layer = -1 if before_layers else math.inf if place.layer is None else place.layer
    return severity, finding.predicted, layer


def _verdict(run: Run, dtype: str, findings: list[Finding]) -> str:
    mine = [finding for finding in findings if finding.dtype == dtype]
    if any(finding.severity == "error" for finding in mine):
        return "fail"
    if any(finding.severity == "warning" for finding in mine):
        return "risk"
    return "incomplete" if run.stopped else "ok"


# -- the checks ------------------------------------------------------------------------------------------------


def _overflow(columns: Columns) -> Iterator[Finding]:
    """An operation gave an infinity or a NaN although what went in was finite."""
    for dtype in columns.run.dtypes:
        yield from _origins(columns, dtype)
    if REFERENCE not in columns.run.dtypes and columns.run.reference:
        # The reference itself is dead: nobody asked for fp32, but it changes what every other finding means.
        yield from _origins(columns, REFERENCE)


def _origins(columns: Columns, dtype: str) -> Iterator[Finding]:
    """One finding an operation: the worst of all prompts and rows; those that only padding spoiled are another."""
    worst: dict[_Key, tuple[int, Finding, tuple[bool, bool, float]]] = {}
    prompts: dict[_Key, list[str]] = {}
    for each in columns.passes(dtype):
        bad = sorted(event.step for event in each.events if event.nan or event.inf)
        origins = columns.origins(each)
        for event in origins:
            if columns.is_meant(each, event.site) or _stands_in(columns, dtype, event):
                continue
            following = min((later.step for later in origins if later.step > event.step), default=math.inf)
            carried = sum(event.step < step < following for step in bad)
            finding = _origin_finding(columns, each, event, carried)
            key = columns.place(event), finding.cause.kind == "masked-rows"
            prompts.setdefault(key, []).append(columns.run.prompts[each.prompt].name)
            # Harm says more than none, and a real token more than padding.
            size = (not event.harmless, not event.in_padding, finding.magnitude.reference or 0.0)
            before = worst.get(key)
            if before is None or size > before[2]:
                worst[key] = (event.step, finding, size)
    for key, (_, finding, _) in sorted(worst.items(), key=lambda item: (item[1][0], repr(item[0]))):
        too = [] if key[1] else [each.prompt for each in columns.passes(dtype) if _hidden(columns, each, key[0])]
        names = {*prompts[key], *(columns.run.prompts[prompt].name for prompt in too)}
        in_order = tuple(prompt.name for prompt in columns.run.prompts if prompt.name in names)
        yield replace(finding, spread=replace(finding.spread, prompts=in_order))


_Key = tuple[Where, bool]
"""What is one finding: a place, and whether only padding was bad."""


def _hidden(columns: Columns, each: Pass, place: Where) -> bool:
    """Whether a place overflows by itself in a pass too, behind something that failed before."""
    if each.dtype != narrowest(columns.run.dtypes):
        return False
    mine = [event for event in columns.foreseen(each.prompt) if columns.place(event) == place and not event.in_padding]
    return any(columns.came_to_nothing(each, event.site) for event in mine)


def _stands_in(columns: Columns, dtype: str, event: Event) -> bool:
    """Whether only padding overflowed where real tokens, dead before, would have: then those are foreseen instead."""
    if not event.in_padding:
        return False
    passes = columns.passes(dtype)
    place = columns.place(event)
    alike = (other for each in passes for other in columns.origins(each) if columns.place(other) == place)
    if any(not other.in_padding for other in alike):
        return False
    return any(_hidden(columns, each, place) for each in passes)


def _origin_finding(columns: Columns, each: Pass, event: Event, carried: int) -> Finding:
    magnitude = reference_magnitude(columns, each, event)
    limit = columns.limit(each.dtype, event.site)
    return Finding(
        kind="overflow" if event.inf else "nan",
        severity="warning" if event.harmless or columns.spared(each, event) else "error",
        dtype=each.dtype,
        place=place_of(columns, each, event.site, event),
        magnitude=Magnitude(magnitude, limit / magnitude if magnitude else None, event.nan, event.inf),
        cause=cause_of(columns, each, event),
        spread=Spread(propagated=carried),
    )


def _near_overflow(columns: Columns) -> Iterator[Finding]:
    """The reference comes closer to a dtype's largest finite number than the limit allows, or passes it."""
    for dtype in columns.run.dtypes:
        if dtype == REFERENCE:
            continue
        bad = {event.site for each in columns.passes(dtype) for event in each.events if event.nan or event.inf}
        began = (event for each in columns.passes(dtype) for event in columns.origins(each))
        origins = {columns.place(event) for event in began if not _stands_in(columns, dtype, event)}
        yield from _foreseen(columns, dtype, origins)
        for row in columns.headroom(dtype):
            if row.headroom >= columns.limits.near_overflow:
                break  # they are sorted
            # Not what only carries a number on that is too large already, or that went bad before.
            inside = row.abs_max < columns.edge(dtype, row.site) or not _came_reseeded(columns, row)
            if row.headroom > 0 and row.site not in bad and inside:
                yield _near_finding(columns, row)


def _foreseen(columns: Columns, dtype: str, origins: set[Where]) -> Iterator[Finding]:
    """Places behind a failure at which the reference leaves the range by itself, though the dtype never got there.

    By itself: everything that goes in is inside the range. What carries a number on that is too large already counts
    with the place where it became so.
    """
    if dtype != narrowest(columns.run.dtypes):
        return
    found: dict[Where, tuple[Finding, tuple[bool, float]]] = {}
    prompts: dict[Where, list[str]] = {}
    for each in columns.passes(dtype):
        for event in columns.foreseen(each.prompt):
            site, place = event.site, columns.place(event)
            if place in origins or each.abs_max[site] is None:
                continue
            if not columns.came_to_nothing(each, site) or (event.in_padding and not columns.is_read(site)):
                continue
            prompts.setdefault(place, []).append(columns.run.prompts[each.prompt].name)
            size = not event.in_padding, float(event.value)
            if place not in found or size > found[place][1]:
                found[place] = _beyond(columns, each, event), size
    for place, (finding, _) in found.items():
        yield replace(finding, spread=Spread(prompts=tuple(dict.fromkeys(prompts[place]))))


def _came_reseeded(columns: Columns, row: Headroom) -> bool:
    """Whether the dtype's own stream never reached this site: it had been replaced before."""
    each = columns.by_key[row.dtype, row.prompt]
    return any(seed.layer <= columns.depth(row.site) for seed in each.reseeded)


def _beyond(columns: Columns, each: Pass, event: Event) -> Finding:
    """Out of range by itself, had the stream got here."""
    place, dtype, value = place_of(columns, each, event.site, event), each.dtype, float(event.value)
    cause = Cause(
        kind="out-of-range",
        sentence=f"The {place.name} reaches {value:.6g} in fp32, beyond {dtype}; "
        f"the {dtype} stream itself had failed before and did not get here."
        + (" What overflows stands at pad positions." if event.in_padding else ""),
        facts=(f"in fp32 all that goes into this element is within {dtype}'s range",),
        advice=advice_for(columns.run, dtype, math.inf, 0.0),
    )
    size = Magnitude(value, columns.limit(dtype, event.site) / value)
    return Finding("overflow", "error", dtype, place, size, cause, predicted=True)


def _near_finding(columns: Columns, row: Headroom) -> Finding:
    each = columns.by_key[row.dtype, row.prompt]
    # The place of a NaN that was only passed on says nothing about where this operation is largest.
    event = next((e for e in each.events if e.site == row.site and not (e.nan or e.inf)), None)
    place = place_of(columns, each, row.site, event)
    limit = columns.limit(row.dtype, row.site)
    reaches = f"The {place.name} reaches {row.abs_max:.6g}; {row.dtype} ends at {limit:.6g}"
    advice = f"Other prompts may exceed the limit: probe with your own, or do not run it in {row.dtype}."
    return Finding(
        kind="near-overflow",
        severity="warning",
        dtype=row.dtype,
        place=place,
        magnitude=Magnitude(row.abs_max, row.headroom),
        cause=Cause(None, f"{reaches}.", (), advice),
        spread=Spread(prompts=(str(place.prompt),)),
    )


def _underflow(columns: Columns) -> Iterator[Finding]:
    """A whole tensor lies below a dtype's normal range, or many weights become zero in it."""
    for dtype in columns.run.dtypes:
        if dtype == REFERENCE:
            continue
        tiny = DTYPES[dtype].smallest_normal
        seen: set[int] = set()
        passes, values, ran = columns.judged(dtype)
        groups = columns.groups
        largest = np.zeros((int(groups.max(initial=0)) + 1, len(passes)))
        np.maximum.at(largest, groups, np.where(ran, values, 0.0).T)
        whole = largest[groups].T
        for row, index in zip(*(ran & (whole > 0) & (whole < tiny)).nonzero(), strict=True):
            if groups[index] not in seen:
                seen.add(int(groups[index]))
                yield _underflow_finding(columns, passes[row], int(index), float(whole[row, index]), tiny)
    for weight in columns.run.weights:
        for dtype, count in weight.underflow.items():
            share = count / max(weight.elements, 1)
            if share > columns.limits.underflow_share and dtype in columns.run.dtypes:
                said = f"{count} of {weight.elements} elements of {weight.name} ({share:.1%}) become zero in {dtype}."
                cause = Cause(None, said, (), "Use a wider dtype.")
                yield _weight_finding("underflow", "warning", dtype, weight.parameter, cause, Magnitude())


def _underflow_finding(columns: Columns, each: Pass, site: int, value: float, tiny: float) -> Finding:
    place = replace(place_of(columns, each, site, None), site=None)
    said = f"All of the {place.name} lies below {each.dtype}'s normal range: at most {value:.3g}, of {tiny:.3g}."
    return Finding(
        kind="underflow",
        severity="warning",
        dtype=each.dtype,
        place=place,
        magnitude=Magnitude(value),
        cause=Cause(None, said, (), "Use a wider dtype here."),
        spread=Spread(prompts=(str(place.prompt),)),
    )


def _weights(columns: Columns) -> Iterator[Finding]:
    """A weight is damaged, or larger than a dtype's largest finite number."""
    for weight in columns.run.weights:
        for dtype in columns.run.dtypes:
            if weight.nan or weight.inf:
                yield _damaged(columns, weight, dtype)
        for dtype, count in weight.overflow.items():
            if dtype in columns.run.dtypes:
                yield _too_large(columns, weight, dtype, count)


def _damaged(columns: Columns, weight: Weight, dtype: str) -> Finding:
    cause = Cause(
        kind="damaged-weight",
        sentence=f"{weight.name} in {weight.file} holds {weight.nan} NaN and {weight.inf} infinite elements.",
        facts=weight_evidence(columns.run, weight, True),
        advice="The checkpoint is damaged: compare the file's hash with the hub's and download it again.",
    )
    size = Magnitude(nan=weight.nan, inf=weight.inf)
    return _counted(_weight_finding("weight-nonfinite", "error", dtype, weight.parameter, cause, size), columns)


def _too_large(columns: Columns, weight: Weight, dtype: str, count: int) -> Finding:
    limit, largest = DTYPES[dtype].max, float(weight.abs_max)
    cause = Cause(
        kind="weight-range",
        sentence=f"{weight.name} in {weight.file} has {count} elements up to {largest:.6g}; {dtype} ends at "
        f"{limit:.6g}.",
        facts=weight_evidence(columns.run, weight, False),
        advice=f"Keep this tensor in fp32, or run the checkpoint in a dtype other than {dtype}.",
    )
    size = Magnitude(largest, limit / largest if largest else None, 0, count)
    return _counted(_weight_finding("weight-overflow", "error", dtype, weight.parameter, cause, size), columns)


def _weight_finding(
    kind: str, severity: str, dtype: str, parameter: str, cause: Cause, magnitude: Magnitude
) -> Finding:
    module, _, leaf = parameter.rpartition(".")
    short = module.rpartition(".")[2] or parameter
    place = Place(layer=layer_of(module), module=module, op="weight", name=f"{short} {leaf}")
    return Finding(kind, severity, dtype, place, magnitude, cause)


def _counted(finding: Finding, columns: Columns) -> Finding:
    """With how many operations the bad weight spoiled, on which prompts, and of an embedding by which token."""
    carried, prompts, place = 0, [], finding.place
    for each in columns.passes(finding.dtype):
        bad = [event for event in each.events if event.nan or event.inf]
        dirty = [event for event in bad if not event.clean_weights]
        here = [event for event in dirty if columns.uses(event.site, place.module)]
        if not here:
            continue
        prompts.append(columns.run.prompts[each.prompt].name)
        first = min(event.step for event in dirty)
        carried = max(carried, sum(1 for event in bad if event.step >= first))
        embedded = next((event for event in here if columns.depth(event.site) < 0), None)
        if place.token is None and embedded is not None:
            place = replace(place, token=token_of(columns.run, each, embedded), channel=embedded.channel)
    spread = Spread(prompts=tuple(dict.fromkeys(prompts)), propagated=carried)
    return replace(finding, place=place, spread=spread)


def _divergence(columns: Columns) -> Iterator[Finding]:
    """Finite everywhere, but the next token, its distribution and log-probabilities are too far from fp32's."""
    limits = columns.limits
    for dtype, sums in columns.sums.items():
        if sums.failed:
            continue
        found = sums.precision
        kl, logprob = found.kl or 0.0, found.logprob or 0.0
        if found.agree < found.rows and kl > limits.kl and logprob > limits.logprob:
            cause = Cause(
                kind="precision",
                sentence=f"{dtype} is finite everywhere; its next token is fp32's on {found.agree} of {found.rows} "
                "rows.",
                facts=(
                    f"KL divergence up to {kl:.3g} nats (limit {limits.kl:g})",
                    f"log-probability error {logprob:.3g} nats (limit {limits.logprob:g})",
                ),
                advice="Use a dtype with more precision; see the error by layer for where it grows.",
            )
            place = Place(layer=None, module="lm_head", op="linear", name="logits")
            yield Finding("divergence", "warning", dtype, place, Magnitude(), cause, origin=False)


class Check(NamedTuple):
    """One check, and what its findings are called."""

    find: Callable[[Columns], Iterator[Finding]]
    kinds: tuple[str, ...]
    subjects: tuple[Subject, ...]
    """What it is about."""

    @property
    def about(self) -> str:
        """What it finds, in a sentence."""
        return (self.find.__doc__ or "").strip().splitlines()[0]


CHECKS: dict[str, Check] = {
    "weights": Check(_weights, ("weight-overflow", "weight-nonfinite"), ("weights",)),
    "scales": Check(scales, ("bad-scale",), ("weights",)),
    "overflow": Check(_overflow, ("overflow", "nan"), ("prompt",)),
    "unwatched": Check(unwatched, ("unwatched",), ("prompt",)),
    "unseen-failure": Check(unseen_failure, ("unseen-failure",), ("prompt",)),
    "near-overflow": Check(_near_overflow, ("near-overflow",), ("prompt",)),
    "underflow": Check(_underflow, ("underflow",), ("prompt", "weights")),
    "divergence": Check(_divergence, ("divergence",), ("precision",)),
    "nonfinite-logits": Check(text.nonfinite_logits, ("nonfinite-logits",), ("generation",)),
    "sampling-error": Check(text.sampling_error, ("sampling-error",), ("generation",)),
    "degenerate-text": Check(text.degenerate_text, ("degenerate-text",), ("generation",)),
    "masked-row": Check(text.masked_rows, ("masked-row",), ("generation",)),
    "advice": Check(advice, ("advice",), ("logits", "generation")),
}
"""A check is a row here: judging, the README and the cases of JUnit read it."""
