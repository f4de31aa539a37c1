"""Judging a generation: what is an error, what was mended, what is only told; the command that leads on."""

import subprocess

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.nextcommand import next_command, quoted_for_a_shell, same_again
from qwen_precision.record.generation import ProbeSummary, Stretch
from qwen_precision.record.run import Run
from qwen_precision.settings.guards import GuardSettings
from support.builders import a_continuation, a_generation, a_trip, exclamation_run, generated, recovered_run

UNWATCHED = GuardSettings.model_validate({"watch": False, "clamp": False, "recover": False}).model_dump()
SAME = [7, 9, 4, 2, 8, 5, 3, 6]


def kinds(run: Run) -> list[tuple[str, str]]:
    return [(finding.kind, finding.severity) for finding in judge(run).findings]


def sampled(inputs: list[str], guards: dict, **changes: object) -> Run:
    rows = [a_continuation(SAME, ["a"] * 8, row=n, input=text, text="a" * 8) for n, text in enumerate(inputs)]
    return generated(a_generation(rows, guards=guards, options={"do_sample": True, "seed": 0}, **changes), ["fp16"])


def test_the_same_ids_for_different_prompts_are_an_error_where_nobody_watched() -> None:
    assert kinds(sampled(["one", "two"], UNWATCHED)) == [("degenerate-text", "error")]
    assert kinds(sampled(["one", "one"], UNWATCHED)) == []
    assert kinds(sampled(["one", "two"], GuardSettings().model_dump())) == []
    bad = [a_trip(3, row=1)]
    assert ("degenerate-text", "error") in kinds(sampled(["one", "two"], GuardSettings().model_dump(), trips=bad))


def test_a_run_of_id_zero_that_nobody_watched_is_what_nan_prints() -> None:
    row = a_continuation([0] * 9, ["!"] * 9)
    assert kinds(generated(a_generation([row], guards=UNWATCHED), ["fp16"])) == [("degenerate-text", "error")]
    row = a_continuation([5] * 9, ["x"] * 9)
    assert kinds(generated(a_generation([row], guards=UNWATCHED), ["fp16"])) == [("degenerate-text", "info")]
    # Watched and healthy, it is a text like any other.
    row = a_continuation([0] * 9, ["!"] * 9)
    assert kinds(generated(a_generation([row]), ["fp16"])) == [("degenerate-text", "info")]


def test_one_unmended_step_among_mended_ones_is_an_error() -> None:
    row = a_continuation([1, 2, 3], ["a", "b", "c"])
    mended = [a_trip(0), a_trip(0, "clamp", "repaired"), a_trip(2), a_trip(2, "clamp", "repaired")]
    assert kinds(generated(a_generation([row], mended), ["fp16"])) == [("nonfinite-logits", "warning")]
    assert kinds(generated(a_generation([row], mended[:3]), ["fp16"])) == [("nonfinite-logits", "error")]


def test_a_loop_on_logits_that_were_computed_again_is_told_and_not_called_repaired() -> None:
    ways = [Stretch(start=0, dtype="bf16", rescaled=False)]
    row = a_continuation([9] * 9, [""] * 9, text="", clean_text="", stretches=ways)
    trips = [a_trip(0), a_trip(0, "recover", "recovered")]
    report = judge(generated(a_generation([row], trips), ["fp16", "bf16"]))
    assert [(f.kind, f.dtype, f.severity) for f in report.findings] == [
        ("nonfinite-logits", "fp16", "warning"),
        ("degenerate-text", "bf16", "info"),
    ]
    assert report.verdict == {"fp16": "risk", "bf16": "ok"} and "healthy" in report.findings[1].cause.sentence
    patched = [*trips, a_trip(3, dtype="bf16"), a_trip(3, "clamp", "repaired", dtype="bf16")]
    report = judge(generated(a_generation([row], patched), ["fp16", "bf16"]))
    loop = next(each for each in report.findings if each.kind == "degenerate-text")
    assert loop.severity == "warning" and "repaired at 1 of these steps" in loop.cause.sentence


def test_what_was_only_reported_did_not_mend_anything() -> None:
    row = a_continuation([1], ["a"])
    only = [a_trip(0), a_trip(0, "clamp", "repaired", acted=False)]
    assert kinds(generated(a_generation([row], only), ["fp16"])) == [("nonfinite-logits", "error")]


def test_the_dtype_that_failed_is_blamed_and_not_the_one_that_went_on() -> None:
    report = judge(recovered_run())
    assert report.verdict == {"fp16": "risk", "bf16": "ok"}


@pytest.mark.parametrize(("headroom", "found"), [(3.99, 1), (4.0, 0), (None, 0)])
def test_little_headroom_in_an_earlier_probe_is_advice_just_below_its_limit(headroom: float | None, found: int) -> None:
    probe = ProbeSummary(file="p.json", verdict="risk", headroom=headroom, where="layer 3, x")
    run = generated(a_generation([a_continuation([1], ["a"])], probe=probe), ["fp16"])
    assert kinds(run) == [("advice", "info")] * found


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"do_sample": True, "temperature": 0.29}, 1),
        ({"do_sample": True, "temperature": 0.3}, 0),
        ({"do_sample": False, "temperature": 0.1}, 0),
        ({"repetition_penalty": 1.31}, 1),
        ({"repetition_penalty": 1.29}, 0),
        ({"repetition_penalty": 0.6}, 1),
    ],
)
def test_settings_are_advised_against_just_beyond_their_limit(options: dict, found: int) -> None:
    run = generated(a_generation([a_continuation([1], ["a"])], options=options), ["fp16"])
    assert kinds(run) == [("advice", "info")] * found


def test_the_next_command_probes_what_the_failing_step_was_given() -> None:
    start = "qprec probe Qwen/Qwen3-8B --revision 0123456789abcdef --dtype fp16"
    assert next_command(judge(exclamation_run()), "gen.json") == f"{start} --prompts gen.json"
    at_once = generated(a_generation([a_continuation([0], ["!"], clean_text="")], [a_trip(0)]), ["fp16"])
    assert next_command(judge(at_once), "gen.json") == f"{start} --prompt 'Hello there'"
    long = a_continuation([1], ["a"], input="word " * 100, clean_text="")
    assert str(next_command(judge(generated(a_generation([long], [a_trip(0)]), ["fp16"])), "gen.json")).endswith(
        "--dtype fp16 --prompts gen.json"
    )
    assert next_command(judge(generated(a_generation([long]), ["fp16"])), "gen.json") is None


def test_a_row_that_moved_at_the_first_step_is_still_probed_in_the_dtype_asked_for() -> None:
    row = a_continuation([1], ["a"], clean_text="", stretches=[Stretch(start=0, dtype="bf16", rescaled=False)])
    run = generated(a_generation([row], [a_trip(0), a_trip(0, "recover", "recovered")]), ["fp16", "bf16"])
    assert "--dtype fp16" in str(next_command(judge(run), "gen.json"))


@pytest.mark.parametrize(
    "text", ["plain", "two words", "it's", "a\nb\tc", "\x1b[31m", "\u202ex", "$HOME `x` \\n", "上海", ""]
)
def test_a_quoted_word_is_read_back_by_a_shell_and_is_one_inert_line(text: str) -> None:
    quoted = quoted_for_a_shell(text)
    assert not {"\n", "\x1b", "\u202e", "\t"} & set(quoted)
    done = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode() == text


def test_the_built_in_prompts_are_not_named_in_the_command(demo_run: Run) -> None:
    assert same_again(demo_run) == "qprec probe demo"


def test_the_command_that_makes_a_run_again_names_what_was_asked_for() -> None:
    settings = {
        "dtype": "fp16",
        "temperature": 0.5,
        "do_sample": True,
        "chat": True,
        "guards": "strict",
        "seed": 3,
        "device": "auto",
        "attention": None,
    }
    run = generated(a_generation([a_continuation([1], ["a"])]), ["fp16"], settings=settings)
    command = same_again(run)
    for part in ("qprec generate", "--dtype fp16", "--temperature 0.5", "--do-sample", "--chat", "--guards strict"):
        assert part in command
    assert "--device" not in command and "--attn" not in command and "--prompt 'Hello there'" in command
