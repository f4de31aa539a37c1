"""Whether a single forward shows what a step of a generation failed on, and whose controls tell of it."""

import math
from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding
from qwen_precision.record.explanation import Control, Explanation
from qwen_precision.record.run import Event, FailedStep, Prompt, Run
from support.builders import HEALTHY, a_pass, a_prompt, a_run, an_event

SUM = 3


def probed(events: list[Event], top1: list[int | None], made: Explanation | None = None) -> Run:
    """Row 0 of a batch of two failed at the first step of a generation in fp16; a probe of the same ids."""
    row = a_prompt().rows[0]
    failed = FailedStep(dtype="fp16", step=1, rows=[0], chunk=0)
    prompt = Prompt(name="step", rows=[row, row], failed=failed)
    value = math.inf if events else HEALTHY[SUM]
    fp16 = a_pass("fp16", [*HEALTHY[:SUM], value, *HEALTHY[SUM + 1 :]], events, top1=top1)
    fp32 = a_pass("fp32", HEALTHY, top1=[5, 5])
    return a_run([fp32, fp16], dtypes=["fp16"], prompts=[prompt], explanation=made)


def unseen(run: Run) -> list[Finding]:
    return [each for each in judge(run).findings if each.kind == "unseen-failure"]


@pytest.mark.parametrize(
    ("event", "top1", "count"),
    [
        (None, 5, 1),
        (None, None, 0),
        ({}, 5, 0),
        ({"harmless": True}, 5, 1),
        ({"in_padding": True}, 5, 1),
        ({"row": 1}, 5, 1),
    ],
    ids=["finite", "no answer", "an origin", "a harmless one", "in padding", "in another row"],
)
def test_a_failing_step_is_unseen_where_its_row_takes_no_harm_in_a_single_forward(
    event: dict[str, Any] | None, top1: int | None, count: int
) -> None:
    events = [] if event is None else [an_event(SUM, **event)]
    assert len(unseen(probed(events, [top1, 5]))) == count


@pytest.mark.parametrize(("row", "severity"), [(0, "error"), (1, "warning")])
def test_a_step_that_was_made_again_tells_of_its_own_row_alone(row: int, severity: str) -> None:
    about: dict[str, Any] = {"dtype": "fp16", "prompt": "step", "tokens": 2, "position": None, "began": None}
    again = Control(what="as generated", row=row, clean=False, detail="step 1", **about)
    made = Explanation(budget=8, controls=[again], left_out=[], hashes={}, continuations=[])
    assert [each.severity for each in unseen(probed([], [5, 5], made))] == [severity]
