"""Which of the faults that all print `!!!!` it is, with the evidence that shows it and one advice. No torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

from qwen_precision.controls import is_scores
from qwen_precision.dtypes import REFERENCE
from qwen_precision.evidence import Control
from qwen_precision.facts import Facts, token_of
from qwen_precision.names import name_of
from qwen_precision.record import Event, Pass, Run, Site, Weight

CAUSES: dict[str, str] = {
    "dead-in-fp32": "the reference itself is not finite",
    "damaged-weight": "a tensor holds NaN or infinity",
    "weight-range": "a weight is larger than the dtype's largest number",
    "masked-rows": "only pad positions, or only in a batch",
    "attention-scores": "scores of eager attention; sdpa is clean",
    "accumulation": "operands and reference in range, yet not finite: a sum left the range half-way",
    "silent-absorption": "an inner operation overflowed, and the output is finite and wrong",
    "length": "every token of it is harmless alone; so many together are not",
    "trigger-token": "one token overflows wherever it stands first, or alone",
    "trigger-prompt": "only with, or only without, the chat template",
    "out-of-range": "an activation is larger than the dtype's largest number",
    "precision": "finite everywhere, but too far from fp32",
}
"""What a failure can come from, in the order in which it is asked, and what shows it."""


class Cause(NamedTuple):
    """A cause with what shows it."""

    kind: str
    sentence: str
    evidence: tuple[str, ...]
    advice: str


class _Case(NamedTuple):
    facts: Facts
    each: Pass
    event: Event
    site: Site
    what: str
    magnitude: float | None
    """Of the reference (finite), or None."""
    limit: float
    controls: dict[str, Control]


_Found = tuple[str, str, str] | None
"""Kind, evidence, advice (empty for the usual)."""


def cause_of(facts: Facts, each: Pass, event: Event) -> Cause:
    """The cause of one origin: an operation that gave something not finite from finite inputs."""
    site = facts.run.sites[event.site]
    magnitude = facts.magnitude(each, event.site) if facts.run.reference and each.dtype != REFERENCE else None
    magnitude = magnitude if magnitude is not None and math.isfinite(magnitude) else None
    what, limit = name_of(site.module, site.op, site.call), facts.limit(each.dtype, event.site)
    case = _Case(facts, each, event, site, what, magnitude, limit, _controls(facts.run, each, event))
    evidence = _measured(case)
    kind, advice = "out-of-range", ""
    for rule in _RULES:
        found = rule(case)
        if found is not None:
            kind, why, advice = found
            evidence = [*evidence, why]
            break
    usual = advice_for(facts.run, each.dtype, magnitude, limit)
    return Cause(kind, sentence(each.dtype, what, magnitude, limit, event.in_padding, facts.run.reference),
                 tuple(line for line in (*evidence, *_ran(case)) if line), advice or usual)  # fmt: skip


def _controls(run: Run, each: Pass, event: Event) -> dict[str, Control]:
    """Controls of this very row (and token, where they are about one), by what was changed."""
    name, row = run.prompts[each.prompt].name, event.row or 0
    made = run.explanation.controls if run.explanation is not None else []
    mine = [c for c in made if (c.dtype, c.prompt, c.row) == (each.dtype, name, row)]
    return {c.what: c for c in mine if c.position in (None, event.position)}


def sentence(dtype: str, what: str, magnitude: float | None, limit: float, in_padding: bool, reference: bool) -> str:
    """What happened, in one sentence."""
    padding = " Only pad positions are affected." if in_padding else ""
    if dtype == REFERENCE:
        return f"The {what} is not finite even in fp32, from finite inputs.{padding}"
    if magnitude is None:
        why = "the reference is not finite here either" if reference else "there is no reference to tell how far"
        return f"The {what} left the range of {dtype} ({limit:.6g}) from finite inputs; {why}.{padding}"
    if magnitude > limit:
        return f"The {what} reaches {magnitude:.6g} in fp32; {dtype} ends at {limit:.6g}.{padding}"
    return (
        f"The {what} reaches only {magnitude:.6g} in fp32, within {dtype}'s range of {limit:.6g}, yet is not finite: "
        f"the accumulation or an intermediate value left the range.{padding}"
    )


def advice_for(run: Run, dtype: str, magnitude: float | None, limit: float) -> str:
    """What to do about an overflow, where nothing more particular is known."""
    if dtype == REFERENCE:
        return "Compare the file's hash with the hub's and download again; no dtype can repair this."
    if dtype == "fp16" and (magnitude is None or magnitude > limit):
        otherwise = "run this checkpoint in bf16 or fp32, or keep this operation in fp32."
        rescued = run.rescue is not None and run.rescue.possible and not run.rescue.rescaling.changes_nothing
        return f"Rescale it exactly (see Rescue), {otherwise}" if rescued else f"R{otherwise[1:]}"
    return f"Run this checkpoint in fp32, or keep this operation out of {dtype}."


def _measured(case: _Case) -> list[str]:
    """What the pass itself shows: how far, on which prompts, from which line of code."""
    lines = []
    if case.magnitude is not None and case.magnitude > case.limit:
        times = case.magnitude / case.limit
        lines.append(
            f"the reference reaches {case.magnitude:.6g} here, {times:.3g} times {case.each.dtype}'s largest number"
        )
    failing, clean = _by_outcome(case.facts, case.each.dtype)
    if failing and clean:
        lines.append(f"{len(failing)} of {len(failing) + len(clean)} prompts fail; clean: {_listed(clean)}")
    return lines


def _by_outcome(facts: Facts, dtype: str) -> tuple[list[str], list[str]]:
    """Names of the prompts on which a dtype failed, and of the others."""
    bad = {each.prompt for each in facts.passes(dtype) if any(event.nan or event.inf for event in each.events)}
    names = {each.prompt: facts.run.prompts[each.prompt].name for each in facts.passes(dtype)}
    return [names[n] for n in names if n in bad], [names[n] for n in names if n not in bad]


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _ran(case: _Case) -> list[str]:
    """The control runs, in words."""
    return [f"control, {c.detail}: {'clean' if c.clean else 'fails'}" for c in case.controls.values()]


# -- the rules, in the order of CAUSES -------------------------------------------------------------------------


def _dead(case: _Case) -> _Found:
    reference = case.facts.by_key.get((REFERENCE, case.each.prompt))
    value = reference.abs_max[case.event.site] if reference is not None else None
    if case.each.dtype != REFERENCE and (value is None or math.isfinite(value)):
        return None
    return "dead-in-fp32", "fp32 is not finite here either", advice_for(case.facts.run, REFERENCE, None, 0.0)


def _masked(case: _Case) -> _Found:
    alone = case.controls.get("row alone")
    if case.event.in_padding:
        why = "every bad element lies at a pad position"
    elif alone is not None and alone.clean:
        why = "without the batch and its padding the row is clean"
    else:
        return None
    return "masked-rows", why, "Run this prompt without padding; its real tokens are not the cause."


def _scores(case: _Case) -> _Found:
    other = case.controls.get("sdpa")
    if other is None or not other.clean or not is_scores(case.site.module, case.site.op, case.site.call):
        return None
    advice = 'Use sdpa (attn_implementation="sdpa"), which keeps the scores in fp32; or bf16 or fp32 with eager.'
    return "attention-scores", "the same tokens are clean with sdpa", advice


def _accumulation(case: _Case) -> _Found:
    if case.magnitude is None or case.magnitude > case.limit:
        return None
    return (
        "accumulation",
        f"all operands are finite and the reference reaches only {case.magnitude:.6g}",
        "On CUDA set torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False; "
        f"else keep this operation out of {case.each.dtype}.",
    )


def _absorbed(case: _Case) -> _Found:
    row = case.event.row or 0
    top1 = case.each.top1
    replaced = any(row in seed.rows for seed in case.each.reseeded)
    if replaced or row >= len(top1) or top1[row] is None:
        return None
    reference = case.facts.by_key.get((REFERENCE, case.each.prompt))
    same = reference is not None and row < len(reference.top1) and reference.top1[row] == top1[row]
    wrong = "the next token happens to be fp32's" if same else "the next token is not fp32's"
    usual = advice_for(case.facts.run, case.each.dtype, case.magnitude, case.limit)
    return "silent-absorption", f"nothing after it is bad and the logits are finite, yet wrong; {wrong}", (
        f"No NaN will ever show this. {usual}")  # fmt: skip


def _length(case: _Case) -> _Found:
    few, before = case.controls.get("token after the first"), case.controls.get("before the token")
    alone, enough = case.controls.get("token alone"), case.controls.get("up to the token")
    harmless = all(control is not None and control.clean for control in (few, before, alone))
    if not harmless or (enough is not None and enough.clean):
        return None
    row = case.facts.run.prompts[case.each.prompt].rows[case.event.row or 0]
    clean = (case.event.position or 0) - row.padding
    why = f"the first {clean + 1} tokens fail, the first {clean} are clean, and so is the last of them alone"
    return "length", why, f"Find the length with --sweep length. {_usual(case)}"


def _token(case: _Case) -> _Found:
    alone, few = case.controls.get("token alone"), case.controls.get("token after the first")
    rest = case.controls.get("without the first token") or case.controls.get("before the token")
    fails = [control for control in (alone, few) if control is not None and not control.clean]
    token = token_of(case.facts.run, case.each, case.event)
    # A prompt of one token has no rest to compare with: then other prompts must be clean.
    rest_clean = rest.clean if rest is not None else bool(_by_outcome(case.facts, case.each.dtype)[1])
    single = alone is None and token is not None and len(_row_ids(case)) == 1
    if not rest_clean or not (fails or single) or token is None:
        return None
    why = f"token {token['id']} ({token['text']!r}) overflows by itself, and without it the row is clean"
    return "trigger-token", why, f"Find others like it with --sweep first-token. {_usual(case)}"


def _row_ids(case: _Case) -> list[int]:
    return case.facts.run.prompts[case.each.prompt].rows[case.event.row or 0].ids


def _template(case: _Case) -> _Found:
    other = case.controls.get("other template")
    if other is None or not other.clean:
        return None
    return "trigger-prompt", f"{other.detail} is clean", _usual(case)


def _usual(case: _Case) -> str:
    return advice_for(case.facts.run, case.each.dtype, case.magnitude, case.limit)


_RULES: tuple[Callable[[_Case], _Found], ...] = (
    _dead, _masked, _scores, _accumulation, _absorbed, _length, _token, _template,
)  # fmt: skip


def weight_cause(run: Run, weight: Weight, damaged: bool) -> tuple[str, tuple[str, ...]]:
    """Cause and evidence of a bad weight."""
    digest = run.explanation.hashes.get(weight.file) if run.explanation is not None else None
    where = f"{weight.name} in {weight.file}, {weight.elements:,} elements"
    if not damaged:
        return "weight-range", (f"static check: {where}, largest {float(weight.abs_max):.6g}",)
    found = [f"static check: {where}, {weight.nan:,} NaN, {weight.inf:,} infinite"]
    return "damaged-weight", tuple([*found, f"SHA-256 of {weight.file}: {digest}"] if digest else found)
