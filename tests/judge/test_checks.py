"""Each check just below, at and just above its limit; origin and contagion told apart; the order of findings."""

import math

import pytest

from qwen_precision.judge.checks import CHECKS, judge
from qwen_precision.judge.findings import Limits, Token
from qwen_precision.record.closeup import Closeup
from qwen_precision.record.run import Pass, Reseed, Site, Weight
from support.builders import (
    HEALTHY,
    SITES,
    a_pass,
    a_prompt,
    a_run,
    an_event,
    healthy_run,
    overflowing_run,
    stopped_run,
)


def test_there_are_checks_and_each_says_what_it_does() -> None:
    assert all(check.about for check in CHECKS.values())


@pytest.mark.parametrize(("value", "kinds"), [(32751.9, []), (32752.0, []), (32752.1, ["near-overflow"])])
def test_near_overflow_begins_just_below_twice_the_magnitude(value: float, kinds: list[str]) -> None:
    values = [*HEALTHY[:4], value, HEALTHY[5]]
    report = judge(a_run([a_pass("fp32", values), a_pass("fp16", values)], dtypes=["fp16"]))
    assert [finding.kind for finding in report.findings] == kinds
    assert report.verdict == {"fp16": "risk" if kinds else "ok"}


def test_the_limit_of_near_overflow_is_a_setting() -> None:
    report = judge(healthy_run(), Limits(near_overflow=157.0))
    assert [(f.kind, f.place.layer) for f in report.findings] == [("near-overflow", 31)]


@pytest.mark.parametrize(("value", "kinds"), [(6.2e-5, []), (2.0**-14, []), (6.1e-5, ["underflow"]), (0.0, [])])
def test_a_tensor_below_the_normal_range_underflows(value: float, kinds: list[str]) -> None:
    values = [value, *HEALTHY[1:]]
    report = judge(a_run([a_pass("fp32", values), a_pass("fp16", values)], dtypes=["fp16"]))
    assert [finding.kind for finding in report.findings] == kinds


def test_the_first_overflow_is_named_and_what_follows_is_counted() -> None:
    (finding,) = judge(overflowing_run()).findings[:1]
    assert (finding.kind, finding.place.layer, finding.place.name) == ("overflow", 31, "residual add after mlp")
    assert finding.spread.propagated == 1 and finding.magnitude.inf == 12 and finding.origin
    assert finding.magnitude.reference == 74945.8 and finding.magnitude.headroom == pytest.approx(65504 / 74945.8)
    assert finding.place.token == Token(0, 9707, "Hello", 0, False)


def test_origins_are_listed_in_the_order_they_ran_not_in_the_order_of_their_sites() -> None:
    """An expert that only a later prompt uses has a higher site than operations that run after it."""
    fp16 = a_pass("fp16", [*HEALTHY[:3], math.inf, math.inf, 1.0], [an_event(3, step=9), an_event(4, step=2)])
    reference = [*HEALTHY[:3], 80000.0, 90000.0, 1.0]
    report = judge(a_run([a_pass("fp32", reference), fp16], dtypes=["fp16"]))
    assert [f.place.name for f in report.findings] == ["residual add after mlp", "down_proj output"]


def test_an_operation_with_bad_inputs_is_no_origin() -> None:
    kinds = [(f.kind, f.place.name) for f in judge(overflowing_run()).findings]
    assert ("nan", "logits") not in kinds and ("overflow", "logits") not in kinds


def test_nan_from_finite_inputs_is_a_finding_of_its_own() -> None:
    fp16 = a_pass("fp16", [*HEALTHY[:5], math.nan], [an_event(5, nan=3, inf=0, value=math.nan)])
    report = judge(a_run([a_pass("fp32", HEALTHY), fp16], dtypes=["fp16"]))
    (finding,) = report.findings
    assert finding.kind == "nan" and "accumulation" in finding.cause.sentence


def test_of_a_nan_that_no_sum_gave_nothing_is_said_to_have_left_the_range() -> None:
    fp16 = a_pass("fp16", [1.0, math.nan, *HEALTHY[2:]], [an_event(1, nan=3, inf=0, value=math.nan)])
    (finding,) = judge(a_run([a_pass("fp32", [1.0, 31.0, *HEALTHY[2:]]), fp16], dtypes=["fp16"])).findings
    assert finding.cause.sentence == "The SwiGLU product gives NaN in fp16, and 31 at most in fp32."


def test_a_dead_reference_is_told_even_if_nobody_asked_for_fp32() -> None:
    dead = a_pass("fp32", [*HEALTHY[:5], math.inf], [an_event(5)])
    report = judge(a_run([dead, a_pass("fp16", HEALTHY)], dtypes=["fp16"]))
    assert [(f.dtype, f.kind) for f in report.findings] == [("fp32", "overflow")]
    assert "even in fp32" in report.findings[0].cause.sentence


def test_a_wider_format_inside_an_operation_has_its_own_limit() -> None:
    values = [*HEALTHY[:4], 5.6e9, HEALTHY[5]]
    run = a_run([a_pass("fp32", values), a_pass("fp16", values)], dtypes=["fp16"], wider={"fp16": {4: "fp32"}})
    report = judge(run)
    assert report.findings == [] and all(row.site != 4 for row in report.headroom["fp16"])


def test_a_cast_is_judged_by_what_went_into_it() -> None:
    sites = [Site(layer=0, module="m.norm", op="mul", call=0), Site(layer=0, module="m.norm", op="cast", call=0)]
    fp16 = a_pass("fp16", [50000.0, 50000.0])
    run = a_run(
        [a_pass("fp32", [50000.0, None]), fp16], sites=sites, dtypes=["fp16"], wider={"fp16": {0: "fp32"}}, casts={1: 0}
    )
    (finding,) = judge(run).findings
    assert finding.place.op == "cast" and finding.magnitude.headroom == pytest.approx(65504 / 50000)


def test_a_place_beyond_the_range_after_a_clamped_reseeding_is_an_overflow_by_itself() -> None:
    values = [*HEALTHY[:4], 70000.0, HEALTHY[5]]
    seeds = [Reseed(layer=31, rows=[0], clamped=True)]
    fp16 = a_pass("fp16", [*HEALTHY[:4], 65504.0, HEALTHY[5]], reseeded=seeds)
    fp32 = a_pass("fp32", values, [an_event(4, inf=0, value=70000.0)])
    (finding,) = judge(a_run([fp32, fp16], dtypes=["fp16"])).findings
    assert finding.kind == "overflow" and finding.predicted and "did not get here" in finding.cause.sentence


def test_what_only_carries_a_number_on_behind_a_clamp_is_no_finding() -> None:
    seeds = [Reseed(layer=31, rows=[0], clamped=True)]
    fp16 = a_pass("fp16", [*HEALTHY[:4], 65504.0, HEALTHY[5]], reseeded=seeds)
    fp32 = a_pass("fp32", [*HEALTHY[:4], 70000.0, HEALTHY[5]], [an_event(4, inf=0, value=70000.0, clean_inputs=False)])
    assert judge(a_run([fp32, fp16], dtypes=["fp16"])).findings == []


def test_what_began_behind_a_clamp_is_no_evidence() -> None:
    seeds = [Reseed(layer=31, rows=[0], clamped=True)]
    fp16 = a_pass("fp16", [*HEALTHY[:4], float("inf"), HEALTHY[5]], [an_event(4)], reseeded=seeds)
    assert judge(a_run([a_pass("fp32", HEALTHY), fp16], dtypes=["fp16"])).findings == []


@pytest.mark.parametrize(("exact", "cause"), [(65_530.0, "rounding"), (6.55e4, "accumulation"), (None, "accumulation")])
def test_rounded_operands_and_partial_sums_are_told_apart_by_exact_arithmetic(exact: float | None, cause: str) -> None:
    look = Closeup(operands=[], source=None, exact=exact, contributions=[])
    fp16 = a_pass("fp16", [*HEALTHY[:3], float("inf"), *HEALTHY[4:]], [an_event(3, closeup=look)])
    fp32 = a_pass("fp32", [*HEALTHY[:3], 65_500.0, *HEALTHY[4:]])
    (finding,) = [each for each in judge(a_run([fp32, fp16], dtypes=["fp16"])).findings if each.severity == "error"]
    assert finding.cause.kind == cause


def test_a_dtype_that_survives_just_beyond_its_range_is_only_near_it() -> None:
    values = [*HEALTHY[:4], 65510.0, HEALTHY[5]]
    fp16 = a_pass("fp16", [*HEALTHY[:4], 65504.0, HEALTHY[5]])
    (finding,) = judge(a_run([a_pass("fp32", values), fp16], dtypes=["fp16"])).findings
    assert finding.kind == "near-overflow"


def weight(**changes: object) -> Weight:
    return Weight(
        **{
            "name": "model.layers.31.self_attn.q_norm.weight",
            "file": "model-00007.safetensors",
            "elements": 128,
            "parameter": "model.layers.31.self_attn.q_norm.weight",
            "inexact": {},
            "nan": 0,
            "inf": 0,
            "abs_max": 70000.0,
            "overflow": {},
            "underflow": {},
            **changes,
        }
    )


def test_a_weight_beyond_the_range_is_named_with_its_file() -> None:
    report = judge(healthy_run(weights=[weight(overflow={"fp16": 2})]))
    (finding,) = report.findings
    assert (finding.kind, finding.dtype, finding.place.layer, finding.magnitude.inf) == (
        "weight-overflow",
        "fp16",
        31,
        2,
    )
    assert "model-00007.safetensors" in finding.cause.sentence and finding.place.name == "q_norm weight"
    assert report.verdict == {"fp32": "ok", "fp16": "fail", "bf16": "ok"}


@pytest.mark.parametrize(("count", "kinds"), [(1, []), (2, ["underflow"])])
def test_weights_that_vanish_count_from_a_share_on(count: int, kinds: list[str]) -> None:
    report = judge(healthy_run(weights=[weight(underflow={"fp16": count})]))
    assert [finding.kind for finding in report.findings] == kinds


@pytest.mark.parametrize(
    ("run", "codes"), [(healthy_run, (0, 0, 0)), (overflowing_run, (1, 1, 0)), (stopped_run, (3, 3, 3))]
)
def test_exit_codes_are_a_property_of_the_data(run, codes: tuple[int, int, int]) -> None:
    report = judge(run())
    assert tuple(report.exit_code(level) for level in ("fail", "risk", "never")) == codes


def test_a_stopped_run_is_never_called_ok() -> None:
    assert judge(stopped_run()).verdict == {"fp16": "incomplete"}


def test_one_site_is_one_finding_that_names_all_prompts_it_fails_on() -> None:
    from support.builders import a_prompt

    passes = []
    for number, size in enumerate((70000.0, 90000.0)):
        passes.append(a_pass("fp32", [*HEALTHY[:4], size, 1.0], prompt=number))
        passes.append(a_pass("fp16", [*HEALTHY[:4], math.inf, 1.0], [an_event(4)], prompt=number))
    run = a_run(passes, dtypes=["fp16"], prompts=[a_prompt("one"), a_prompt("two")])
    (finding,) = judge(run).findings
    assert (
        finding.place.prompt == "two"
        and finding.spread.prompts == ("one", "two")
        and finding.magnitude.reference == 90000.0
    )


@pytest.mark.parametrize("seen", [True, False], ids=["failed", "foreseen"])
def test_a_module_that_a_forward_runs_twice_is_one_place(seen: bool) -> None:
    sites = [*SITES[:3], *(Site(layer=31, module="m.layers.31.mlp.down_proj", op="linear", call=n) for n in (0, 1))]
    seeds = [] if seen else [Reseed(layer=31, rows=[0], clamped=True)]
    bad = [an_event(n) for n in (3, 4)] if seen else []
    fp16 = a_pass("fp16", [*HEALTHY[:3], math.inf, math.inf], bad, reseeded=seeds)
    large = [an_event(n, inf=0, value=size) for n, size in ((3, 70_000.0), (4, 90_000.0))]
    run = a_run([a_pass("fp32", [*HEALTHY[:3], 70_000.0, 90_000.0], large), fp16], sites=sites, dtypes=["fp16"])
    (finding,) = judge(run).findings
    assert (finding.place.site, finding.magnitude.reference, finding.predicted) == (4, 90_000.0, not seen)


def test_headroom_is_listed_smallest_first() -> None:
    rows = judge(healthy_run()).headroom["fp16"]
    assert [row.headroom for row in rows] == sorted(row.headroom for row in rows)
    assert rows[0].headroom == pytest.approx(65504 / 420) and len(rows) == len(SITES)


def test_judging_asks_each_pass_a_few_times_however_many_prompts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    failed = Pass.failed.fget
    assert failed is not None
    monkeypatch.setattr(Pass, "failed", property(lambda self: asked.append(self.prompt) or failed(self)))

    def of(prompts: int) -> int:
        asked.clear()
        bad = [*HEALTHY[:4], math.inf, 1.0]
        passes = [
            a_pass(dtype, values, events, prompt=number)
            for number in range(prompts)
            for dtype, values, events in (("fp32", [*HEALTHY[:4], 8e4, 1.0], []), ("fp16", bad, [an_event(4)]))
        ]
        names = [a_prompt(f"prompt {number}") for number in range(prompts)]
        assert judge(a_run(passes, dtypes=["fp16"], prompts=names)).findings
        return len(asked)

    assert of(200) == 10 * of(20) > 0
