"""Advice on float32 logits: given from a limit on, with its number, and never a reason to fail."""

from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding, Limits
from qwen_precision.judge.logitcost import cost
from qwen_precision.judge.logits import bought, together
from qwen_precision.record.run import Run
from support.builders import (
    HEALTHY,
    a_continuation,
    a_cost,
    a_generation,
    a_model,
    a_pass,
    a_run,
    advised_run,
    an_upcast,
    exclamation_run,
    generated,
    healthy_run,
    healthy_text_run,
    overflowing_run,
)

LIMITS = Limits()


def advised(run: Run) -> list[Finding]:
    return [each for each in judge(run).findings if each.kind == "advice"]


def names(run: Run) -> list[str]:
    return [each.place.name.removeprefix("logits, ") for each in advised(run)]


def with_softmax(**changes: Any) -> Run:
    return a_run([a_pass("fp32", HEALTHY), a_pass("bf16", HEALTHY, upcast=[an_upcast(**changes)])])


@pytest.mark.parametrize("run", [healthy_run, healthy_text_run])
def test_of_a_healthy_run_nothing_is_advised(run: Any) -> None:
    assert not advised(run()) and bought(run()) and cost(run())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"loss": 4.0, "loss_in_dtype": 4.0 + LIMITS.loss}, "loss"),
        ({"bad": 1, "loss_in_dtype": float("inf")}, "loss"),
        ({"mass_lost": LIMITS.mass}, "next token"),
        ({"mass_lost": -LIMITS.mass}, "next token"),
        ({"changed": 2}, "next token"),
    ],
    ids=repr,
)
def test_a_softmax_that_is_off_is_advised_on_from_its_limit_on(changes: dict[str, Any], name: str) -> None:
    above = {key: value * 1.001 if isinstance(value, float) else value for key, value in changes.items()}
    assert names(with_softmax(**above)) == [name]
    below = {key: value * 0.999 if isinstance(value, float) else 0 for key, value in changes.items()}
    assert names(with_softmax(**{**below, "loss_in_dtype": below.get("loss", 2.3451)})) == []


def test_writing_down_a_loss_in_bf16_is_no_reason_to_train_in_another_way() -> None:
    """From 8 nats on its numbers are 0.0625 apart, so half of that is nobody's fault: an untrained Qwen3 has 11.93."""
    assert names(with_softmax(loss=11.906, loss_in_dtype=11.875)) == []
    assert names(with_softmax(loss=11.907, loss_in_dtype=11.875)) == ["loss"]


def test_a_loss_that_is_far_off_in_nats_is_told_of_however_coarse_the_dtype_is_there() -> None:
    """At 303 nats half a step of bf16 is a whole nat: a curve of training says nothing then."""
    assert names(with_softmax(loss=303.0, loss_in_dtype=303.84)) == ["loss"]
    assert names(with_softmax(loss=303.0, loss_in_dtype=303.0 + LIMITS.loss_most * 1.01)) == ["loss"]
    assert names(with_softmax(loss=303.0, loss_in_dtype=303.0 + LIMITS.loss_most * 0.99)) == []
    (told,) = advised(with_softmax(loss=303.0, loss_in_dtype=303.84))
    assert f"(limit {LIMITS.loss_most:g})" in " ".join(told.cause.facts)


def test_a_rare_token_whose_probability_is_zero_is_a_number_and_no_advice() -> None:
    """A log-softmax never takes the logarithm of it; a loss is as good as before."""
    assert names(with_softmax(zero=100)) == []


@pytest.mark.parametrize(
    ("changed", "rows", "advised_on"), [(1, 2, False), (2, 39, True), (2, 40, False), (3, 40, True)]
)
def test_next_tokens_that_change_are_told_of_from_one_in_twenty_on(changed: int, rows: int, advised_on: bool) -> None:
    """One alone is a tie that was broken the other way."""
    assert bool(names(with_softmax(changed=changed, rows=rows))) == advised_on


@pytest.mark.parametrize(("positions", "names_"), [(1_766, []), (1_767, ["long prompt"])])
def test_a_prompt_is_long_from_a_gibibyte_of_logits_on(positions: int, names_: list[str]) -> None:
    """1,767 tokens of Qwen3's vocabulary are more than that in float32."""
    run = healthy_run(logits=a_cost(bytes=607744, whole_prompt_bytes=607744 * positions))
    assert names(run) == names_


def text_of_a_long_prompt(**changes: Any) -> Run:
    """8,192 tokens of Qwen3's vocabulary: 4.98 GB in float32, half of that in fp16."""
    row = a_continuation([1, 2], ["a", "b"])
    taken = a_cost(bytes=607744, whole_prompt_bytes=607744 * 8192, **changes)
    return generated(a_generation([row], logits=taken), ["fp16"])


@pytest.mark.parametrize("held", [303872, None], ids=["the last position", "not known"])
def test_a_text_that_held_the_last_position_alone_is_not_told_to_ask_for_it(held: int | None) -> None:
    assert names(text_of_a_long_prompt(held=held, chunks=4)) == []


@pytest.mark.parametrize(("chunks", "part"), [(1, "prompt"), (3, "chunk")])
def test_a_text_that_held_a_gibibyte_is_told_what_would_have_held_less(chunks: int, part: str) -> None:
    """A model whose forward has no logits_to_keep gives the logits of all that it was given."""
    (told,) = advised(text_of_a_long_prompt(held=1 << 30, chunks=chunks))
    assert told.place.name == "logits, prefill" and f"1.07 GB of logits were held at once, those of a whole {part}" in (
        told.cause.sentence
    )
    assert f"half the {part} at once holds half of that, 537 MB less" in told.cause.advice
    assert "logits_to_keep=1" not in told.cause.advice
    assert names(text_of_a_long_prompt(held=(1 << 30) - 1, chunks=chunks)) == []


def test_of_a_batch_so_large_that_its_last_positions_take_a_gibibyte_nothing_can_be_saved() -> None:
    row = a_continuation([1], ["a"])
    taken = a_cost(bytes=607744 * 4096, whole_prompt_bytes=607744 * 4096 * 2, held=607744 * 2048)
    assert names(generated(a_generation([row], logits=taken), ["fp16"])) == []


def test_in_fp32_alone_the_bytes_of_a_long_prompt_are_told_once() -> None:
    taken = a_cost(bytes=607744, whole_prompt_bytes=607744 * 8192)
    (told,) = advised(a_run([a_pass("fp32", HEALTHY)], logits=taken))
    assert "4.98 GB in float32; those of" in told.cause.sentence and "fp32" not in told.cause.sentence


def test_each_advice_has_its_number_and_what_to_do() -> None:
    loss, token, long = (
        next(each for each in advised(advised_run()) if each.place.name == f"logits, {name}" and each.dtype == dtype)
        for name, dtype in (("loss", "bf16"), ("next token", "bf16"), ("long prompt", "fp16"))
    )
    assert "0.062 nats" in loss.cause.sentence and "11.875 in place of 11.937" in loss.cause.sentence
    assert "cut-cross-entropy" in loss.cause.advice and "4.98 GB" in loss.cause.advice
    assert "2 of 8 next tokens looked at change" in token.cause.sentence and "608 kB" in token.cause.advice
    assert "negligible" in token.cause.advice
    assert "4.98 GB" in long.cause.sentence and "logits_to_keep=1" in long.cause.advice
    assert "77.8 GB" in " ".join(long.cause.facts)


@pytest.mark.parametrize("run", [advised_run, overflowing_run])
def test_advice_changes_no_verdict_and_no_exit_code(run: Any) -> None:
    report, quiet = judge(run()), judge(run().model_copy(update={"logits": None, "passes": _unmeasured(run())}))
    assert report.verdict == quiet.verdict
    assert [report.exit_code(each) for each in ("fail", "risk", "never")] == [
        quiet.exit_code(each) for each in ("fail", "risk", "never")
    ]
    assert not [each for each in quiet.findings if each.kind == "advice"]


def _unmeasured(run: Run) -> list[Any]:
    return [each.model_copy(update={"upcast": []}) for each in run.passes]


def test_advice_stands_below_failures_and_risks() -> None:
    failing = overflowing_run()
    passes = [
        each if each.dtype == "fp32" else each.model_copy(update={"upcast": [an_upcast(bad=1)]})
        for each in failing.passes
    ]
    kinds = [each.kind for each in judge(failing.model_copy(update={"passes": passes})).findings]
    assert kinds[-2:] == ["advice", "advice"] and kinds[0] == "overflow"


def test_the_row_that_loses_most_is_told_and_counts_are_added_over_all() -> None:
    rows = [an_upcast(tokens=3, logprob_rms=0.1), None, an_upcast(tokens=1, logprob_rms=0.3, loss=5.0, ranks=2)]
    found = bought(a_run([a_pass("fp16", HEALTHY, upcast=rows), a_pass("fp16", HEALTHY, prompt=0, upcast=rows[:1])]))
    each = found["fp16"]
    assert each.left_out == 1
    assert (each.tokens, each.rows, each.ranks, each.loss) == (7, 6, 2, 5.0)
    assert each.logprob_rms == pytest.approx(((6 * 0.01 + 0.09) / 7) ** 0.5)


def test_a_text_is_told_of_by_the_dtype_of_each_step() -> None:
    from qwen_precision.record.generation import Stretch

    row = a_continuation(
        [1, 2, 3],
        ["a", "b", "c"],
        stretches=[Stretch(start=0, dtype="fp16", rescaled=False), Stretch(start=1, dtype="bf16", rescaled=False)],
        logprob_error=[1e-4, -4e-3, 3e-3],
        changed=[0, 1, None],
    )
    found = bought(generated(a_generation([row]), ["fp16", "bf16"]))
    assert {name: (each.rows, each.changed) for name, each in found.items()} == {"fp16": (1, 0), "bf16": (1, 1)}
    assert found["bf16"].logprob_max == 4e-3 and (found["bf16"].row, found["bf16"].step) == (0, 1)
    assert {name: each.left_out for name, each in found.items()} == {"fp16": 0, "bf16": 1}


def test_a_step_whose_log_probability_is_infinite_in_its_dtype_alone_is_counted() -> None:
    row = a_continuation([1, 2, 3], ["a", "b", "c"], logprob_error=[1e-4, None, 3e-3])
    each = bought(generated(a_generation([row]), ["fp16"]))["fp16"]
    assert (each.tokens, each.bad, each.logprob_max, each.step) == (3, 1, 3e-3, 2)
    assert each.logprob_rms == pytest.approx(((1e-8 + 9e-6) / 2) ** 0.5)


def test_a_dtype_of_which_every_row_is_left_out_counts_them_and_is_not_shown() -> None:
    run = a_run([a_pass("fp32", HEALTHY), a_pass("fp16", HEALTHY, upcast=[None, an_upcast(tokens=0, rows=0)])])
    assert bought(run)["fp16"].left_out == 2 and "fp16" not in judge(run).bought
    other = bought(with_softmax())["bf16"]
    both = together([bought(run)["fp16"], other])
    assert (both.left_out, both.rows, both.loss) == (2, other.rows, other.loss)


def test_the_guard_advice_switched_off_advises_nothing() -> None:
    from qwen_precision.settings.guards import GuardSettings

    row = a_continuation([1, 2], ["a", "b"], changed=[1, 1])
    assert names(generated(a_generation([row]), ["fp16"])) == ["next token"]
    off = GuardSettings.model_validate({"advice": False}).model_dump()
    assert names(generated(a_generation([row], guards=off), ["fp16"])) == []


def test_what_logits_take_is_their_number_times_their_bytes() -> None:
    taken = cost(healthy_run())
    assert taken is not None and (taken.dtype, taken.vocabulary) == ("fp16", 151936)
    for each in taken.lengths:
        assert each.float32 == each.rows * each.tokens * 151936 * 4 == 2 * each.narrow
    assert [each.tokens for each in taken.lengths] == [1, 2, 8_000, 32_000, 128_000]


def test_a_batch_counts_with_all_of_its_rows() -> None:
    taken = cost(healthy_run(logits=a_cost(bytes=3 * 607744, whole_prompt_bytes=3 * 607744 * 7)))
    assert taken is not None and (taken.whole.rows, taken.whole.tokens, taken.last.rows) == (3, 7, 3)


@pytest.mark.parametrize(
    "changes", [{"bytes": 0}, {"whole_prompt_bytes": 0}, {"upcast_seconds": float("nan")}, {"steps": 0}], ids=repr
)
def test_a_record_from_elsewhere_may_hold_any_cost(changes: dict[str, Any]) -> None:
    assert judge(healthy_run(logits=a_cost(**changes), model=a_model(vocabulary=0, weight_bytes=0))).verdict


def test_a_failing_text_is_told_of_as_far_as_its_logits_were_finite() -> None:
    each = bought(exclamation_run())["fp16"]
    assert (each.rows, each.left_out) == (1, 12)
