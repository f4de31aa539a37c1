"""What is wrong with scales becomes a finding that names tensor and block; what leaves the range is told once."""

import math

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.record.run import ScaleFault
from support.builders import healthy_run

NAME = "model.layers.2.self_attn.o_proj.weight"


def a_fault(kind: str, value: float, dtype: str | None = None) -> ScaleFault:
    return ScaleFault(
        name=f"{NAME}_scale",
        parameter=NAME,
        file="model.safetensors",
        kind=kind,
        dtype=dtype,
        count=2,
        scales=256,
        row=5,
        column=3,
        height=1,
        width=16,
        value=value,
    )


@pytest.mark.parametrize(
    ("kind", "value", "verdict", "words"),
    [
        ("nan", math.nan, "fail", "NaN"),
        ("infinite", math.inf, "fail", "infinite"),
        ("unwritten", -3.4028234663852886e38, "fail", "never written"),
        ("zero", 0.0, "risk", "zero"),
    ],
)
def test_a_bad_scale_fails_every_dtype_and_a_zero_one_is_a_risk(
    kind: str, value: float, verdict: str, words: str
) -> None:
    report = judge(healthy_run(scale_faults=[a_fault(kind, value)]))
    assert set(report.verdict.values()) == {verdict}
    found = [each for each in report.findings if each.kind == "bad-scale"]
    assert [each.dtype for each in found] == list(report.verdict)
    finding = found[0]
    assert finding.place.layer == 2 and finding.place.module == "model.layers.2.self_attn.o_proj"
    assert f"2 of 256 scales of {NAME}_scale in model.safetensors" in finding.cause.sentence
    assert words in finding.cause.sentence
    assert (finding.cause.kind == "damaged-scale") == (verdict == "fail")
    assert "block row 5, column 3 (outputs 5, inputs 48 to 63)" in finding.cause.evidence[0]


def test_a_block_beyond_the_range_is_placed_in_that_dtype_and_the_verdict_is_left_to_the_weight() -> None:
    report = judge(healthy_run(scale_faults=[a_fault("overflow", 147.0, "fp16")]))
    (finding,) = (each for each in report.findings if each.kind == "bad-scale")
    assert (finding.dtype, finding.severity) == ("fp16", "info")
    assert "beyond fp16's 65504" in finding.cause.sentence and "scale 147" in finding.cause.evidence[0]
    assert set(report.verdict.values()) == {"ok"}
