"""Judgement: from the facts of a Run to findings, a verdict a dtype and an exit code. Pure; no torch.

A finding names an origin: the first operation whose inputs were all finite and whose output was not. What
only passes a NaN on is counted at its origin, not listed. One finding a dtype and site, whatever the number
of prompts; it names the worst one. Headroom is the largest finite number of the format an operation computes
in, divided by the largest magnitude in the reference pass (the dtype's own pass where there is no reference).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from qwen_precision.dtypes import DTYPES, REFERENCE
from qwen_precision.judge import text as textchecks
from qwen_precision.judge.causes import advice_for, cause_of, weight_cause
from qwen_precision.judge.columns import Facts, token_of
from qwen_precision.judge.findings import Finding, Headroom, Limits, Report, limits_of
from qwen_precision.judge.precision import precision
from qwen_precision.qwen3.names import layer_of
from qwen_precision.qwen3.op import name_of, row_of
from qwen_precision.record.run import Event, Pass, Run, Site, Weight
from qwen_precision.settings.levels import SEVERITIES


def judge(run: Run, limits: Limits | None = None, name: str = "") -> Report:
    """Judge a Run.

    Args:
        run: the facts.
        limits: from where on something is worth a finding; None for those that the run was made with.
        name: of its file, where it is shown beside others.
    """
    facts = Facts(run, limits or limits_of(run.settings))
    findings = [finding for check in CHECKS.values() for finding in check(facts)]
    findings.sort(key=_order)
    headroom = {dtype: facts.headroom(dtype) for dtype in run.dtypes}
    verdict = {dtype: _verdict(run, dtype, findings) for dtype in run.dtypes}
    return Report(verdict, findings, headroom, run.stopped, run, name)


def _order(finding: Finding) -> tuple[int, bool, float]:
    """Errors in the order of the forward, or of the steps, so that the first is the first; then by headroom."""
    severity = -SEVERITIES.index(finding.severity)
    if finding.step is not None:
        return severity, False, finding.step
    if finding.severity != "error":
        return severity, False, finding.headroom if finding.headroom is not None else 0.0
    before_layers = row_of(finding.module, finding.op, 0).role == "embedding"
    return severity, finding.predicted, -1 if before_layers else math.inf if finding.layer is None else finding.layer


def _verdict(run: Run, dtype: str, findings: list[Finding]) -> str:
    mine = [finding for finding in findings if finding.dtype == dtype]
    if any(finding.severity == "error" for finding in mine):
        return "fail"
    if any(finding.severity == "warning" for finding in mine):
        return "risk"
    return "incomplete" if run.stopped else "ok"


# -- the checks ------------------------------------------------------------------------------------------------


def _overflow(facts: Facts) -> Iterator[Finding]:
    """An operation gave an infinity or a NaN although what went in was finite."""
    for dtype in facts.run.dtypes:
        yield from _origins(facts, dtype)
    if REFERENCE not in facts.run.dtypes and facts.run.reference:
        # The reference itself is dead: nobody asked for fp32, but it changes what every other finding means.
        yield from _origins(facts, REFERENCE)


def _origins(facts: Facts, dtype: str) -> Iterator[Finding]:
    worst: dict[int, tuple[int, Finding, tuple[bool, float]]] = {}
    prompts: dict[int, list[str]] = {}
    for each in facts.passes(dtype):
        events = sorted((e for e in each.events if e.nan or e.inf), key=lambda event: event.step)
        origins = [number for number, e in enumerate(events) if e.clean_inputs and e.clean_weights]
        for number, following in zip(origins, [*origins[1:], len(events)], strict=False):
            event = events[number]
            finding = _origin_finding(facts, each, event, following - number - 1)
            prompts.setdefault(event.site, []).append(facts.run.prompts[each.prompt].name)
            size = (not event.in_padding, finding.reference_abs_max or 0.0)  # a real token's says more than padding's
            before = worst.get(event.site)
            if before is None or size > before[2]:
                worst[event.site] = (event.step, finding, size)
    for site, (_, finding, _) in sorted(worst.items(), key=lambda item: item[1][0]):
        yield replace(finding, prompts=tuple(dict.fromkeys(prompts[site])))


def _origin_finding(facts: Facts, each: Pass, event: Event, carried: int) -> Finding:
    site = facts.run.sites[event.site]
    magnitude = facts.magnitude(each, event.site) if facts.run.reference and each.dtype != REFERENCE else None
    if magnitude is not None and not math.isfinite(magnitude):
        magnitude = None
    limit = facts.limit(each.dtype, event.site)
    why = cause_of(facts, each, event)
    return Finding(
        kind="overflow" if event.inf else "nan", severity="error", dtype=each.dtype,
        prompt=facts.run.prompts[each.prompt].name, layer=site.layer, module=site.module, op=site.op,
        name=name_of(site.module, site.op, site.call), origin=True, reference_abs_max=magnitude,
        headroom=limit / magnitude if magnitude else None, cause=why.sentence, advice=why.advice,
        cause_kind=why.kind, evidence=why.evidence, site=event.site, nan=event.nan, inf=event.inf, propagated=carried,
        token=token_of(facts.run, each, event), channel=event.channel, head=event.head, expert=event.expert,
    )  # fmt: skip


def _near_overflow(facts: Facts) -> Iterator[Finding]:
    """The reference comes closer to a dtype's largest finite number than the limit allows, or passes it."""
    for dtype in facts.run.dtypes:
        if dtype == REFERENCE:
            continue
        events = [event for each in facts.passes(dtype) for event in each.events if event.nan or event.inf]
        origins = {event.site for event in events if event.clean_inputs and event.clean_weights}
        carried = {event.site for event in events} - origins
        for row in facts.headroom(dtype):
            if row.headroom >= facts.limits.near_overflow:
                break  # they are sorted
            if row.headroom == 0 or row.site in origins:
                continue
            unreached = row.site in carried or _came_reseeded(facts, row)
            if row.headroom >= 1 or not unreached:
                if row.site not in carried:
                    yield _near_finding(facts, row)
            elif not _only_carries(facts, row):
                yield _beyond(_near_finding(facts, row), facts.run)


def _came_reseeded(facts: Facts, row: Headroom) -> bool:
    """Whether the dtype's own stream never reached this site: it had been replaced before."""
    layer = facts.run.sites[row.site].layer
    each = facts.by_key[row.dtype, row.prompt]
    return any(seed.layer <= (math.inf if layer is None else layer) for seed in each.reseeded)


def _only_carries(facts: Facts, row: Headroom) -> bool:
    """Whether a sum is beyond the range because one of its parts is: the stream, or the product just before."""
    sites, reference = facts.run.sites, facts.by_key.get((REFERENCE, row.prompt))
    if sites[row.site].op != "add" or reference is None:
        return sites[row.site].op == "cast"
    limit = facts.limit(row.dtype, row.site)
    before = range(row.site - 1, -1, -1)
    roles = {s: row_of(sites[s].module, sites[s].op, sites[s].call).role for s in before}
    stream = next((s for s in before if roles[s] == "residual"), None)
    product = next((s for s in before if roles[s] in ("product", "scores", "logits")), None)
    return any(part is not None and (reference.abs_max[part] or 0) > limit for part in (stream, product))


def _beyond(finding: Finding, run: Run) -> Finding:
    """Out of range by itself, had the stream got here."""
    return replace(
        finding, kind="overflow", severity="error", predicted=True,
        cause=f"The {finding.name} reaches {finding.reference_abs_max:.6g} in fp32, beyond {finding.dtype}; "
        f"the {finding.dtype} stream itself had failed before and did not get here.",
        advice=advice_for(run, finding.dtype, math.inf, 0.0), cause_kind="out-of-range",
        evidence=(f"the reference reaches {finding.reference_abs_max:.6g} here",),
    )  # fmt: skip


def _near_finding(facts: Facts, row: Headroom) -> Finding:
    site = facts.run.sites[row.site]
    each = facts.by_key[row.dtype, row.prompt]
    # The place of a NaN that was only passed on says nothing about where this operation is largest.
    event = next((e for e in each.events if e.site == row.site and not (e.nan or e.inf)), None)
    what = name_of(site.module, site.op, site.call)
    limit = facts.limit(row.dtype, row.site)
    prompt = facts.run.prompts[row.prompt].name
    finding = Finding(
        kind="near-overflow", severity="warning", dtype=row.dtype, prompt=prompt, layer=site.layer,
        module=site.module, op=site.op, name=what, origin=True, reference_abs_max=row.abs_max,
        headroom=row.headroom,
        cause=f"The {what} reaches {row.abs_max:.6g}; {row.dtype} ends at {limit:.6g}: {row.headroom:.3g}x headroom.",
        advice=f"Other prompts may pass the limit: probe with your own, or do not run it in {row.dtype}.",
        prompts=(prompt,), site=row.site,
    )  # fmt: skip
    if event is None:
        return finding
    token = token_of(facts.run, each, event)
    return replace(finding, token=token, channel=event.channel, head=event.head, expert=event.expert)


def _underflow(facts: Facts) -> Iterator[Finding]:
    """A whole tensor lies below a dtype's normal range, or many weights become zero in it."""
    for dtype in facts.run.dtypes:
        if dtype == REFERENCE:
            continue
        tiny = DTYPES[dtype].smallest_normal
        seen: set[int] = set()
        passes, values, ran = facts.judged(dtype)
        for row, index in zip(*(ran & (values > 0) & (values < tiny)).nonzero(), strict=True):
            if index not in seen:
                seen.add(index)
                yield _underflow_finding(facts, passes[row], facts.run.sites[index], float(values[row, index]), tiny)
    for weight in facts.run.weights:
        for dtype, count in weight.underflow.items():
            share = count / max(weight.elements, 1)
            if share > facts.limits.underflow_share and dtype in facts.run.dtypes:
                text = f"{count} of {weight.elements} elements of {weight.name} ({share:.1%}) become zero in {dtype}."
                yield _weight_finding("underflow", "warning", dtype, weight.parameter, text, "Use a wider dtype.")


def _underflow_finding(facts: Facts, each: Pass, site: Site, value: float, tiny: float) -> Finding:
    what = name_of(site.module, site.op, site.call)
    prompt = facts.run.prompts[each.prompt].name
    return Finding(
        kind="underflow", severity="warning", dtype=each.dtype, prompt=prompt, layer=site.layer,
        module=site.module, op=site.op, name=what, origin=True, reference_abs_max=value, headroom=None,
        cause=f"All of the {what} lies below {each.dtype}'s normal range: at most {value:.3g}, of {tiny:.3g}.",
        advice="Use a wider dtype here.", prompts=(prompt,),
    )  # fmt: skip


def _weights(facts: Facts) -> Iterator[Finding]:
    """A weight is damaged, or larger than a dtype's largest finite number."""
    for weight in facts.run.weights:
        where = f"{weight.name} in {weight.file}"
        if weight.nan or weight.inf:
            text = f"{where} holds {weight.nan} NaN and {weight.inf} infinite elements."
            advice = "The checkpoint is damaged: compare the file's hash with the hub's and download it again."
            for dtype in facts.run.dtypes:
                found = _weight_finding("weight-nonfinite", "error", dtype, weight.parameter, text, advice)
                yield _counted(_because(found, facts.run, weight, True), facts, dtype, weight.nan, weight.inf)
        for dtype, count in weight.overflow.items():
            if dtype not in facts.run.dtypes:
                continue
            limit = DTYPES[dtype].max
            text = f"{where} has {count} elements up to {weight.abs_max:.6g}; {dtype} ends at {limit:.6g}."
            advice = f"Keep this tensor in fp32, or run the checkpoint in a dtype other than {dtype}."
            found = _weight_finding(
                "weight-overflow", "error", dtype, weight.parameter, text, advice, weight.abs_max, limit
            )
            yield _counted(_because(found, facts.run, weight, False), facts, dtype, 0, count)


def _because(finding: Finding, run: Run, weight: Weight, damaged: bool) -> Finding:
    kind, evidence = weight_cause(run, weight, damaged)
    return replace(finding, cause_kind=kind, evidence=evidence)


def _weight_finding(
    kind: str, severity: str, dtype: str, name: str, cause: str, advice: str,
    largest_value: float | None = None, limit: float | None = None,
) -> Finding:  # fmt: skip
    module, _, leaf = name.rpartition(".")
    short = module.rpartition(".")[2] or name
    return Finding(
        kind=kind, severity=severity, dtype=dtype, prompt=None, layer=layer_of(module), module=module,
        op="weight", name=f"{short} {leaf}", origin=True, reference_abs_max=largest_value,
        headroom=limit / largest_value if limit and largest_value else None, cause=cause, advice=advice,
    )  # fmt: skip


def _counted(finding: Finding, facts: Facts, dtype: str, nan: int, inf: int) -> Finding:
    """With how many operations the bad weight spoiled."""
    carried = 0
    for each in facts.passes(dtype):
        bad = [event for event in each.events if event.nan or event.inf]
        dirty = [event for event in bad if not event.clean_weights]
        if any(facts.run.sites[event.site].module == finding.module for event in dirty):
            first = min(event.step for event in dirty)
            carried = max(carried, sum(1 for event in bad if event.step >= first))
    return replace(finding, nan=nan, inf=inf, propagated=carried)


def _divergence(facts: Facts) -> Iterator[Finding]:
    """Finite everywhere, but the next token, its distribution and log-probabilities are too far from fp32's."""
    limits = facts.limits
    for dtype, found in precision(facts.run).items():
        if any(event.nan or event.inf for each in facts.passes(dtype) for event in each.events):
            continue
        kl, logprob = found.kl or 0.0, found.logprob or 0.0
        if found.agree < found.rows and kl > limits.kl and logprob > limits.logprob:
            yield Finding(
                kind="divergence", severity="warning", dtype=dtype, prompt=None, layer=None, module="lm_head",
                op="linear", name="logits", origin=False, reference_abs_max=None, headroom=None,
                cause=f"{dtype} is finite everywhere; its next token is fp32's on {found.agree} of {found.rows} rows.",
                advice="Use a dtype with more precision; see the error by layer for where it grows.",
                cause_kind="precision", evidence=(
                    f"KL divergence up to {kl:.3g} nats (limit {limits.kl:g})",
                    f"log-probability error {logprob:.3g} nats (limit {limits.logprob:g})",
                ),
            )  # fmt: skip


CHECKS: dict[str, Callable[[Facts], Iterator[Finding]]] = {
    "weights": _weights,
    "overflow": _overflow,
    "near-overflow": _near_overflow,
    "underflow": _underflow,
    "divergence": _divergence,
    "nonfinite-logits": textchecks.nonfinite_logits,
    "sampling-error": textchecks.sampling_error,
    "degenerate-text": textchecks.degenerate_text,
    "masked-row": textchecks.masked_rows,
    "advice": textchecks.advice,
}
"""A check is a row here: a function from the facts to findings."""
