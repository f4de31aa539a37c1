"""One screen that answers: golden at two widths, never longer than a terminal, its commands whole and last."""

from collections.abc import Callable
from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.record.run import Run, Weight
from qwen_precision.render import FORMATS, View
from qwen_precision.render.screen import MOST_LINES
from support.builders import (
    HEALTHY,
    RUNS,
    a_continuation,
    a_control,
    a_cost,
    a_generation,
    a_pass,
    a_plan,
    a_prompt,
    a_run,
    a_sweep,
    a_trip,
    advised_run,
    an_upcast,
    generated,
    healthy_run,
    healthy_text_run,
    hostile_run,
    many_overflows_run,
    not_rescuable_run,
    overflowing_run,
    two_prompts_run,
)


def risky_run() -> Run:
    near = [*HEALTHY[:4], 61_000.0, 31.0]
    prompts = [a_prompt("plain"), a_prompt("chinese", "上海有个非常出名的地方，")]
    return a_run([a_pass("fp32", near), a_pass("fp16", near), a_pass("bf16", near)], prompts=prompts)


def damaged_run() -> Run:
    """A NaN in the file: every dtype fails by it."""
    weight = Weight(
        name="model.layers.31.mlp.down_proj.weight",
        parameter="model.layers.31.mlp.down_proj.weight",
        file="model-00002-of-00005.safetensors",
        elements=50_331_648,
        nan=3,
        inf=0,
        abs_max=0.4,
        overflow={},
        underflow={},
        inexact={},
    )
    return healthy_run(weights=[weight])


SCREENS: dict[str, Callable[[], Run]] = {**RUNS, "risk": risky_run, "damaged": damaged_run}


def screen(run: Run, width: int = 80, record: str = "qprec-run.json") -> str:
    return str(FORMATS["screen"].render(View((judge(run),), width=width, record=record)))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", SCREENS)
def test_every_kind_of_run_looks_as_expected(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.screen{width}.txt", screen(SCREENS[name](), width))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", [*SCREENS, "long", "many-layers"])
def test_a_screen_fits_a_terminal_but_for_commands_that_stay_whole(name: str, width: int) -> None:
    long = {"long": lambda: hostile_run("word " * 400), "many-layers": lambda: many_overflows_run(94)}
    lines = screen({**SCREENS, **long}[name](), width).splitlines()
    assert len(lines) <= MOST_LINES
    assert all(len(line) <= width or line[10:].startswith("qprec ") for line in lines)


@pytest.mark.parametrize("name", SCREENS)
def test_the_last_line_is_something_to_do(name: str) -> None:
    last = screen(SCREENS[name]()).splitlines()[-1]
    assert last[10:].startswith("qprec ")


def test_the_answer_names_place_magnitude_limit_cause_and_what_to_do() -> None:
    text = screen(overflowing_run())
    for part in (
        'Starts    layer 31, residual add after mlp, token 0 "Hello", channel 35',
        "74,946 in fp32, 1.14 times fp16's limit of 65,504",
        "Why       out-of-range: the value itself is too large for fp16",
        "fp16      FAIL   the prompt fails",
    ):
        assert part in text, text


def test_what_is_worth_least_goes_first_where_there_is_no_room() -> None:
    # Eight rows of a batch and every fact there is do not fit; verdict, place and cause always do.
    text = screen(generated(a_generation([*RUNS["text-recovered"]().generation.rows] * 4), ["fp16", "bf16"]))  # type: ignore[union-attr]
    assert "qprec report" in text and "and 6 more rows" in text and len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("width", [80, 120])
def test_advice_on_logits_is_whole_on_the_screen_and_ends_with_what_to_do(width: int) -> None:
    infinite = an_upcast(tokens=8191, bad=3, loss_in_dtype=float("inf"), rows=5678, changed=1234, mass_lost=-0.0134)
    both = [a_pass("fp32", HEALTHY), *(a_pass(dtype, HEALTHY, upcast=[infinite]) for dtype in ("fp16", "bf16"))]
    for passes in (advised_run().passes, both):
        text = screen(advised_run().model_copy(update={"passes": passes}), width)
        told = " ".join(text[text.index("Logits ") : text.index("Layer ")].split())
        assert "…" not in told and len(text.splitlines()) <= MOST_LINES
        assert "8,192 tokens take 4.98 GB in float32, the last position 608 kB do: train with the loss's" in told
        assert told.endswith("sample from float32; long prompts: logits_to_keep=1, chunked prefill, vLLM")
    assert "softmax in fp16: loss infinite; 1,234 of 5,678 next tokens change" in told


def test_a_text_that_held_too_many_logits_is_told_of_what_it_held() -> None:
    taken = a_cost(bytes=607744, whole_prompt_bytes=607744 * 8192, held=1 << 31, chunks=2)
    made = healthy_text_run().generation
    assert made is not None
    text = " ".join(screen(generated(made.model_copy(update={"logits": taken}), ["fp16"])).split())
    held = "the largest tensor of them here took 2.15 GB, the last position takes 608 kB in float32"
    assert f"Logits {held} do: prefill in smaller" in text


def test_without_a_record_no_command_names_one() -> None:
    assert "qprec report" not in screen(overflowing_run(), record="")


def test_where_one_or_two_prompts_are_clean_the_verdict_names_them() -> None:
    few = [a_prompt("plain"), a_prompt("chat"), a_prompt("a newline")]
    many = [*few, a_prompt("code"), a_prompt("chinese")]
    assert 'FAIL   1 of 3 prompts fail (not "chat" and "a newline")' in screen(overflowing_run(prompts=few))
    assert "FAIL   1 of 5 prompts fail\n" in screen(overflowing_run(prompts=many))


def test_a_control_that_came_out_otherwise_for_another_prompt_is_told_and_rules_nothing_out() -> None:
    fails = a_control("with the template", "plain")
    alike, other = (a_control("with the template", "chat", clean=clean) for clean in (False, True))
    same, differs = (" ".join(screen(two_prompts_run([fails, each])).split()) for each in (alike, other))
    assert "fails: with chat template Not it" in same and ", chat template," in same
    assert 'fails: with chat template; prompt "chat" clean: with chat template Not it' in differs
    assert ", chat template," not in differs


def test_beside_the_fix_stands_what_it_costs() -> None:
    told = " ".join(screen(overflowing_run(rescue=a_plan())).split())
    assert "becomes 4x or more; 40 of 536,870,912 weights change by over 1 % in fp16, 3 to zero" in told
    free = a_plan(losses=[each.model_copy(update={"badly": 0}) for each in a_plan().losses])
    assert "weights change" not in screen(overflowing_run(rescue=free))


def test_what_came_of_a_sweep_is_told_by_the_command_that_made_it() -> None:
    """The screen names it as the next command: without this line it would look as if nothing had been done."""
    for over, words in ((0, "512 of 512 tried; none fails"), (3, "512 of 512 tried; 3 fail")):
        run = healthy_run(sweep=a_sweep(over=over))
        assert words in screen(run) and words in str(FORMATS["html"].render(View((judge(run),))))


def test_of_a_token_without_its_text_no_empty_quotes_are_shown() -> None:
    from qwen_precision.report.redact import redacted

    text = screen(redacted(overflowing_run()))
    assert "token 0, channel 35" in text and '""' not in text


def test_an_empty_text_and_one_that_a_failure_ended_say_how_they_ended() -> None:
    def shown(**changes: Any) -> str:
        return screen(generated(a_generation([a_continuation([9, 9], ["a", "b"], **changes)]), ["fp16"]))

    assert "2 tokens, ENDED after its last good token" in shown(text="ab", finish="failed")
    assert "2 tokens, ended at the limit" in shown(text="", finish="length")
    assert "2 tokens" not in shown(text="ab", finish="length")


def test_of_a_loop_it_is_the_logits_that_are_called_repaired() -> None:
    row = a_continuation([9] * 9, ["a"] * 9)
    made = a_generation([row], [a_trip(3), a_trip(3, "clamp", "repaired")])
    text = screen(generated(made, ["fp16"]))
    assert "RISK the text says nothing from step 0 on (degenerate-text), with repaired logits" in " ".join(text.split())


def test_where_no_rescue_is_possible_the_screen_says_why() -> None:
    text = " ".join(screen(not_rescuable_run()).split())
    assert "No rescue rescaling alone does not do it: logits (0.5x headroom): a logit is the answer" in text
    plan = a_plan(unsupported="only a Qwen can be rescaled")
    text = screen(overflowing_run(rescue=plan))
    assert "No rescue only a Qwen can be rescaled" in text
