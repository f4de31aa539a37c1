"""The table: golden for each kind of run, readable at 80 columns, nothing that matters cut, hostile strings inert."""

from collections.abc import Callable

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from qwen_precision.record.generation import Stretch
from qwen_precision.render import FORMATS, View, one
from qwen_precision.render.table.table import render_table as rendered
from qwen_precision.settings.guards import GuardSettings
from support.builders import (
    HEALTHY,
    RUNS,
    a_continuation,
    a_cost,
    a_generation,
    a_pass,
    a_prompt,
    a_run,
    advised_run,
    an_event,
    an_upcast,
    generated,
    healthy_run,
    many_overflows_run,
    overflowing_run,
)

INF = float("inf")


def render_table(report: Report, width: int = 80, colour: bool = False) -> str:
    return rendered(View((report,), width=width, colour=colour))


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_looks_as_expected(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.txt", render_table(judge(RUNS[name]())))


@pytest.mark.parametrize("name", RUNS)
def test_json_of_every_kind_of_run_is_as_expected(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.json", FORMATS["json"].render(one(judge(RUNS[name]()))))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", RUNS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    text = render_table(judge(RUNS[name]()), width=width)
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_layer_and_module_are_never_cut(width: int) -> None:
    text = render_table(judge(overflowing_run()), width=width)
    assert "layer 31, residual add after mlp" in text
    assert "model.layers.31" in text and "…" not in text


def test_findings_come_before_headroom_and_the_verdict_before_both() -> None:
    text = render_table(judge(overflowing_run()))
    assert text.index("FAIL") < text.index("Findings in fp16") < text.index("Headroom in fp16")


def test_a_healthy_model_shows_where_it_is_tightest() -> None:
    text = render_table(judge(healthy_run()))
    assert "least headroom 156x; 8.3x closer to fp32 than bf16" in " ".join(text.split())
    room, _, _ = text.partition("What they cost")  # where bars are of bytes
    rows = [line for line in room.splitlines() if "█" in line and "by layer" not in line]
    rooms = [float(line.split()[-2].removesuffix("x").replace(",", "")) for line in rows]
    assert len(rooms) == 3 and rooms == sorted(rooms)


def test_what_to_do_stands_under_the_finding_that_it_is_for_and_once_in_full() -> None:
    text = " ".join(render_table(judge(advised_run())).split())
    first, loss, token = (text.index(f"advice logits, {name}") for name in ("long prompt", "loss", "next token"))
    for at, end, words in (
        (first, loss, "do For text, ask for the last position alone"),
        (loss, token, "do To train or fine-tune in bf16"),
        (token, text.index("Headroom in"), "do Upcast the last position's logits"),
    ):
        assert at < text.index(words) < end
    size = [1.5, 70_000.0, 300.0, 40_000.0, 74_945.8, 31.0]
    both = [an_event(1), an_event(4)]
    twice = a_run([a_pass("fp32", size), a_pass("fp16", [1.5, INF, 300.0, 40_000.0, INF, 31.0], both)])
    told = " ".join(render_table(judge(twice)).split())
    assert "2. overflow" in told and "do as for 1" in told[told.index("2. overflow") :]


def test_a_dtype_none_of_whose_rows_was_finite_is_said_to_be_left_out() -> None:
    text = " ".join(render_table(judge(overflowing_run(logits=a_cost()))).split())
    assert "Not compared in fp16 and bf16: no row kept finite logits of its own." in text
    assert "Not compared" not in render_table(judge(healthy_run()))


def test_why_a_dtype_of_a_text_is_not_compared_is_said() -> None:
    row = a_continuation([1], ["a"], stretches=[Stretch(start=0, dtype="bf16", rescaled=False)])
    text = " ".join(render_table(judge(generated(a_generation([row]), ["fp16", "bf16"]))).split())
    assert "Not compared in fp16: no step has logits in it that could be used." in text
    unknown = {name: [None] for name in ("logprob", "logprob_error", "mass_lost", "ranks", "changed")}
    off = GuardSettings.model_validate({"watch": False, "clamp": False, "recover": False}).model_dump()
    unwatched = a_generation([a_continuation([1], ["a"], **unknown)], guards=off)
    assert "Not compared in fp16: the guard watch is off." in " ".join(
        render_table(judge(generated(unwatched, ["fp16"]))).split()
    )


def test_what_a_tied_rank_is_is_said_where_there_is_one() -> None:
    tied = a_pass("bf16", HEALTHY, upcast=[an_upcast(rows=34, ranks=246)])
    text = " ".join(render_table(judge(a_run([a_pass("fp32", HEALTHY), tied]))).split())
    assert "246 of 340" in text and "0 of 34 next tokens change (at most 8 a row looked at)" in text
    assert "Ranks tied: of the ten likeliest tokens" in text
    assert "Ranks tied: " not in render_table(judge(healthy_run()))


@pytest.mark.parametrize("run", ["probe", "generate"])
def test_in_fp32_alone_there_is_one_column_of_bytes_and_no_upcast(run: str) -> None:
    in_fp32 = a_continuation([1], ["a"], stretches=[Stretch(start=0, dtype="fp32", rescaled=False)])
    runs = {
        "probe": a_run([a_pass("fp32", HEALTHY)], logits=a_cost()),
        "generate": generated(a_generation([in_fp32]), ["fp32"]),
    }
    text = render_table(judge(runs[run]))
    head = next(line for line in text.splitlines() if line.startswith("logits of"))
    assert head.split()[2:] == ["float32", "(log", "scale)"] and "Upcasting" not in text


def test_several_prompts_are_told_apart_by_name_and_row() -> None:
    prompts = [a_prompt("plain"), a_prompt("a batch of two rows").model_copy(update={"rows": [*a_prompt().rows] * 2})]
    off = [an_upcast(), an_upcast(loss_in_dtype=2.4)]
    passes = [a_pass("fp32", HEALTHY), a_pass("fp16", HEALTHY, upcast=[an_upcast()])]
    passes += [a_pass("fp32", HEALTHY, prompt=1), a_pass("fp16", HEALTHY, prompt=1, upcast=off)]
    largest = a_cost(bytes=2 * 607744, whole_prompt_bytes=4 * 607744)
    text = " ".join(render_table(judge(a_run(passes, prompts=prompts, logits=largest))).split())
    assert '"a batch of two…" row 1' in text and '"a batch of two…" (2 x 2 tokens) 2.43 MB' in text
    alone = render_table(judge(healthy_run()))
    assert "loss of" not in alone and "this prompt (2 tokens)" in alone


def test_many_findings_of_one_kind_are_one_group_with_its_layers() -> None:
    text = render_table(judge(many_overflows_run(40)))
    assert "layers 0 to 39, residual add after mlp" in text
    assert len(text.splitlines()) < 60


def test_a_line_of_blocks_is_logarithmic_and_shows_what_is_not_known() -> None:
    from qwen_precision.render.text import spark

    assert spark([1.0, 10.0, 100.0]) == "▁▅█" and spark([1e-3, None, 1e-2]) == "▁·█"
    assert spark([]) == "" and spark([None]) == "·" and spark([2.0, 2.0]) == "▁▁"
    assert len(spark([1.0 + n for n in range(94)])) <= 32


def test_colour_is_written_only_when_asked_for() -> None:
    report = judge(overflowing_run())
    assert "\x1b[" in render_table(report, colour=True)
    assert "\x1b" not in render_table(report)
