"""What comes of a checkpoint in each engine, in words, for every format: where, how far, how to avoid it."""

from collections.abc import Sequence

from qwen_precision.judge import EngineVerdict, Report
from qwen_precision.qwen3 import placed
from qwen_precision.render.text import number
from qwen_precision.render.words.finding import inside
from qwen_precision.settings import VALUES

_MOST = 2
"""Engines of one verdict that are named in a line; the rest is counted."""
_MOVED = frozenset(VALUES) - {"squares", "mean squares", "sums"}
"""What a rescaling brings into the range; the insides of norms stay as large as they are."""


def briefly(engines: Sequence[EngineVerdict]) -> str:
    """All of them in a line: ``FAIL transformers, vllm +7; OK llama.cpp``."""
    parts = []
    for verdict in ("fail", "risk", "incomplete", "ok"):
        names = [each.engine.name for each in engines if each.verdict == verdict]
        more = f" +{len(names) - _MOST}" if len(names) > _MOST else ""
        if names:
            parts.append(f"{verdict.upper()} {', '.join(names[:_MOST])}{more}")
    return "; ".join(parts)


def shortly(each: EngineVerdict) -> str:
    """The operation, and as what it passes through fp16."""
    if each.place is None or each.value is None:
        return where(each)
    return f"{placed(each.place.layer, each.place.name)} {VALUES[each.value]}".rstrip()


def where(each: EngineVerdict) -> str:
    """The same with token, channel and magnitude."""
    if each.place is None:
        return "" if each.missing else "nothing passes through fp16"
    at = ", ".join([placed(each.place.layer, each.place.name), *inside(each.place)])
    if each.value is None:
        return f"{at}: not finite in fp32 either"
    left = ", which becomes the largest number" if each.verdict == "risk" and _clipped(each) else ""
    how = f", {VALUES[each.value]}" if VALUES[each.value] else ""
    return f"{at}{how}: {number(each.magnitude)} in fp32{left}"


def _clipped(each: EngineVerdict) -> bool:
    return each.rule is not None and each.rule.saturates and each.headroom is not None and each.headroom < 1


def avoids(report: Report, each: EngineVerdict) -> str:
    """The options that avoid it, and how that is known; empty where there is nothing to avoid."""
    if each.verdict not in ("fail", "risk") or each.rule is None:
        return ""
    by_evidence: dict[str, list[str]] = {}
    for option in each.rule.avoid:
        by_evidence.setdefault(option.evidence, []).append(option.option)
    ways = [f"{' or '.join(options)} ({evidence})" for evidence, options in by_evidence.items()]
    plan = report.run.rescue
    if plan is not None and plan.possible and each.value in _MOVED:
        ways.append("--rescue-to")
    return " or ".join(ways) or "no option of the engine is known"


def lacks(each: EngineVerdict) -> str:
    """What the record does not tell."""
    return f"not in the record: {'; '.join(each.missing)}" if each.missing else ""
