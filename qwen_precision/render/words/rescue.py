"""A rescue in words, for every format that has room: what is done, what it costs, what it cannot do, the proof."""

from collections.abc import Iterable, Iterator

from qwen_precision.dtypes import RESCUED
from qwen_precision.judge import LOGITS, Report, answer_of
from qwen_precision.qwen3 import layer_of, placed
from qwen_precision.record import Exported, LayerPowers, Rescue, Stuck
from qwen_precision.render.text import count, number, ranges, room

_MOST = 6
"""Stuck operations named one by one; the rest is counted."""

_LAYERED = (
    # (power, what is multiplied, what makes up for it)
    ("input_norm", "input_layernorm", "q, k and v_proj"),
    ("query", "q_proj", "k_proj"),
    ("value", "v_proj", "o_proj"),
    ("post_norm", "post_attention_layernorm", "gate and up_proj"),
    ("product", "up_proj", "down_proj"),
)


def headline(plan: Rescue) -> str:
    """What comes of it, in one sentence."""
    needed = _modules(plan.fp32_modules)
    if plan.unsupported is not None:
        return f"No rescue: {plan.unsupported}{f'; this would have to stay in fp32: {needed}' if needed else ''}."
    if not plan.possible:
        beside = "" if plan.rescaling.changes_nothing else "beside the factors below, "
        keep = f"; {beside}this would have to stay in fp32: {needed}" if needed else ""
        return f"Cannot be rescued by rescaling alone{keep}."
    if plan.rescaling.changes_nothing:
        left = "what has less cannot be moved" if plan.stuck else f"every operation has {room(plan.margin)} headroom"
        return f"Nothing to rescue in fp16: {left}."
    return f"Powers of two that change no fp32 output and give {room(plan.margin)} headroom in fp16:"


def why_none(plan: Rescue) -> str:
    """Why a plan is not carried out, in a clause; empty where it can be."""
    if plan.unsupported is not None:
        return plan.unsupported
    fails = [each for each in plan.stuck if each.fails]
    if fails:
        more = f", and {count(len(fails) - 1, 'more such place')}" if fails[1:] else ""
        return f"rescaling alone does not do it: {_stuck(fails[0])}{more}"
    return "nothing to rescue in fp16" if plan.rescaling.changes_nothing else ""


def _modules(modules: list[str]) -> str:
    """ "model.layers.1 to 3, lm_head": layers that are whole as ranges, then the rest of what there is one by one."""
    whole: dict[str, list[int]] = {}
    rest = []
    for module in modules:
        path, _, number = module.rpartition(".")
        if number.isdecimal() and layer_of(module) == int(number):
            whole.setdefault(path, []).append(int(number))
        else:
            rest.append(module)
    more = [f"{len(rest) - _MOST} more"] if len(rest) > _MOST else []
    return ", ".join([*(f"{_layers(each)} ({path})" for path, each in whole.items()), *rest[:_MOST], *more])


def _layers(layers: list[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"


def factors(plan: Rescue) -> Iterator[str]:
    """A line for each factor."""
    scaling = plan.rescaling
    if scaling.stream:
        normed = ", and q_proj, k_proj" if scaling.qk_norm else ""
        yield (
            f"residual stream x 2^{-scaling.stream}: embed_tokens, o_proj, down_proj{normed}; "
            f"rms_norm_eps {scaling.eps:.6g} becomes {scaling.new_eps:.6g}"
        )
    if scaling.final_norm:
        takes = "the tied lm_head has the stream's factor"
        takes = takes if scaling.final_norm == scaling.stream and not scaling.untied else "lm_head makes up for it"
        yield f"final norm x 2^{scaling.final_norm}: {takes}"
    if scaling.untied:
        yield "lm_head becomes a tensor of its own, no longer tied to embed_tokens"
    for power, what, other in _LAYERED:
        for size, layers in _by_size(scaling.layers, power):
            yield f"{what} x 2^{-size} in {_layers(layers)}: {other} makes up for it"


def _by_size(layers: Iterable[LayerPowers], power: str) -> Iterator[tuple[int, list[int]]]:
    sizes: dict[int, list[int]] = {}
    for each in layers:
        held = getattr(each, power)
        for size in sorted(set(held if isinstance(held, list) else [held]) - {0}):
            sizes.setdefault(size, []).append(each.layer)
    yield from sorted(sizes.items())


def costs(report: Report, plan: Rescue) -> str:
    """How many weights fp16 does not hold exactly, and by how much, in a sentence."""
    wide = report.run.model.source_dtype in ("F32", "F64")
    lose = "lose more in fp16 than its own rounding" if wide else "are not exact in fp16"
    before, after, badly = (
        sum(getattr(each, key) for each in plan.losses) for key in ("inexact_before", "inexact", "badly")
    )
    elements = sum(each.elements for each in plan.losses)
    if not after:
        return f"Of {elements:,} weights that take a factor, none {lose.replace('are', 'is')}."
    worst = max(plan.losses, key=lambda each: each.error)
    kinds = ", ".join(f"{each.kind} {each.inexact:,}" for each in plan.losses if each.inexact)
    return (
        f"Of {elements:,} weights that take a factor, {after:,} {lose} ({before:,} before): {kinds}; "
        f"{badly:,} change by more than 1 %, {sum(each.to_zero for each in plan.losses):,} become zero. "
        f"Root mean square error at most {number(float(worst.error))} of the weights' ({worst.kind})."
    )


def costs_briefly(plan: Rescue) -> str:
    """What fp16 makes of the weights that take a factor, in a clause; empty where it changes none by much."""
    badly, zero = (sum(getattr(each, key) for each in plan.losses) for key in ("badly", "to_zero"))
    elements = sum(each.elements for each in plan.losses)
    if not badly:
        return ""
    return f"{badly:,} of {elements:,} weights change by over 1 % in fp16" + (f", {zero:,} to zero" if zero else "")


def stuck(plan: Rescue) -> Iterator[str]:
    """A line for each place that no factor moves."""
    for each in plan.stuck[:_MOST]:
        yield _stuck(each)
    if len(plan.stuck) > _MOST:
        yield f"… and {count(len(plan.stuck) - _MOST, 'more such place')}"


def _stuck(each: Stuck) -> str:
    left = "" if not each.headroom else f" ({room(float(each.headroom))} headroom)"
    return f"{placed(each.layer, each.name)}{left}: {'' if each.fails else 'stays as it is; '}{each.why}"


def proof(report: Report, exported: Exported) -> Iterator[tuple[str, str]]:
    """What was measured of the exported folder, as pairs of a name and a sentence."""
    state = "verified" if exported.verified else f"NOT verified: {exported.why}"
    kept = "" if exported.kept else "; the folder was removed"
    yield "exported", f"{exported.folder} ({exported.dtype}, {exported.bytes / 1e6:,.1f} MB), {state}{kept}"
    answer = answer_of(report.run)
    compared = "final hidden states and last logits" if answer == LOGITS else answer
    same = "equal to the original's bit for bit" if exported.identical else "NOT the original's"
    yield (
        "in fp32",
        (f"before its weights were rounded: {compared} {same}, at {count(exported.compared, 'token')}"),
    )
    first = report.headroom[RESCUED][0] if report.headroom.get(RESCUED) else None
    verdict = report.verdict.get(RESCUED, "not judged").upper()
    before = f"{verdict}, {room(first.headroom)} headroom; " if first is not None else ""
    least = room(float(exported.headroom)) if exported.headroom is not None else "-"
    yield "in fp16", f"before: {before}after: {exported.verdict.upper()}, {least} at {exported.where}"
    errors = [
        f"{name} {number(value)}" if value is not None else f"{name} not finite"
        for name, value in exported.logit_error.items()
        if name != "after"
    ]
    after = exported.logit_error.get("after")
    yield answer, f"relative error against fp32: {', '.join(errors)}; {RESCUED} rescued {number(after)}"
