"""A finding in words, for every format: where, how far, why, what was tried, what it is not, what was done.

Strings from strangers are still in it: whoever shows it makes them inert.
"""

import math
from collections.abc import Iterator

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge import CAUSES, Finding, Group, Place, Report, Token
from qwen_precision.record import Control
from qwen_precision.render.text import count, number, quoted, room
from qwen_precision.render.words.ruledout import ruled_out
from qwen_precision.render.words.why import microscope

_PROMPTS = 12  # names of prompts; all of them are in the JSON

COUNTED = "Layers, tokens, channels, rows and steps count from 0."


def facts(report: Report, group: Group) -> Iterator[tuple[str, str]]:
    """All there is to tell, as pairs of a name and a line; of a group what is true of its first, and where else."""
    first = group.first
    yield from _where(first)
    far = how_far(first)
    if far:
        yield "how far", far
    yield from _spread(group)
    said = "" if first.kind == "near-overflow" else why(first)
    if said:
        yield "why", said
    yield from (("", line) for line in first.cause.facts if not said.endswith(f"; {line}"))
    if first.predicted:
        yield "", f"foreseen from fp32: the {first.dtype} stream had failed before, and did not get here"
    if first.cause.tried:
        yield "tried", tried(report, first)
    excluded = dict.fromkeys(what for what, _ in ruled_out(report, first))
    if excluded:
        yield "not it", ", ".join(excluded)
    yield from microscope(report, first)
    if first.cause.done:
        yield "done", first.cause.done


def _where(first: Finding) -> Iterator[tuple[str, str]]:
    place = first.place
    if place.step is not None:
        yield "where", f"step {place.step}, row {place.row}" + (f", {place.module}  {place.op}" if first.origin else "")
    elif first.kind != "advice":
        yield "where", f"{place.module}  {place.op}"
    at = ", ".join(inside(place, with_id=True))
    if at:
        yield "at", at


def _spread(group: Group) -> Iterator[tuple[str, str]]:
    """How much of it is not finite, on which prompts, in which other layers."""
    first = group.first
    size, carried = first.magnitude, first.spread.propagated
    if size.nan or size.inf:
        later = f"the {count(carried, 'operation')} after it not finite either"
        if first.place.step is not None:
            later = f"and at {count(carried, 'later step')}"
        yield "bad", f"{size.inf:,} inf, {size.nan:,} NaN" + (f"; {later}" if carried else "")
    prompts = dict.fromkeys(name for each in group.findings for name in each.spread.prompts)
    if prompts:
        more = len(prompts) - _PROMPTS
        yield "prompts", ", ".join(map(quoted, [*prompts][:_PROMPTS])) + (f" and {more} more" if more > 0 else "")
    if len(group.findings) > 1:
        rest = group.findings[1:]
        yield (
            "also",
            ", ".join(_also(each) for each in rest[:4]) + (f" and {len(rest) - 4} more" if len(rest) > 4 else ""),
        )


def _also(finding: Finding) -> str:
    if finding.place.step is not None:
        return f"step {finding.place.step} of row {finding.place.row}"
    layer = f"layer {finding.place.layer}" if finding.place.layer is not None else finding.place.module
    return f"{layer} ({number(finding.magnitude.reference)})" if finding.magnitude.reference is not None else layer


def inside(place: Place, with_id: bool = False) -> Iterator[str]:
    """Where in an operation's output: token, key, head, expert, channel."""
    if place.token is not None:
        yield ("query of " if place.key is not None else "") + _token(place.token, with_id)
    if place.key is not None:
        yield f"key of {_token(place.key, with_id)}"
    for name in ("head", "expert", "channel"):
        if getattr(place, name) is not None:
            yield f"{name} {getattr(place, name)}"


def _token(token: Token, with_id: bool) -> str:
    """A token as a person finds it: ``token 1 " capital"``, and with ``with_id`` as a machine does."""
    row = f" of row {token.row}" if token.row else ""
    if token.padding:
        return f"token {token.position}{row}, which is padding"
    number = f" (id {token.id})" if with_id else ""
    text = f" {quoted(token.text, 24)}" if token.text else ""  # none where it was redacted
    return f"token {token.position}{row}{text}{number}"


def how_far(first: Finding) -> str:
    """The magnitude beside the limit that it is compared with; of a damaged tensor how much of it is bad."""
    size, limit = first.magnitude, _limit_of(first)
    if first.kind == "overflow" and size.reference is None and first.place.step is None and first.dtype in DTYPES:
        bad = f"{size.inf + size.nan:,} elements beyond {first.dtype}'s limit of {number(DTYPES[first.dtype].max)}"
        return f"{bad}; fp32 does not tell how far"
    if size.reference is None or limit is None:
        parts = [f"{value:,} {word}" for value, word in ((size.nan, "NaN"), (size.inf, "infinite")) if value]
        return " and ".join(parts)
    over = f"{number(size.reference)} in fp32"
    if size.reference > limit[0]:
        return f"{over}, {size.reference / limit[0]:.3g} times {limit[1]} of {number(limit[0])}"
    return f"{over}; {limit[1]} is {number(limit[0])}: {room(limit[0] / size.reference)} room"


def _limit_of(first: Finding) -> tuple[float, str] | None:
    """What a magnitude is compared with, and what that is called."""
    size = first.magnitude
    if size.reference is None or size.headroom is None:
        return None
    limit = size.reference * size.headroom
    named = DTYPES.get(first.dtype)
    if named is not None and math.isclose(limit, named.max, rel_tol=1e-6):
        return named.max, f"{first.dtype}'s limit"
    return limit, "the limit there"


def why(first: Finding) -> str:
    """The cause in one clause; the sentence of the finding where it has none."""
    if first.cause.kind is None or first.cause.kind not in CAUSES:
        return first.cause.sentence.rstrip(".")
    how = "".join(f"; {fact}" for fact in first.cause.facts[-1:])
    return f"{first.cause.kind}: {CAUSES[first.cause.kind].said.format(dtype=first.dtype, how=how)}"


def tried(report: Report, first: Finding) -> str:
    """The control runs by outcome: ``fails: again, token 1 alone; clean: with chat template``.

    Of other failing prompts only what came out otherwise: ``prompt "chat" clean: token 57 alone``.
    """
    token = f"token {first.place.token.position}" if first.place.token is not None else "the token"
    by_outcome: dict[str, list[str]] = {}
    for each in first.cause.tried:
        by_outcome.setdefault(each.outcome, []).append(_briefly(each.what, each.detail, token))
    for control in _otherwise(report, first):
        outcome = f"prompt {quoted(control.prompt, 24)} {'clean' if control.clean else 'fails'}"
        token = f"token {control.position}"
        by_outcome.setdefault(outcome, []).append(_briefly(control.what, control.detail, token))
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in by_outcome.items())


def _briefly(what: str, detail: str, token: str) -> str:
    return _BRIEFLY.get(what, detail).format(token=token)


def _otherwise(report: Report, first: Finding) -> Iterator[Control]:
    """Controls of the dtype's other failing prompts whose outcome is not that of the prompt that is shown."""
    outcomes = {each.what: each.outcome for each in first.cause.tried}
    explained = report.run.explanation
    for each in explained.controls if explained is not None else []:
        mine, other = outcomes.get(each.what), each.dtype == first.dtype and each.prompt != first.place.prompt
        if other and mine is not None and (mine == "clean") != each.clean:
            yield each


_BRIEFLY = {
    "same again": "again",
    "sdpa": "with sdpa",
    "row alone": "out of the batch",
    "full reduction": "with fp32 sums",
    "token alone": "{token} alone",
    "without the token": "without {token}",
    "with the template": "with chat template",
    "without the template": "without chat template",
    "before the token": "only what comes before",
    "token after the first": "{token} after one other",
    "as many first tokens": "after as many first tokens",
    "as many other tokens": "after as many others",
    "up to the token": "cut after {token}",
    "fresh engine": "in a fresh engine",
    "as generated": "as generated",
    "generated alone": "generated alone",
    "prefilled whole": "prefilled whole",
    "without cache": "without cache",
}
"""Controls in few words, by ``ControlKind``; the others by what the record says."""
