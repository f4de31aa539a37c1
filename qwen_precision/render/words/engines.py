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
"""What a rescaling is planned for; whether it brings insides of norms and sums on their way in range nobody looks."""


_NONE = "no option of the engine is known"


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
        return "" if each.missing or each.absent else "nothing passes through fp16"
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
    for way in each.avoid:
        evidence = " and ".join(dict.fromkeys(option.evidence for option in way))
        by_evidence.setdefault(evidence, []).append(" and ".join(option.option for option in way))
    ways = [f"{' or '.join(options)} ({evidence})" for evidence, options in by_evidence.items()]
    plan = report.run.rescue
    if plan is not None and plan.possible and _MOVED.issuperset(each.values):
        ways.append("--rescue-to")
    return " or ".join(ways) or _no_way(each)


def _no_way(each: EngineVerdict) -> str:
    """Why no option is named: each would leave something failing."""
    without = [rule for rule in each.rules if not rule.avoid]
    if len(without) == len(each.rules):
        return _NONE
    kinds = " and ".join(dict.fromkeys(value for rule in without for value in rule.values if value in each.values))
    return f"{_NONE} for {kinds}"


def avoided(report: Report, each: EngineVerdict) -> str:
    """The same as a part of a sentence."""
    said = avoids(report, each)
    return said if not said or said.startswith(_NONE) else f"avoided by {said}"


def told(report: Report, each: EngineVerdict) -> str:
    """All of it in one line: the place, what avoids it, what was not judged."""
    said = [where(each), avoided(report, each), lacks(each)]
    return "; ".join(part for part in said if part)


def lacks(each: EngineVerdict) -> str:
    """What was not judged, and why: the record does not tell, or the model has none."""
    told = {"not in the record": each.missing, "not judged": each.absent}
    return "; ".join(f"{what}: {'; '.join(said)}" for what, said in told.items() if said)
