"""The JSON Schema of ``--format json``, made from the classes that are written; published in ``configs/schema/``.

More keys may stand beside these in a later version; those that are here keep their meaning.
"""

from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from qwen_precision.judge import Finding
from qwen_precision.settings import ARITHMETIC, FAIL_ON, VALUES

_VERDICTS = ("ok", "risk", "fail", "incomplete")
_WORDS = {"enum": ["nan", "inf", "-inf"]}
_OF_SOME = {
    "corpus": {"type": "object", "required": ["prompts", "blocks", "missing_blocks", "not_seen", "dtypes"]},
    "changes": {"type": "object", "required": ["baseline", "new", "fixed", "changed", "headroom"]},
    "logits": {"type": "object", "required": ["upcast", "cost"]},
}
"""What there is of a report over a folder, against a baseline, and of one with logits."""


class FlatFinding(TypedDict):
    """A finding as the JSON has it: one level, so that a script needs one look."""

    kind: str
    severity: str
    dtype: str
    prompt: str | None
    layer: int | None
    module: str
    op: str
    name: str
    origin: bool
    reference_abs_max: float | None
    headroom: float | None
    cause: str
    advice: str
    done: str
    nan: int
    inf: int
    propagated: int
    token: dict[str, int | str | bool | None] | None
    key: dict[str, int | str | bool | None] | None
    channel: int | None
    head: int | None
    expert: int | None
    prompts: tuple[str, ...]
    predicted: bool
    row: int | None
    step: int | None
    cause_kind: str | None
    site: int | None
    evidence: tuple[str, ...]


def flat(finding: Finding) -> FlatFinding:
    """The same on one level."""
    place, size, cause, token = finding.place, finding.magnitude, finding.cause, finding.place.token
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "dtype": finding.dtype,
        "prompt": place.prompt,
        "layer": place.layer,
        "module": place.module,
        "op": place.op,
        "name": place.name,
        "origin": finding.origin,
        "reference_abs_max": size.reference,
        "headroom": size.headroom,
        "cause": cause.sentence,
        "advice": cause.advice,
        "done": cause.done,
        "nan": size.nan,
        "inf": size.inf,
        "propagated": finding.spread.propagated,
        "token": None if token is None else dict(vars(token)),
        "key": None if place.key is None else dict(vars(place.key)),
        "channel": place.channel,
        "head": place.head,
        "expert": place.expert,
        "prompts": finding.spread.prompts,
        "predicted": finding.predicted,
        "row": place.row,
        "step": place.step,
        "cause_kind": cause.kind,
        "site": place.site,
        "evidence": cause.evidence,
    }


def report_schema() -> dict[str, Any]:
    """For draft 2020-12."""
    finding = _numbers_or_words(TypeAdapter(FlatFinding).json_schema())
    finding.pop("title", None)
    finding["properties"] |= {"closeup": {"type": ["object", "null"]}, "run_up": {"type": "array"}}
    report = {
        "file": {"type": "string"},
        **_OF_SOME,
        "verdict": {"type": "object", "additionalProperties": {"enum": list(_VERDICTS)}},
        "stopped": {"type": ["string", "null"]},
        "unfinished": {"type": ["string", "null"]},
        "model": {"type": "object"},
        "findings": {"type": "array", "items": {"$ref": "#/$defs/finding"}},
        "precision": {"type": "object"},
        "massive": {"type": "array"},
        "explanation": {"type": "object", "required": ["budget", "controls", "left_out", "hashes", "continuations"]},
        "arithmetic": {"enum": list(ARITHMETIC[1:])},
        "engines": {"type": "array", "items": {"$ref": "#/$defs/engine"}},
        "sweep": {"type": "object", "required": ["kind", "dtype", "tried", "worst"]},
        "rescue": {"type": "object", "required": ["margin", "rescaling", "possible", "stuck", "exported", "headroom"]},
        "generation": {"type": "object"},
    }
    needed = ["verdict", "stopped", "model", "findings"]
    one = {"type": "object", "properties": report, "required": needed}
    top = {
        "schema": {"const": 1},
        "exit_code": {"enum": [0, 1, 3]},
        "reports": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/report"}},
        "gone": {"type": "array", "items": {"type": "string"}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qprec report",
        "description": f"`qprec report RUN --format json`; the exit code depends on --fail-on ({', '.join(FAIL_ON)}).",
        "type": "object",
        "properties": {**top, **report},
        "required": ["schema", "exit_code", "reports"],
        # One run's keys stand at the top too.
        "if": {"properties": {"reports": {"maxItems": 1}}},
        "then": {"required": needed},
        "$defs": {"finding": finding, "report": one, "engine": _engine()},
    }


_OPTION = ["option", "evidence", "source", "version"]


def _engine() -> dict[str, Any]:
    """What comes of the checkpoint in an engine that was asked about."""
    text, size = {"type": ["string", "null"]}, {"anyOf": [{"type": ["number", "null"]}, _WORDS]}
    properties = {
        "engine": {"type": "string"},
        "runs": {"type": "string"},
        "note": {"type": "string"},
        "verdict": {"enum": list(_VERDICTS)},
        "value": {"enum": [*VALUES, None]},
        "layer": {"type": ["integer", "null"]},
        **dict.fromkeys(("module", "op", "name", "prompt"), text),
        "channel": {"type": ["integer", "null"]},
        "token": {"type": ["object", "null"]},
        "reference_abs_max": size,
        "headroom": size,
        "missing": {"type": "array", "items": {"type": "string"}},
        "absent": {"type": "array", "items": {"type": "string"}},
        "avoid": {"type": "array", "items": {"type": "array", "items": {"type": "object", "required": _OPTION}}},
        "rule": {"type": ["object", "null"], "required": ["because", "source", "version", "avoid"]},
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


def _numbers_or_words(value: Any) -> Any:
    """Where a number may stand, so may the words for what JSON has no number for."""
    if isinstance(value, dict):
        if value.get("type") == "number":
            return {"anyOf": [{"type": "number"}, _WORDS]}
        return {key: _numbers_or_words(item) for key, item in value.items()}
    return [_numbers_or_words(item) for item in value] if isinstance(value, list) else value
