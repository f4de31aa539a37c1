"""Which controls a failing token is given, and of which token what they say is."""

import math
import re
from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.controls import candidates
from qwen_precision.record.explanation import Control, Explanation
from qwen_precision.record.run import Run
from qwen_precision.render.words.finding import why
from support.builders import HEALTHY, a_pass, a_plan, a_prompt, a_run, an_event

SUM = 3
FIRST, SECOND = a_prompt().rows[0].ids


def failing(position: int, controls: list[Control] | None = None, **changes: Any) -> Run:
    """The first prompt fails at one of its two tokens; a second, of other tokens, is clean."""
    large, bad = ([*HEALTHY[:SUM], size, *HEALTHY[SUM + 1 :]] for size in (70_000.0, math.inf))
    passes = [
        a_pass("fp32", large),
        a_pass("fp16", bad, [an_event(SUM, position=position)], top1=[None]),
        a_pass("fp32", HEALTHY, prompt=1),
        a_pass("fp16", HEALTHY, prompt=1),
    ]
    made = Explanation(budget=8, controls=controls or [], left_out=[], hashes={}, continuations=[])
    prompts = [a_prompt("one"), a_prompt("two", "no", ids=[7, 8], tokens=["n", "o"])]
    return a_run(passes, dtypes=["fp16"], prompts=prompts, explanation=made, **changes)


def control(what: str, position: int, clean: bool) -> Control:
    about: dict[str, Any] = {"what": what, "position": position, "clean": clean, "detail": what, "began": None}
    return Control(dtype="fp16", prompt="one", row=0, tokens=1, **about)


def cause(run: Run) -> str | None:
    return judge(run).findings[0].cause.kind


def test_the_first_token_is_not_asked_what_stands_before_it() -> None:
    asked = {each.what for each in candidates(judge(failing(0)))}
    assert "token alone" in asked and asked.isdisjoint({"before the token", "token after the first", "up to the token"})


def test_the_token_that_fills_up_is_taken_from_another_prompt_where_the_row_has_none() -> None:
    asked = {each.what: each.ids for each in candidates(judge(failing(1)))}
    assert asked["as many other tokens"] == (7, SECOND) and asked["token alone"] == (SECOND,)
    assert asked["without the token"] == (FIRST,)


def test_a_row_is_filled_up_with_exactly_as_many_tokens_as_stood_before() -> None:
    long = a_prompt("one", ids=[FIRST, 5, SECOND], tokens=["a", "b", "c"])
    run = failing(2)
    asked = {
        each.what: each.ids for each in candidates(judge(run.model_copy(update={"prompts": [long, run.prompts[1]]})))
    }
    assert asked["as many first tokens"] == (FIRST, FIRST, SECOND)
    assert asked["as many other tokens"] == (5, 5, SECOND)


def test_a_control_of_one_token_says_nothing_of_another() -> None:
    controls = [control("token alone", 1, clean=False), control("without the token", 1, clean=True)]
    assert cause(failing(1, controls)) == "trigger-token"
    assert cause(failing(0, controls)) == "out-of-range"


def test_a_token_is_no_trigger_by_other_prompts_alone_where_its_row_was_not_run_without_it() -> None:
    assert cause(failing(1, [control("token alone", 1, clean=False)])) == "out-of-range"


@pytest.mark.parametrize(
    ("few", "alone", "many", "others", "wanted"),
    [
        (True, True, False, False, "length"),
        (False, True, False, False, "out-of-range"),
        (True, False, False, False, "out-of-range"),
        (True, True, None, False, "out-of-range"),
        (True, True, False, None, "out-of-range"),
        (True, True, True, False, "trigger-prompt"),
        (True, True, False, True, "trigger-prompt"),
        (True, False, True, False, "out-of-range"),
    ],
)
def test_a_length_fails_after_as_many_tokens_whatever_they_are_and_a_pair_does_not(
    few: bool, alone: bool, many: bool | None, others: bool | None, wanted: str
) -> None:
    outcomes = {
        "token after the first": few,
        "token alone": alone,
        "as many first tokens": many,
        "as many other tokens": others,
    }
    controls = [control(what, 2, clean) for what, clean in outcomes.items() if clean is not None]
    run = failing(2, controls)
    long = a_prompt("one", ids=[1, 2, 3], tokens=["a", "b", "c"])
    assert cause(run.model_copy(update={"prompts": [long, run.prompts[1]]})) == wanted


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ({"with the template": True, "token alone": True}, "with the chat template the row is clean"),
        ({"without the template": True, "token alone": False}, "without the chat template the row is clean"),
        ({"token alone": True, "as many other tokens": True}, "the token is clean alone, and after as many others"),
    ],
)
def test_of_a_text_that_does_it_the_one_way_is_said_that_was_found(outcomes: dict[str, bool], wanted: str) -> None:
    run = failing(1, [control(what, 1, clean) for what, clean in outcomes.items()])
    said = why(judge(run).findings[0])
    assert said.startswith(f"trigger-prompt: this text does it; {wanted}")
    assert len(re.findall("template|as many", said)) == 1


def test_no_text_is_blamed_where_a_token_alone_fails_or_every_prompt() -> None:
    alone = [control("token alone", 1, clean=False), control("with the template", 1, clean=True)]
    assert cause(failing(1, alone)) == "out-of-range"
    assert cause(failing(1, alone[1:])) == "out-of-range"  # nobody tried the token alone
    for what in ("with the template", "without the template", "as many other tokens"):
        run = failing(1, [control(what, 1, clean=True), control("token alone", 1, clean=True)])
        assert cause(run) == "trigger-prompt"
        second = [each.model_copy(update={"prompt": 1}) for each in run.passes[:2]]
        assert cause(run.model_copy(update={"passes": [*run.passes[:2], *second]})) == "out-of-range"


def test_advice_names_the_whole_command_of_a_sweep_and_of_a_rescue() -> None:
    def advice(run: Run) -> str:
        return judge(run, record="r.json").findings[0].cause.advice

    start = "qprec probe Qwen/Qwen3-8B --revision 0123456789abcdef --dtype fp16"
    token = failing(1, [control("token alone", 1, clean=False), control("without the token", 1, clean=True)])
    assert advice(token).endswith(f" with: {start} --sweep first-token")
    outcomes = {"token after the first": True, "token alone": True, "as many first tokens": False}
    length = failing(
        1, [control(what, 1, clean) for what, clean in {**outcomes, "as many other tokens": False}.items()]
    )
    assert advice(length).endswith(f" with: {start} --prompt 'Hello there' --prompt no --sweep length")
    assert advice(length.model_copy(update={"redacted": True})).endswith(" with: --sweep length")
    usual = advice(failing(1).model_copy(update={"rescue": a_plan()}))
    assert usual.startswith("Rescale it exactly (qprec probe MODEL --rescue-to FOLDER), ")
