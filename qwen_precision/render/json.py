"""The Report as JSON, for scripts: stable keys; NaN and infinity as the words "nan", "inf" and "-inf"."""

import json
import math
from dataclasses import asdict
from typing import Any

from qwen_precision.findings import Report
from qwen_precision.generation import Generation
from qwen_precision.parts import in_words

SCHEMA = 1


def render_json(report: Report, fail_on: str = "fail") -> str:
    """The Report: schema, exit code, verdict and findings."""
    data = {
        "schema": SCHEMA,
        "exit_code": report.exit_code(fail_on),
        "verdict": report.verdict,
        "stopped": report.stopped,
        "model": report.run.model.model_dump(),
        "findings": [asdict(finding) for finding in report.findings],
        **({"generation": _generation(report.run.generation)} if report.run.generation is not None else {}),
    }
    return json.dumps(in_words(_rounded(data)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _generation(made: Generation) -> dict[str, Any]:
    """Texts and trips; the numbers of every step are in the record."""
    kept = {"row", "input", "text", "ids", "finish", "stretches"}
    return {
        "rows": [row.model_dump(include=kept) for row in made.rows],
        "trips": [trip.model_dump() for trip in made.trips],
        "error": made.error.model_dump() if made.error is not None else None,
    }


def _rounded(value: Any) -> Any:
    """Six digits: what the record has."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
