"""Several runs of a checkpoint as one: what a process would have measured that ran all prompts."""

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.record import Run, joined, unmeasured
from qwen_precision.record.explanation import Sweep, Swept
from qwen_precision.record.file import load, parse, save, to_json
from qwen_precision.record.joined import _JOINED
from qwen_precision.record.run import Choice, Site
from support.builders import HEALTHY, SITES, a_model, a_pass, a_prompt, a_run, an_event
from support.folders import readings

EXPERT = Site(layer=0, module="model.layers.0.mlp.experts.5", op="linear", call=0)


def a_part(name: str, size: float = 300.0, **changes: object) -> Run:
    column = [*HEALTHY[:2], size, *HEALTHY[3:]]
    return a_run([a_pass("fp32", column), a_pass("fp16", column, [an_event(2)])], prompts=[a_prompt(name)], **changes)


def with_expert(name: str) -> Run:
    """A run that met an expert in the middle of the others' sites."""
    sites = [*SITES[:2], EXPERT, *SITES[2:]]
    column = [*HEALTHY[:2], 7.0, *HEALTHY[2:]]
    run = a_run([a_pass("fp32", column), a_pass("fp16", column, [an_event(3)])], prompts=[a_prompt(name)], sites=sites)
    return run.model_copy(update={"wider": {"fp16": {2: "fp32"}}, "casts": {3: 2}})


def test_every_field_of_a_run_has_a_rule_for_two_of_it() -> None:
    assert list(_JOINED) == list(Run.model_fields)


def test_all_readings_of_all_parts_are_there_and_no_other() -> None:
    parts = [a_part("one"), with_expert("two"), a_part("three")]
    whole = joined(parts)
    assert readings(whole) == {key: value for part in parts for key, value in readings(part).items()}
    assert [prompt.name for prompt in whole.prompts] == ["one", "two", "three"]
    assert parse(to_json(whole), "whole") is not None  # every index fits


def test_joining_is_associative_and_a_run_alone_stays_what_it_is() -> None:
    one, two, three = a_part("one"), with_expert("two"), a_part("three")
    ways = [joined([one, two, three]), joined([joined([one, two]), three]), joined([one, joined([two, three])])]
    assert to_json(ways[0]) == to_json(ways[1]) == to_json(ways[2])
    assert joined([one]) is one


def test_a_site_that_only_one_part_met_stands_where_it_ran() -> None:
    whole = joined([a_part("one"), with_expert("two")])
    assert whole.sites == [*SITES[:2], EXPERT, *SITES[2:]]
    assert whole.wider == {"fp16": {2: "fp32"}} and whole.casts == {3: 2}
    assert whole.passes[0].abs_max[2] is None and whole.passes[2].abs_max[2] == 7.0


def test_a_prompt_that_is_there_twice_counts_once_and_another_of_its_name_is_told_apart() -> None:
    other = a_part("one").model_copy(update={"prompts": [a_prompt("one", ids=[1, 2])]})
    whole = joined([a_part("one"), a_part("one"), other])
    assert [prompt.name for prompt in whole.prompts] == ["one", "one (2)"] and len(whole.passes) == 4


def test_the_first_failure_of_all_is_judged_at_the_prompt_where_it_is_worst() -> None:
    report = judge(joined([a_part("small", 70_000.0), a_part("large", 90_000.0)]))
    assert report.findings[0].place.prompt == "large" and report.findings[0].spread.prompts == ("small", "large")


def test_what_is_said_of_each_part_is_said_once_and_prompts_left_out_are_all_named() -> None:
    left = [Choice(what="prompts left out", value=name, reason="no template") for name in ("a", "b")]
    parts = [a_part(name, choices=[*a_part("x").choices, left[n]]) for n, name in enumerate(("one", "two"))]
    assert [each.value for each in joined(parts).choices] == ["cpu", "a", "b"]


def a_sweep(ids: list[int], fails: int = 0) -> Sweep:
    worst = [Swept(ids=[i], text="", magnitude=float(i), layer=0, name="x", channel=0, fails=i < fails) for i in ids]
    told = {"kind": "first-token", "dtype": "fp16", "tried": len(ids), "total": 60, "layers": 2, "over": fails}
    return Sweep(**told, worst=worst, prompt=None, shortest_failing=None, longest_clean=None, seconds=1.5)


def test_parts_of_a_sweep_are_one_with_the_worst_of_all() -> None:
    parts = [a_part("one", sweep=a_sweep(list(range(n, n + 15)), 2 if n == 0 else 0)) for n in (0, 15, 30)]
    sweep = joined(parts).sweep
    assert sweep is not None and (sweep.tried, sweep.total, sweep.over, sweep.seconds) == (45, 60, 2, 4.5)
    assert [each.ids[0] for each in sweep.worst] == [1, 0, *range(44, 26, -1)]


def test_runs_that_cannot_be_one_are_refused() -> None:
    for runs in ([], [a_part("one"), a_run([a_pass("bf16", HEALTHY)])]):
        with pytest.raises(ValueError, match="same dtypes"):
            joined(runs)


def test_a_record_is_opened_with_some_of_its_prompts_alone(tmp_path: object) -> None:
    path = tmp_path / "run.json"  # type: ignore[operator]
    save(joined([a_part("one"), with_expert("two"), a_part("three")]), path)
    some = load(path, [2, 0])
    assert [prompt.name for prompt in some.prompts] == ["one", "three"]
    assert [(each.prompt, each.dtype) for each in some.passes] == [(0, "fp32"), (0, "fp16"), (1, "fp32"), (1, "fp16")]


def test_a_run_of_nothing_can_be_judged_and_saved() -> None:
    run = unmeasured(a_model(), {}, ["fp16"], "qprec 1")
    assert judge(run.model_copy(update={"stopped": "not seen"})).verdict == {"fp16": "incomplete"}
    assert parse(to_json(run), "run") == run
