"""One finding for every place that would have to change: what is a place, what is foreseen, and what does no harm."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.corpus import standing_for
from qwen_precision.judge.findings import Finding
from qwen_precision.record.closeup import Closeup
from qwen_precision.record.explanation import Control, Explanation
from qwen_precision.record.run import Event, Pass, Prompt, Reseed, Run, Site
from support.builders import HEALTHY, SITES, a_pass, a_prompt, a_run, an_event

PRODUCT, SUM, LAST = 1, 3, 4
"""Sites: the SwiGLU product of layer 0, down_proj of layer 31, and the residual add behind that."""
DEAD = Reseed(layer=31, rows=[0], clamped=False)
"""The dtype's own stream did not come to layer 31."""


def beyond(site: int, value: float = 70_000.0, **changes: Any) -> Event:
    """In the reference: what the narrowest dtype would not hold."""
    return an_event(site, inf=0, value=value, **changes)


def reached(site: int, value: float) -> list[float | None]:
    return [*HEALTHY[:site], value, *HEALTHY[site + 1 :]]


def run_of(*pairs: tuple[Pass, Pass], **changes: Any) -> Run:
    """A run in fp16 of the reference and the dtype, prompt by prompt."""
    passes = [each.model_copy(update={"prompt": number}) for number, pair in enumerate(pairs) for each in pair]
    prompts = [a_prompt(name) for name in ("one", "two", "three")[: len(pairs)]]
    return a_run(passes, **{"dtypes": ["fp16"], "prompts": prompts, **changes})


def batch(name: str = "one") -> Prompt:
    row = a_prompt().rows[0]
    return Prompt(name=name, rows=[row, row.model_copy(update={"padding": 1})], failed=None)


def failed(site: int, *more: Event, value: float = 70_000.0, **changes: Any) -> tuple[Pass, Pass]:
    """A prompt on which the dtype overflows at a site."""
    events = [an_event(site, **changes), *more]
    return a_pass("fp32", reached(site, value)), a_pass("fp16", reached(site, math.inf), events, top1=[None])


def hidden(site: int, value: float = 70_000.0, **changes: Any) -> tuple[Pass, Pass]:
    """A prompt on which it would, but its stream had failed before."""
    fp32 = a_pass("fp32", reached(site, value), [beyond(site, value, **changes)])
    return fp32, a_pass("fp16", HEALTHY, reseeded=[DEAD], top1=[None])


def errors(run: Run) -> list[Finding]:
    return [each for each in judge(run).findings if each.severity == "error"]


def spread(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    return [each.spread.prompts for each in findings]


# -- what is one place ---------------------------------------------------------------------------------------------


def test_two_experts_of_one_operation_are_two_places() -> None:
    run = run_of(failed(SUM, an_event(SUM, expert=3), expert=5))
    assert [each.place.expert for each in errors(run)] == [3, 5]


def test_an_expert_is_not_hidden_behind_another_of_its_operation() -> None:
    found = errors(run_of(failed(SUM, expert=5), hidden(SUM, expert=3)))
    assert [(each.place.expert, each.predicted) for each in found] == [(5, False), (3, True)]
    assert spread(found) == [("one",), ("two",)]


def test_a_real_token_and_padding_at_one_operation_are_one_place_until_a_control_tells_them_apart() -> None:
    pairs = failed(SUM), failed(SUM, in_padding=True)
    assert spread(errors(run_of(*pairs))) == [("one", "two")]
    found = errors(run_of(*pairs, hidden(SUM), explanation=alone_is_clean("two")))
    assert {each.cause.kind: each.spread.prompts for each in found} == {
        "out-of-range": ("one", "three"),
        "masked-rows": ("two",),
    }


def alone_is_clean(prompt: str) -> Explanation:
    control = Control(
        what="row alone",
        dtype="fp16",
        prompt=prompt,
        row=0,
        tokens=2,
        position=None,
        clean=True,
        detail="alone",
        began=None,
    )
    return Explanation(budget=8, controls=[control], left_out=[], hashes={}, continuations=[])


def test_what_passes_an_infinity_on_counts_with_the_origin_before_it() -> None:
    more = [an_event(2, clean_inputs=False), an_event(SUM), an_event(LAST, clean_inputs=False)]
    found = errors(run_of(failed(PRODUCT, *more, an_event(5, clean_inputs=False))))
    assert [(each.place.site, each.spread.propagated) for each in found] == [(PRODUCT, 1), (SUM, 2)]


def test_of_prompts_that_fail_at_one_place_one_that_takes_harm_speaks_for_all() -> None:
    (finding,) = errors(run_of(failed(SUM), failed(SUM, value=90_000.0, harmless=True)))
    assert finding.place.prompt == "one"


def test_two_operations_of_one_kind_in_a_module_are_two_places() -> None:
    sums = [Site(layer=31, module="model.layers.31", op="add", call=number) for number in (0, 1)]
    sites = [*SITES[:3], *sums, SITES[5]]
    found = errors(run_of(failed(SUM, an_event(LAST)), sites=sites))
    assert [each.place.name for each in found] == ["residual add after attention", "residual add after mlp"]


# -- what is foreseen ----------------------------------------------------------------------------------------------


def test_the_largest_of_several_prompts_is_named_where_a_place_is_foreseen() -> None:
    for sizes in ((70_000.0, 90_000.0), (90_000.0, 70_000.0)):
        (finding,) = errors(run_of(*(hidden(LAST, size) for size in sizes)))
        assert (finding.predicted, finding.magnitude.reference) == (True, 90_000.0)
        assert finding.spread.prompts == ("one", "two")


def test_prompts_of_several_records_stand_for_all_where_one_begins_and_a_larger_one_is_foreseen() -> None:
    every = failed(SUM, value=70_000.0), hidden(SUM, 90_000.0), failed(SUM, value=75_000.0), hidden(SUM, 80_000.0)
    best: dict[str, tuple[float, int]] = {}
    for number, pair in enumerate(every):
        for each in standing_for(judge(run_of(pair))):
            best[each.key] = min(best.get(each.key, (math.inf, 0)), (each.score, number))
    standing = {number for _, number in best.values()}
    assert standing < {0, 1, 2, 3}
    of_all, of_these = (judge(run_of(*pairs)).findings for pairs in (every[:3], [every[n] for n in sorted(standing)]))
    assert of_all[0].magnitude == of_these[0].magnitude and of_all[0].magnitude.reference == 75_000.0


def test_a_foreseen_real_token_speaks_before_larger_padding() -> None:
    sites = [*SITES[:5], Site(layer=32, module="m.layers.32.self_attn", op="softmax", call=0)]
    for order in (1, -1):
        pairs = (hidden(LAST), hidden(LAST, 90_000.0, in_padding=True))[::order]
        (finding,) = errors(run_of(*pairs, sites=sites))
        assert finding.magnitude.reference == 70_000.0


@pytest.mark.parametrize(("op", "count"), [("softmax", 1), ("linear", 0)])
def test_foreseen_padding_counts_where_another_token_reads_it(op: str, count: int) -> None:
    sites = [*SITES[:5], Site(layer=32, module="m.layers.32.self_attn", op=op, call=0)]
    assert len(errors(run_of(hidden(LAST, in_padding=True), sites=sites))) == count


def test_padding_that_is_read_by_nothing_behind_it_is_not_foreseen() -> None:
    sites = [Site(layer=0, module="m.layers.0.self_attn", op="softmax", call=0), *SITES[1:]]
    assert errors(run_of(hidden(LAST, in_padding=True), sites=sites)) == []


def test_a_place_that_the_dtype_came_through_alive_is_not_foreseen() -> None:
    """Rounded operands gave less than the reference; later another operation failed."""
    large = [beyond(PRODUCT), beyond(SUM)]
    values = [*HEALTHY[:1], 70_000.0, 300.0, 70_000.0, *HEALTHY[4:]]
    fp16 = a_pass("fp16", [1.5, 65_504.0, 300.0, 410.0, 420.0, 31.0], reseeded=[DEAD], top1=[None])
    run = run_of((a_pass("fp32", values, large), fp16))
    assert [each.place.site for each in errors(run)] == [SUM]
    assert [each.place.site for each in judge(run).findings if each.kind == "near-overflow"] == [PRODUCT]


def test_a_prompt_that_came_through_alive_is_not_named_with_those_that_fail() -> None:
    alive = a_pass("fp32", reached(SUM, 65_530.0), [beyond(SUM, 65_530.0)]), a_pass("fp16", reached(SUM, 65_504.0))
    assert spread(errors(run_of(failed(SUM), alive))) == [("one",)]


def test_what_a_bad_weight_or_a_dead_reference_makes_is_not_foreseen() -> None:
    assert errors(run_of(hidden(LAST, clean_weights=False))) == []
    dead = a_pass("fp32", reached(LAST, math.inf), [an_event(LAST)]), a_pass("fp16", HEALTHY, reseeded=[DEAD])
    assert [each.dtype for each in errors(run_of(dead))] == ["fp32"]


def test_a_wider_dtype_is_not_judged_by_what_the_narrowest_cannot_hold() -> None:
    fp32, fp16 = hidden(LAST)
    both = [fp32, fp16, a_pass("bf16", HEALTHY, reseeded=[DEAD])]
    assert [each.dtype for each in errors(a_run(both, dtypes=["fp16", "bf16"]))] == ["fp16"]
    began = [a_pass("fp32", HEALTHY, prompt=1), a_pass("bf16", reached(LAST, math.inf), [an_event(LAST)], prompt=1)]
    run = a_run([*both, *began], dtypes=["fp16", "bf16"], prompts=[a_prompt("one"), a_prompt("two")])
    assert {each.dtype: each.spread.prompts for each in errors(run)} == {"fp16": ("one",), "bf16": ("two",)}


def test_what_a_dtype_was_stopped_before_is_not_foreseen() -> None:
    fp32, fp16 = hidden(LAST)
    cut = fp16.model_copy(update={"abs_max": [*HEALTHY[:4], None, None]})
    assert errors(run_of((fp32, cut), stopped="interrupted")) == []


def test_what_began_before_a_clamp_is_evidence() -> None:
    fp32, fp16 = failed(PRODUCT)
    seeded = fp16.model_copy(update={"reseeded": [Reseed(layer=31, rows=[0], clamped=True)]})
    assert [each.place.site for each in errors(run_of((fp32, seeded)))] == [PRODUCT]


@pytest.mark.parametrize("rows", [[0], [1]])
def test_a_clamped_row_is_no_evidence_and_the_other_row_still_is(rows: list[int]) -> None:
    fp32, fp16 = failed(LAST, row=1, position=1)
    seeded = fp16.model_copy(update={"reseeded": [Reseed(layer=31, rows=rows, clamped=True)]})
    assert len(errors(run_of((fp32, seeded), prompts=[batch()]))) == (rows == [0])


# -- near the limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [65_510.0, 65_530.0])
def test_a_dtype_that_survives_beyond_its_range_is_near_it(value: float) -> None:
    pair = a_pass("fp32", reached(LAST, value)), a_pass("fp16", reached(LAST, 65_504.0))
    assert [each.kind for each in judge(run_of(pair)).findings] == ["near-overflow"]


@pytest.mark.parametrize("value", [60_000.0, 65_510.0])
def test_behind_a_failure_what_is_in_range_and_near_its_end_is_a_risk(value: float) -> None:
    """What rounds to the largest finite number is in range."""
    pair = a_pass("fp32", reached(LAST, value)), a_pass("fp16", HEALTHY, reseeded=[DEAD])
    assert [(each.kind, each.severity) for each in judge(run_of(pair)).findings] == [("near-overflow", "warning")]


# -- no harm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("harmless", "dtypes"), [(True, []), (False, ["fp32", "fp16"])])
def test_an_infinity_that_the_model_means_is_none_of_the_dtype(harmless: bool, dtypes: list[str]) -> None:
    infinite = [an_event(LAST, harmless=harmless)]
    pair = a_pass("fp32", reached(LAST, math.inf), infinite), a_pass("fp16", reached(LAST, math.inf), [an_event(LAST)])
    assert sorted(each.dtype for each in judge(run_of(pair)).findings) == sorted(dtypes)


def test_an_infinity_that_the_model_means_elsewhere_excuses_nothing() -> None:
    fp32, fp16 = failed(SUM)
    meant = fp32.model_copy(update={"events": [an_event(PRODUCT, harmless=True)]})
    assert [each.place.site for each in errors(run_of((meant, fp16)))] == [SUM]


NEAR = an_event(PRODUCT, inf=0, value=60_000.0)
AT_A_TOKEN = an_event(5, clean_inputs=False)


@pytest.mark.parametrize(
    ("event", "more", "changes", "severity"),
    [
        ({"in_padding": True}, [], {}, "warning"),
        ({"in_padding": True}, [NEAR], {}, "warning"),
        ({"in_padding": False}, [], {}, "error"),
        ({"in_padding": True}, [AT_A_TOKEN], {}, "error"),
        ({"in_padding": True}, [], {"top1": [None]}, "error"),
    ],
    ids=["padding", "a token near it", "a token", "a token behind it", "no answer"],
)
def test_padding_that_overflows_is_harmless_only_where_every_real_token_is_finite(
    event: dict[str, Any], more: list[Event], changes: dict[str, Any], severity: str
) -> None:
    fp16 = a_pass("fp16", reached(SUM, math.inf), [an_event(SUM, **event), *more], **changes)
    found = judge(run_of((a_pass("fp32", reached(SUM, 70_000.0)), fp16))).findings
    first = next(each for each in found if each.kind == "overflow")
    assert first.severity == severity and (first.cause.kind == "harmless-overflow") == (severity == "warning")


@pytest.mark.parametrize(
    ("event", "failed"),
    [
        ({}, True),
        ({"harmless": True}, False),
        ({"harmless": False}, True),
        ({"clean_inputs": False}, False),
        ({"clean_inputs": False, "clean_weights": False}, True),
        ({"inf": 0, "value": 60_000.0}, False),
    ],
    ids=["an origin", "harmless", "harmful", "passed on", "a bad weight", "finite"],
)
def test_a_pass_fails_by_origins_that_do_harm_and_by_bad_weights(event: dict[str, Any], failed: bool) -> None:
    assert a_pass("fp16", HEALTHY, [an_event(SUM, **event)]).failed == failed


# -- how far the reference goes ------------------------------------------------------------------------------------


def exactly(value: float) -> Closeup:
    return Closeup(operands=[], source=None, exact=value, contributions=[])


@pytest.mark.parametrize(
    ("reached_by", "exact", "cause"),
    [
        (65_510.0, 65_519.0, "accumulation"),
        (65_510.0, 65_520.0, "rounding"),
        (65_519.0, None, "accumulation"),
        (65_520.0, 65_530.0, "out-of-range"),
    ],
)
def test_the_edge_is_where_rounding_reaches_infinity(reached_by: float, exact: float | None, cause: str) -> None:
    look = None if exact is None else exactly(exact)
    (finding,) = errors(run_of(failed(SUM, value=reached_by, closeup=look)))
    assert finding.cause.kind == cause


def test_a_row_is_judged_by_its_own_magnitude_not_by_that_of_a_larger_one() -> None:
    large = [beyond(SUM, 90_000.0), beyond(SUM, 70_000.0, row=1, position=1)]
    fp16 = a_pass("fp16", reached(SUM, math.inf), [an_event(SUM, row=1, position=1)], reseeded=[DEAD], top1=[None])
    (finding,) = errors(run_of((a_pass("fp32", reached(SUM, 90_000.0), large), fp16), prompts=[batch()]))
    assert finding.magnitude.reference == 70_000.0


@pytest.mark.parametrize(("exact", "cause"), [(65_530.0, "rounding"), (60_000.0, "accumulation")])
def test_a_row_that_only_rounding_takes_out_is_not_judged_by_another_beyond_the_range(exact: float, cause: str) -> None:
    look = exactly(exact)
    fp16 = a_pass("fp16", reached(SUM, math.inf), [an_event(SUM, row=1, position=1, closeup=look)], top1=[5, None])
    fp32 = a_pass("fp32", reached(SUM, 65_530.0), [beyond(SUM, 65_530.0)])
    (finding,) = errors(run_of((fp32, fp16), prompts=[batch()]))
    assert (finding.cause.kind, finding.magnitude.reference) == (cause, None)


def test_an_element_is_not_judged_by_another_one_of_its_row() -> None:
    fp32 = a_pass("fp32", reached(SUM, 70_000.0), [beyond(SUM, position=1)])
    (finding,) = errors(run_of((fp32, failed(SUM)[1])))
    assert (finding.magnitude.reference, finding.cause.kind) == (None, "not-told")


def test_an_expert_that_only_rounding_takes_out_is_not_judged_by_another_beyond_the_range() -> None:
    fp32 = a_pass("fp32", reached(SUM, 70_000.0), [beyond(SUM, expert=3)])
    alive = failed(SUM, expert=5, closeup=exactly(65_530.0))[1]
    finding = errors(run_of((fp32, alive)))[0]
    assert (finding.place.expert, finding.cause.kind, finding.magnitude.reference) == (5, "rounding", None)


@pytest.mark.parametrize(
    ("more", "changes", "cause"),
    [
        ([], {"kl": [0.5]}, "silent-absorption"),
        ([an_event(LAST, inf=0, value=60_000.0)], {"kl": [0.5]}, "silent-absorption"),
        ([an_event(LAST, clean_inputs=False)], {"kl": [0.5]}, "out-of-range"),
        ([], {"top1": [None]}, "out-of-range"),
    ],
    ids=["wrong", "wrong, and near elsewhere", "seen in the stream", "no answer"],
)
def test_only_what_never_shows_in_the_stream_or_the_logits_is_absorbed(
    more: list[Event], changes: dict[str, Any], cause: str
) -> None:
    fp16 = a_pass("fp16", reached(SUM, math.inf), [an_event(SUM), *more], **changes)
    (finding,) = errors(run_of((a_pass("fp32", reached(SUM, 70_000.0)), fp16)))
    assert finding.cause.kind == cause
