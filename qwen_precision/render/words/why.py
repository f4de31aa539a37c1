"""Why something failed, in words, for every format that has room: cause, close look, run-up, controls, triggers."""

from collections.abc import Iterator

from qwen_precision.dtypes import DTYPES
from qwen_precision.judge import Finding, Report, closeup_of, massive_channels, run_up
from qwen_precision.record import Closeup, Run, Sweep
from qwen_precision.render.text import count, number, quoted

_MOST = 5
_HALF = 0.5
"""Input channels are named until they make up so much of an extreme."""


def microscope(report: Report, finding: Finding) -> Iterator[tuple[str, str]]:
    """What the close look saw of an origin, as pairs of a name and a line."""
    look = closeup_of(report.run, finding)
    if look is not None:
        if look.source is not None:
            yield "code", f"{look.source.file}:{look.source.line}  {look.source.text}"
        for operand in look.operands:
            shape = " x ".join(map(str, operand.shape))
            bad = f", {count(operand.bad, 'element')} not finite" if operand.bad else ""
            ends = f"{number(float(operand.low))} to {number(float(operand.high))}"
            yield operand.role, f"[{shape}] {operand.dtype}, {ends}{bad}"
        blame = _blame(look)
        if blame:
            yield "made of", blame
    steps = run_up(report.run, finding)
    if steps:
        yield "before it", ", ".join(f"{step.name} {number(step.value)}" for step in steps)


def _blame(look: Closeup) -> str:
    """The input channels that make up most of the extreme, with their weights."""
    parts, total = [], 0.0
    for each in look.contributions:
        weight = number(float(each.weight))
        parts.append(f"channel {each.channel} ({number(float(each.value))} x weight {weight}) {float(each.share):.0%}")
        total += float(each.share)
        if total >= _HALF:
            break
    return "input " + ", ".join(parts) if parts else ""


def controls(report: Report) -> Iterator[str]:
    """Control runs and what came of them."""
    made = report.run.explanation
    if made is None:
        return
    for each in made.controls:
        outcome = "clean" if each.clean else "fails"
        yield f"{each.dtype}, {quoted(each.prompt)}: {each.detail} ({count(each.tokens, 'token')}): {outcome}"
    yield from _left_out(made.left_out)
    by_dtype: dict[str, list[int | None]] = {}
    for one in made.continuations:
        by_dtype.setdefault(one.dtype, []).append(one.first_difference)
    for dtype, places in by_dtype.items():
        parted = [place for place in places if place is not None]
        where = f", first at token {min(parted)}" if parted else ""
        same = f"equal to fp32's on {len(places) - len(parted)} of {count(len(places), 'prompt')}"
        yield f"{dtype}: greedy continuation {same}{where}"


def _left_out(lines: list[str]) -> Iterator[str]:
    """What was not run, a line a reason."""
    by_reason: dict[str, dict[str, int]] = {}
    for line in lines:
        what, _, reason = line.rpartition(": ")
        counts = by_reason.setdefault(reason, {})
        counts[what] = counts.get(what, 0) + 1
    for reason, counts in by_reason.items():
        said = [f"{what} ({times} times)" if times > 1 else what for what, times in counts.items() if what]
        yield f"not run, {reason}: {', '.join(said)}" if said else f"not run: {reason}"


def massive(report: Report) -> Iterator[str]:
    """Massive activations of the reference, a line a channel."""
    for each in massive_channels(report.run)[:_MOST]:
        tokens = ", ".join(quoted(token, 20) for token in each.tokens[:4]) + (" …" if len(each.tokens) > 4 else "")
        layers = f"layer {each.first}" if each.first == each.last else f"layers {each.first} to {each.last}"
        yield f"channel {each.channel}, {layers}: up to {number(each.value)}, at {tokens}"


def swept(run: Run, seconds: bool = False) -> Iterator[str]:
    """What came of a sweep, in a line."""
    found = run.sweep
    if found is None:
        return
    if found.kind == "length":
        yield f"Length of {quoted(found.prompt or '')} in {found.dtype}: {_length(found)}"
        return
    taken = f", {float(found.seconds):.1f} s" if seconds else ""
    fails = "none fails" if not found.over else "1 fails" if found.over == 1 else f"{found.over:,} fail"
    if _up_to_the_step_up(run, found):
        fails = f"{found.over:,} beyond {_largest(found)} in hidden states or at linear layers"
    yield f"First tokens in {found.dtype}: {found.tried:,} of {found.total:,} tried{taken}; {fails}"


def triggers(run: Run) -> Iterator[str]:
    """What a sweep looked at, and what it found."""
    found = run.sweep
    if found is None:
        return
    length = found.kind == "length"
    yield from (f"{line} ({count(found.tried, 'forward')})." if length else f"{line}." for line in swept(run, True))
    if length:
        return
    if _up_to_the_step_up(run, found):
        yield f"Not looked at: other operations, and all behind {count(found.layers, 'layer')}; sweep again."
    else:
        yield (
            f"Looked at: every operation, in fp32, from embedding through {count(found.layers, 'layer')} to the end; "
            f"what came within 2x of {_largest(found)} there, in {found.dtype} itself. "
            "Not looked at: sums inside a fused kernel, tokens in other places."
        )
    for each in found.worst[:_MOST]:
        outcome = {True: "fails", False: "finite", None: "not tried"}[each.fails]
        which = f"id {each.ids[0]} " if len(each.ids) == 1 else ""
        where = f"layer {each.layer}, {each.name}" if each.layer is not None else each.name
        yield (
            f"{which}{quoted(each.text, 30)}: {number(float(each.magnitude))} in {where}, channel {each.channel}; "
            f"in {found.dtype} {outcome}"
        )


def _largest(found: Sweep) -> str:
    return f"{DTYPES[found.dtype].max if found.dtype in DTYPES else 0.0:.6g}"


def _up_to_the_step_up(run: Run, found: Sweep) -> bool:
    """Whether a sweep is one of those made before every operation was watched."""
    names = (each.name for each in found.worst)
    return found.layers < run.model.layers or any(name == "hidden states" or name[:9] == "input of " for name in names)


def _length(found: Sweep) -> str:
    if found.shortest_failing is None:
        return "by itself it does not fail at any length"
    if found.shortest_failing == 1:
        return "its first token fails"
    return f"the first {found.shortest_failing} tokens fail, the first {found.longest_clean} are clean"


def times_nearer(report: Report) -> float | None:
    """How many times nearer fp16 is to fp32 than bf16 is after the last layer, where it is safe and not farther."""
    found = report.precision
    if report.verdict.get("fp16") != "ok" or "fp16" not in found or "bf16" not in found:
        return None
    ours, theirs = (found[name].layers[-1] if found[name].layers else None for name in ("fp16", "bf16"))
    if not ours or not theirs or theirs < ours:
        return None
    return theirs / ours


def nearer(report: Report) -> str | None:
    """The same in a sentence."""
    times = times_nearer(report)
    if times is None:
        return None
    return f"fp16 is safe here, and {times:.2g}x closer to fp32 than bf16 (hidden states after the last layer)."
