"""The Report as JSON, for scripts: stable keys; NaN and infinity as the words "nan", "inf" and "-inf"."""

import json
import math
from dataclasses import asdict
from typing import Any

from qwen_precision.findings import Finding, Report

SCHEMA = 1


def render_json(report: Report, fail_on: str = "fail") -> str:
    """The Report: schema, exit code, verdict and findings."""
    data = {
        "schema": SCHEMA,
        "exit_code": report.exit_code(fail_on),
        "verdict": report.verdict,
        "stopped": report.stopped,
        "model": report.run.model.model_dump(),
        "findings": [_finding(finding) for finding in report.findings],
    }
    return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finding(finding: Finding) -> dict[str, Any]:
    return asdict(finding)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
