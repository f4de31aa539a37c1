"""Findings of one operation in several layers are one group; what differs in any other way stays apart."""

from dataclasses import replace

import pytest

from qwen_precision.judge import Finding, grouped, judge
from support.builders import many_overflows_run, overflowing_run

ONE = judge(overflowing_run()).findings[0]


def in_layers(*layers: int | None) -> list[Finding]:
    return [replace(ONE, place=replace(ONE.place, layer=layer)) for layer in layers]


def test_the_same_operation_in_several_layers_is_one_group_and_its_first_finding_stands_for_all() -> None:
    findings = judge(many_overflows_run(40)).findings
    groups = grouped(findings)
    assert [group.where for group in groups] == [
        "layers 0 to 39, residual add after mlp",
        "layers 0 to 39, SwiGLU product",
    ]
    assert [group.first for group in groups] == findings[:2]
    assert sum(len(group.findings) for group in groups) == len(findings) == 80


@pytest.mark.parametrize("field", ["severity", "kind", "dtype"])
def test_findings_of_another_severity_kind_or_dtype_are_another_group(field: str) -> None:
    assert len(grouped([ONE, replace(ONE, **{field: "other"})])) == 2


def test_findings_of_another_operation_are_another_group() -> None:
    assert len(grouped([ONE, replace(ONE, place=replace(ONE.place, name="other"))])) == 2


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((None,), ""),
        ((7,), "layer 7, "),
        ((7, 7), "layer 7, "),
        ((3, 4), "layers 3 and 4, "),
        ((5, 3, 4), "layers 3 to 5, "),
        ((0, 31), "layers 0 and 31, "),
        ((0, 2, 5, 6, 7), "layers 0, 2 and 5 to 7, "),
        ((0, 2, 4, 6, 8), "layers 0 to 8 (5 of them), "),
    ],
)
def test_layers_are_said_as_stretches_and_many_gaps_as_the_ends_and_a_count(
    layers: tuple[int | None, ...], words: str
) -> None:
    (group,) = grouped(in_layers(*layers))
    assert group.where == f"{words}residual add after mlp"
