"""Which of the faults that all print `!!!!` it is, with the evidence that shows it and one advice. No torch."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

from qwen_precision.dtypes import REFERENCE
from qwen_precision.judge.columns import Columns, narrow_sums, token_of
from qwen_precision.judge.findings import Cause, Tried
from qwen_precision.judge.nextcommand import sweep
from qwen_precision.judge.poisoned import SWITCHES, clean_in, failed_before, suspect
from qwen_precision.qwen3 import name_of, row_of
from qwen_precision.record import Control, Event, Pass, Run, Site, Weight


class _Case(NamedTuple):
    columns: Columns
    run_pass: Pass
    event: Event
    site: Site
    what: str
    magnitude: float | None
    """Of the reference (finite), or None."""
    limit: float
    controls: dict[str, Control]


_Found = tuple[str, str, str] | None
"""Kind, evidence, advice (empty for the usual)."""


def cause_of(columns: Columns, each: Pass, event: Event) -> Cause:
    """The cause of one origin: an operation that gave something not finite from finite inputs."""
    site = columns.run.sites[event.site]
    magnitude, limit = reference_magnitude(columns, each, event), columns.limit(each.dtype, event.site)
    what = name_of(site.module, site.op, site.call)
    case = _Case(columns, each, event, site, what, magnitude, limit, _controls(columns.run, each, event))
    evidence = _measured(case)
    kind, advice = "out-of-range" if magnitude is not None else "not-told", ""
    for rule in _RULES:
        found = rule(case)
        if found is not None:
            kind, why, advice = found
            evidence = [*evidence, why]
            break
    usual = advice_for(columns.run, each.dtype, magnitude, limit)
    said = _sentence(case) if kind != "poisoned-cache" else f"The {what} is not finite, and all that it was given is."
    return Cause(kind, said, tuple(line for line in evidence if line), advice or usual, _tried(case))


def reference_magnitude(columns: Columns, each: Pass, event: Event) -> float | None:
    """What the reference reaches where something began: at that element, if it was looked at, else at all of the site.

    None where that is not known: another row, or another token of it, is beyond the range, and this one is not.
    """
    if not columns.run.reference:
        return None
    here = [one for one in columns.foreseen(each.prompt) if one.site == event.site]
    own = next((one for one in here if _owner(one) == _owner(event)), None)
    if own is None and _beside(columns, each, event):
        return None
    if own is not None and (own.position, own.channel) != (event.position, event.channel):
        return None
    magnitude = float(own.value) if own is not None else columns.magnitude(each, event.site)
    return magnitude if magnitude is not None and math.isfinite(magnitude) else None


def _beside(columns: Columns, each: Pass, event: Event) -> bool:
    """Whether the reference leaves the range at this operation in other rows, or experts, only."""
    owners = {_owner(one) for one in columns.foreseen(each.prompt) if one.site == event.site}
    return bool(owners) and _owner(event) not in owners


def _owner(event: Event) -> tuple[int, int | None]:
    """Whose elements an event is about."""
    return event.row or 0, event.expert


def _controls(run: Run, each: Pass, event: Event) -> dict[str, Control]:
    """Controls of this very row (and token, where they are about one), by what was changed."""
    if event.row is None and len(run.prompts[each.prompt].rows) > 1:
        return {}
    name, row = run.prompts[each.prompt].name, event.row or 0
    made = run.explanation.controls if run.explanation is not None else []
    mine = [c for c in made if (c.dtype, c.prompt, c.row) == (each.dtype, name, row)]
    return {c.what: c for c in mine if c.position in (None, event.position)}


def _sentence(case: _Case) -> str:
    """What happened, in one sentence."""
    what, magnitude, limit, dtype = case.what, case.magnitude, case.limit, case.run_pass.dtype
    padding = " What overflows stands at pad positions." if case.event.in_padding else ""
    many = what.endswith(("scores", "logits", "weights", "values"))
    reach, are, leave, give = ("reach", "are", "yet are", "give") if many else ("reaches", "is", "yet is", "gives")
    if dtype == REFERENCE:
        return f"The {what} {are} not finite even in fp32, from finite inputs.{padding}"
    if magnitude is None:
        why = "the reference does not tell" if case.columns.run.reference else "there is no reference to tell"
        return f"The {what} left the range of {dtype} ({limit:.6g}) from finite inputs; {why} how far.{padding}"
    if magnitude > limit:
        return f"The {what} {reach} {magnitude:.6g} in fp32; {dtype} ends at {limit:.6g}.{padding}"
    if not case.event.inf and _role(case.site) is None:  # no sum: nothing says that a part of it was too large
        return f"The {what} {give} NaN in {dtype}, and {magnitude:.6g} at most in fp32.{padding}"
    return (
        f"The {what} {reach} only {magnitude:.6g} in fp32, within {dtype}'s range of {limit:.6g}, {leave} not finite: "
        f"the accumulation or an intermediate value left the range.{padding}"
    )


def advice_for(run: Run, dtype: str, magnitude: float | None, limit: float) -> str:
    """What to do about an overflow, where nothing more particular is known."""
    if dtype == REFERENCE:
        return "Compare the file's hash with the hub's and download again; no dtype can repair this."
    if dtype == "fp16" and (magnitude is None or magnitude > limit):
        otherwise = "run this checkpoint in bf16 or fp32, or keep what leaves the range in fp32."
        rescued = run.rescue is not None and run.rescue.possible and not run.rescue.rescaling.changes_nothing
        return f"Rescale it exactly ({_RESCUE}), {otherwise}" if rescued else f"R{otherwise[1:]}"
    return f"Run this checkpoint in fp32, or keep this operation out of {dtype}."


_RESCUE = "qprec probe MODEL --rescue-to FOLDER"


def _measured(case: _Case) -> list[str]:
    """What the passes themselves show."""
    failing, clean = case.columns.by_outcome(case.run_pass.dtype)
    counted = case.columns.failing(case.run_pass.dtype)
    if counted is not None:
        return [f"{counted[0]:,} of {counted[1]:,} prompts fail"] if counted[0] < counted[1] else []
    if not (failing and clean):
        return []
    return [f"{len(failing)} of {len(failing) + len(clean)} prompts fail; clean: {_listed(case, clean)}"]


def _listed(case: _Case, prompts: list[int]) -> str:
    """Names of a few prompts."""
    more = f" and {len(prompts) - 4} more" if len(prompts) > 4 else ""
    return ", ".join(repr(case.columns.run.prompts[number].name) for number in prompts[:4]) + more


def _tried(case: _Case) -> tuple[Tried, ...]:
    """The control runs of this very row."""
    return tuple(Tried(c.what, c.detail, _outcome(case, c)) for c in case.controls.values())


def _outcome(case: _Case, control: Control) -> str:
    if control.clean:
        return "clean"
    return "fails in a later layer only" if _clean(control, case) else "fails"


def _clean(control: Control | None, case: _Case) -> TypeGuard[Control]:
    """Whether the operation that is asked about stayed finite in a control: nothing failed, or only a later layer."""
    if control is None or control.clean or control.began is None:
        return control is not None and control.clean
    return case.columns.depth_of(control.began) > case.columns.depth(case.event.site)


def _what_is(control: Control) -> str:
    return "the row is clean" if control.clean else "this operation is finite"


# -- the rules, in the order of CAUSES -------------------------------------------------------------------------


def _dead(case: _Case) -> _Found:
    reference = case.columns.by_key.get((REFERENCE, case.run_pass.prompt))
    value = reference.abs_max[case.event.site] if reference is not None else None
    if case.run_pass.dtype != REFERENCE and (value is None or math.isfinite(value)):
        return None
    return "dead-in-fp32", "fp32 is not finite here either", advice_for(case.columns.run, REFERENCE, None, 0.0)


def _chance(case: _Case) -> _Found:
    again = case.controls.get("same again, otherwise")
    if again is None:
        return None
    why = f"{again.detail}: its outcome is a matter of chance, so no control tells a cause"
    return "not-told", why, "Run it again, and with deterministic kernels: until two runs agree, no cause can be named."


def _poisoned(case: _Case) -> _Found:
    """The cache is no argument of attention: what is in it is told by other requests, and by other engines."""
    one = suspect(case.columns.run, case.run_pass, case.event)
    if one is None:
        return None
    before, control = failed_before(case.columns, one), case.controls.get("fresh engine")
    why = "attention also reads the KV cache"
    if before is not None:
        why += f", and {before!r} had failed in this engine before"
    if _clean(control, case) or clean_in(case.columns.run, one):
        where = "a fresh engine" if _clean(control, case) else "this engine, at another time,"
        return "poisoned-cache", f"{why}; in {where} the same tokens are clean", _OF_CACHES
    if before is None:
        return None
    return "not-told", why, "Watch the same request alone in a fresh engine, and give both records to `qprec report`."


_OF_CACHES = (
    f"No guard on rows cleans the cache: rescale the checkpoint ({_RESCUE}), or serve it in "
    f"bf16 (--dtype bfloat16). Until then {SWITCHES}"
)


def _masked(case: _Case) -> _Found:
    alone = case.controls.get("row alone")
    if not _clean(alone, case):
        return None  # where bad elements lie does not tell who made them
    why = f"without the batch and its padding {_what_is(alone)}"
    if case.event.in_padding:
        why = f"every bad element lies at a pad position, and {why}"
    return "masked-rows", why, "Run this prompt without padding; its real tokens are not the cause."


def _scores(case: _Case) -> _Found:
    other = case.controls.get("sdpa")
    if not _clean(other, case) or _role(case.site) != "scores":
        return None
    advice = 'Use sdpa (attn_implementation="sdpa"), which keeps the scores in fp32; or bf16 or fp32 with eager.'
    return "attention-scores", "the same tokens are clean with sdpa", advice


def _accumulation(case: _Case) -> _Found:
    """The reference stays inside: what took the dtype out is told by doing it in exact arithmetic."""
    edge = case.columns.edge(case.run_pass.dtype, case.event.site)
    beside = case.magnitude is None and _beside(case.columns, case.run_pass, case.event)
    if not beside and (case.magnitude is None or case.magnitude >= edge):
        return None
    reached = f"{case.magnitude:.6g}" if case.magnitude is not None else "less than the limit"
    full, dtype = case.controls.get("full reduction"), case.run_pass.dtype
    look = case.event.closeup
    exact = abs(float(look.exact)) if look is not None and look.exact is not None else None
    if exact is not None and exact >= edge:
        why = f"its operands, rounded to {dtype}, give {exact:.6g} exactly; the reference's {reached}"
        return "rounding", why, f"There is no headroom here: keep this operation out of {dtype}, or rescale it."
    why = f"all operands are finite and the reference reaches only {reached}"
    if exact is not None:
        why += f"; in exact arithmetic the same operands give {exact:.6g}, so a partial sum left the range"
    if _clean(full, case):
        flag = "accumulation" if narrow_sums(case.columns.run) else "reduced_precision_reduction"
        return (
            "accumulation",
            f"{why}; without reduced-precision reductions it is clean",
            f"Set torch.backends.cuda.matmul.allow_fp16_{flag} = False.",
        )
    return "accumulation", why, f"Keep this operation out of {dtype}, or let it add up in fp32."


def _spared(case: _Case) -> _Found:
    if not case.columns.spared(case.run_pass, case.event):
        return None
    return (
        "harmless-overflow",
        "only pad positions went bad, and all that real tokens give is finite",
        "Nothing is lost on these prompts. In an earlier layer the same would reach the row's real tokens.",
    )


def _harmless(case: _Case) -> _Found:
    if not case.event.harmless:
        return None
    return (
        "harmless-overflow",
        "with the largest finite number in place of the infinity the same finite bits come out",
        _OF_SCORES if _role(case.site) in ("scores", "router") else "Nothing is lost on these prompts.",
    )


_OF_SCORES = (
    "Nothing is lost on these prompts. It does harm where all scores of a token are as low, for then softmax gives "
    "NaN, or where one is as high; sdpa attention keeps scores in fp32."
)


def _absorbed(case: _Case) -> _Found:
    row, each = case.event.row or 0, case.run_pass
    if row >= len(each.top1) or each.top1[row] is None:
        return None
    if any(_is_in_the_stream(case, event) for event in each.events):
        return None
    reference = case.columns.by_key.get((REFERENCE, each.prompt))
    other = reference is not None and row < len(reference.top1) and reference.top1[row] != each.top1[row]
    kl = each.kl[row] if row < len(each.kl) else None
    if not other and (kl is None or kl < _WRONG):
        return None
    how = f"KL divergence {kl:.3g} nats" if kl is not None else "another next token than fp32's"
    usual = advice_for(case.columns.run, each.dtype, case.magnitude, case.limit)
    return (
        "silent-absorption",
        f"no hidden state after it is bad, and the logits are finite and wrong: {how}",
        (f"No NaN will ever show this. {usual}"),
    )


_WRONG = 0.01
"""Nats of KL divergence from fp32 above which finite logits are wrong; rounding alone gives some 0.001."""


def _is_in_the_stream(case: _Case, event: Event) -> bool:
    """Whether something bad stands in the residual stream itself, or in the logits."""
    return bool(event.nan or event.inf) and _role(case.columns.run.sites[event.site]) in ("residual", "logits")


def _role(site: Site) -> str | None:
    return row_of(site.module, site.op, site.call).role


def _length(case: _Case) -> _Found:
    few, alone, place = case.controls.get("token after the first"), case.controls.get("token alone"), _place(case)
    if place is None or not (_clean(few, case) and _clean(alone, case)):
        return None
    ids, many = _row_ids(case), case.controls.get("as many first tokens")
    same = [ids[0]] * place == ids[:place]  # then that control was the row itself
    others = case.controls.get("as many other tokens")
    if others is None or (many is None and not same) or _clean(many, case) or _clean(others, case):
        return None
    why = f"the token is clean alone and after one other, and fails after {place} times the first token, or another"
    find = sweep(case.columns.run, case.run_pass.dtype, "length", case.columns.record)
    return "length", why, f"{_usual(case)} Find the length with: {find}"


def _token(case: _Case) -> _Found:
    token, alone, rest = (
        token_of(case.columns.run, case.run_pass, case.event),
        case.controls.get("token alone"),
        case.controls.get("without the token"),
    )
    if token is None or token.padding:
        return None
    single = len(_row_ids(case)) == 1
    others = _without(case, token.id)
    if not single and (alone is None or _clean(alone, case)):
        return None
    if rest is not None:
        if not _clean(rest, case):
            return None
        why = f"without it {_what_is(rest)}"
    elif len(set(_row_ids(case))) == 1 and others:
        why = f"prompts without it are clean ({_listed(case, others)})"
    else:
        return None
    shown = f"token {token.id}" + (f" ({token.text!r})" if token.text else "")
    return (
        "trigger-token",
        f"{shown} overflows by itself, and {why}",
        f"{_usual(case)} Find others like it with: {sweep(case.columns.run, case.run_pass.dtype, 'first-token')}",
    )


def _without(case: _Case, token: int | None) -> list[int]:
    """Clean prompts, where none of them has a token: it may do nothing where it stands among others."""
    dtype = case.run_pass.dtype
    return [] if token in case.columns.clean_ids(dtype) else case.columns.by_outcome(dtype)[1]


def _place(case: _Case) -> int | None:
    """The token's index in the row's ids, or None."""
    if case.event.position is None:
        return None
    return case.event.position - case.columns.run.prompts[case.run_pass.prompt].rows[case.event.row or 0].padding


def _row_ids(case: _Case) -> list[int]:
    return case.columns.run.prompts[case.run_pass.prompt].rows[case.event.row or 0].ids


def _template(case: _Case) -> _Found:
    """A failing chat turn whose text is clean: what fails is of the template's making, token or not."""
    other = case.controls.get("without the template")
    if _every_prompt_fails(case) or not _clean(other, case):
        return None
    return "trigger-prompt", f"without the chat template {_what_is(other)}", _usual(case)


def _together(case: _Case) -> _Found:
    other, alone = case.controls.get("with the template"), case.controls.get("token alone")
    if _every_prompt_fails(case) or not _clean(alone, case):
        return None  # then it takes less than this text
    filled = [case.controls.get("as many first tokens"), case.controls.get("as many other tokens")]
    if any(_clean(each, case) for each in filled):
        why = "the token is clean alone, and after as many others: it takes what stands before it"
        return "trigger-prompt", why, _usual(case)
    if not _clean(other, case):
        return None
    return "trigger-prompt", f"with the chat template {_what_is(other)}", _usual(case)


def _every_prompt_fails(case: _Case) -> bool:
    """Of several: then no text of them is to blame."""
    failing, clean = case.columns.by_outcome(case.run_pass.dtype)
    fails, of = case.columns.failing(case.run_pass.dtype) or (len(failing), len(failing) + len(clean))
    return fails == of > 1


def _usual(case: _Case) -> str:
    return advice_for(case.columns.run, case.run_pass.dtype, case.magnitude, case.limit)


_RULES: tuple[Callable[[_Case], _Found], ...] = (
    _dead,
    _spared,
    _harmless,
    _chance,
    _poisoned,
    _masked,
    _scores,
    _accumulation,
    _absorbed,
    _template,
    _token,
    _length,
    _together,
)


def weight_evidence(run: Run, weight: Weight, damaged: bool) -> tuple[str, ...]:
    """What shows that a weight is bad."""
    digest = run.explanation.hashes.get(weight.file) if run.explanation is not None else None
    where = f"{weight.name} in {weight.file}, {weight.elements:,} elements"
    if not damaged:
        return (f"static check: {where}, largest {float(weight.abs_max):.6g}",)
    found = [f"static check: {where}, {weight.nan:,} NaN, {weight.inf:,} infinite"]
    return (*found, f"SHA-256 of {weight.file}: {digest}") if digest else tuple(found)
