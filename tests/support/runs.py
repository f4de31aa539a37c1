"""Probes in one line, and what a command printed."""

from pathlib import Path
from typing import Any

import pytest

from qwen_precision.diagnose.run import diagnose
from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding, Report
from qwen_precision.record.run import Run
from qwen_precision.settings.config import load_settings
from qwen_precision.settings.prompts import PromptSpec


def run_probe(source: str | Path, texts: list[str] | None = None, file: str | None = None, **settings: Any) -> Any:
    from qwen_precision.probe.run import probe
    from qwen_precision.settings.config import load_settings
    from qwen_precision.settings.prompts import read_prompts

    on_final = settings.pop("on_final", None)
    return probe(str(source), load_settings(None, settings), read_prompts(texts or [], file), on_final=on_final)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def plain_logits(model: Any, folder: Path, texts: list[str]) -> Any:
    """What transformers' own forward answers, on the model's device; padding has no position of its own, as
    ``generate`` counts."""
    import torch
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = given["input_ids"].to(model.device), given["attention_mask"].to(model.device)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    more = {"attention_mask": mask, "position_ids": positions} if len(texts) > 1 else {}
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, **more).logits


TEXTS = ["The capital of France is Paris", "上海有个非常出名的地方，"]


def explained(folder: Path | str, prompts: list[PromptSpec] | None = None, **settings: Any) -> Run:
    specs = prompts or [PromptSpec(name=text[:9], text=text) for text in TEXTS]
    return diagnose(str(folder), load_settings(None, settings), specs).run


def errors(report: Report, dtype: str = "fp16") -> list[Finding]:
    """What makes a dtype fail: one for every place that would have to change."""
    assert all(each.what != "second look" for each in report.run.choices)  # run again, a layer does the same
    return [finding for finding in report.findings if finding.dtype == dtype and finding.severity == "error"]


def memory_of(run: Run) -> tuple[str, str]:
    """Which way a model ran, and the reason of it."""
    return next((each.value, each.reason) for each in run.choices if each.what == "memory")


def timeless(run: Run) -> Run:
    """The Run without the day and every duration: what two runs of the same measurement must agree in."""
    changes: dict[str, Any] = {"created": "", "seconds": {}}
    if run.logits is not None:
        changes["logits"] = run.logits.model_copy(update={"upcast_seconds": 0.0})
    if run.generation is not None and run.generation.logits is not None:
        logits = run.generation.logits.model_copy(update={"upcast_seconds": 0.0})
        changes["generation"] = run.generation.model_copy(update={"logits": logits})
    if run.sweep is not None:
        changes["sweep"] = run.sweep.model_copy(update={"seconds": 0.0})
    return run.model_copy(update=changes)


def faults(report: Report) -> list[Finding]:
    """All that is found but advice: in logits that were made up, rounding may well change a loss."""
    return [finding for finding in report.findings if finding.kind != "advice"]


def first_of(run: Run, dtype: str = "fp16", places: int = 1) -> Finding:
    """The first finding of a dtype in which so many places would have to change: more failures are a bug."""
    report = judge(run)
    found = [(each.place.layer, each.place.name, each.place.expert) for each in errors(report, dtype)]
    assert len(found) == places, found
    return next(each for each in report.findings if each.dtype == dtype and each.severity != "info")
