"""The Report as JSON, for scripts: stable keys; NaN and infinity as the words "nan", "inf" and "-inf"."""

import json
import unicodedata
from dataclasses import asdict
from typing import Any

from qwen_precision.judge import (
    Changes,
    Corpus,
    Cost,
    EngineVerdict,
    Finding,
    Report,
    bought_by_row,
    closeup_of,
    cost,
    headroom_gains,
    massive_channels,
    run_up,
)
from qwen_precision.record import Generation, Run, in_words, rounded
from qwen_precision.render.schema import flat
from qwen_precision.render.view import View

SCHEMA = 1


def render_json(view: View) -> str:
    """A list of ``reports``, always; of one alone its keys stand at the top too; with a baseline, ``changes``."""
    reports = [_report(each) for each in view.reports]
    for report, changes in zip(reports, view.changes, strict=False):
        report["changes"] = _changes(changes)
    # What scripts of one run read stays where it was.
    alone = reports[0] if len(reports) == 1 else {}
    data = {"schema": SCHEMA, "exit_code": view.exit_code, **alone, "reports": reports}
    if view.gone:
        data["gone"] = list(view.gone)
    text = json.dumps(in_words(_rounded(data)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # On a terminal a control or right-to-left character would act; as an escape it is the same JSON.
    hidden = {char for char in set(text) if unicodedata.category(char)[0] == "C" and char != "\n"}
    return text.translate({ord(char): _escape(char) for char in hidden})


def _escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _report(report: Report) -> dict[str, Any]:
    found = report.precision
    return {
        **({"file": report.name} if report.name else {}),
        "verdict": report.verdict,
        "stopped": report.stopped,
        "unfinished": report.run.unfinished,
        "model": report.run.model.model_dump(),
        **({"corpus": _corpus(report.corpus)} if report.corpus is not None else {}),
        "findings": [_finding(report, finding) for finding in report.findings],
        **({"precision": {dtype: asdict(each) for dtype, each in found.items()}} if found else {}),
        **_logits(report),
        **_why(report),
        **_computed(report.run),
        **({"engines": [_engine(each) for each in report.engines]} if report.engines else {}),
        **({"rescue": _rescue(report)} if report.run.rescue is not None else {}),
        **({"generation": _generation(report.run.generation)} if report.run.generation is not None else {}),
    }


def _corpus(corpus: Corpus) -> dict[str, Any]:
    """What came of all prompts; the findings are those of the prompts that are worst in something."""
    return {
        "sources": list(corpus.sources),
        "prompts": corpus.prompts,
        "asked": corpus.asked,
        "blocks": corpus.blocks,
        "missing_blocks": corpus.missing_blocks,
        "not_seen": list(corpus.missing),
        "do": list(corpus.do),
        "dtypes": {
            each.dtype: {
                "failing": each.failing,
                "failing_prompts": list(each.fail),
                "places": [{"where": where, "prompts": number} for where, number in each.places],
                "headroom": {f"{share:g}": left for share, left in each.quantiles},
                "worst": [{"prompt": name, "headroom": left} for name, left in each.worst],
            }
            for each in corpus.across
        },
    }


def _finding(report: Report, finding: Finding) -> dict[str, Any]:
    """A finding, with what stands around it in the run."""
    look = closeup_of(report.run, finding)
    return {
        **flat(finding),
        "closeup": look.model_dump() if look is not None else None,
        "run_up": [step._asdict() for step in run_up(report.run, finding)],
    }


def _computed(run: Run) -> dict[str, str]:
    """How products were computed, where it was not by the machine's own kernels."""
    return {choice.what: choice.value for choice in run.choices if choice.what == "arithmetic"}


def _engine(each: EngineVerdict) -> dict[str, Any]:
    """One level, but for the rule that decided, with its source, and the options that avoid it."""
    place = each.place
    return {
        "engine": each.engine.name,
        "runs": each.engine.runs,
        "note": each.engine.note,
        "verdict": each.verdict,
        "value": each.value,
        **{key: getattr(place, key, None) for key in ("layer", "module", "op", "name", "prompt", "channel")},
        "token": None if place is None or place.token is None else asdict(place.token),
        "reference_abs_max": each.magnitude,
        "headroom": each.headroom,
        "missing": each.missing,
        "absent": each.absent,
        "avoid": [[option.model_dump() for option in way] for way in each.avoid],
        "rule": each.rule.model_dump() if each.rule is not None else None,
    }


def _logits(report: Report) -> dict[str, Any]:
    """What a softmax in float32 is worth by dtype, and bytes of logits by length; nothing where none were seen."""
    found, taken = report.bought, cost(report.run)
    if not found and taken is None:
        return {}
    return {
        "logits": {
            "upcast": {dtype: asdict(each) for dtype, each in found.items()},
            **({"rows": _rows(report)} if report.corpus is None and report.run.generation is None else {}),
            "cost": _cost(taken) if taken is not None else None,
        }
    }


def _rows(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The same of each row of each prompt."""
    return {dtype: [asdict(each) for each in bought_by_row(report.run, dtype)] for dtype in report.bought}


def _cost(taken: Cost) -> dict[str, Any]:
    told = {name: getattr(taken, name) for name in ("vocabulary", "dtype", "held", "prompt", "pieces", "seconds")}
    return {**told, "lengths": [each._asdict() for each in taken.lengths]}


def _why(report: Report) -> dict[str, Any]:
    """Controls, massive activations and triggers, where there are any."""
    run, channels = report.run, massive_channels(report.run)
    return {
        **({"massive": [each._asdict() for each in channels]} if channels else {}),
        **({"explanation": run.explanation.model_dump()} if run.explanation is not None else {}),
        **({"sweep": run.sweep.model_dump()} if run.sweep is not None else {}),
    }


def _rescue(report: Report) -> dict[str, Any]:
    """The plan, and the headroom of every operation before and after it."""
    plan = report.run.rescue
    assert plan is not None
    return {
        **plan.model_dump(),
        "possible": plan.possible,
        "new_eps": plan.rescaling.new_eps,
        "headroom": [row._asdict() for row in headroom_gains(report.run)],
    }


def _changes(changes: Changes) -> dict[str, Any]:
    return {
        "baseline": changes.baseline.name,
        "new": [flat(finding) for finding in changes.new],
        "fixed": [flat(finding) for finding in changes.fixed],
        "changed": [
            {"before": flat(each.before), "now": flat(each.now), "worse": each.worse} for each in changes.changed
        ],
        "headroom": {dtype: {"before": pair[0], "now": pair[1]} for dtype, pair in changes.headroom.items()},
    }


def _generation(made: Generation) -> dict[str, Any]:
    """Texts, what a softmax in the dtype does to each step, and trips; all else of a step is in the record."""
    kept = {"row", "input", "text", "ids", "finish", "stretches"}
    kept |= {"logprob", "logprob_error", "mass_lost", "ranks", "changed"}
    return {
        "rows": [row.model_dump(include=kept) for row in made.rows],
        "trips": [trip.model_dump() for trip in made.trips],
        "error": made.error.model_dump() if made.error is not None else None,
    }


def _rounded(value: Any) -> Any:
    """Six digits: what the record has."""
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
