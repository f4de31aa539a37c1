"""Generation: plain transformers when nothing is wrong; the step, the row and what was done when something is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.judge.checks import judge
from qwen_precision.record.file import load, save, to_json
from qwen_precision.record.run import Run
from qwen_precision.render.text import room
from support.checkpoints import make_checkpoint
from support.generations import ANSWER, BATCH, DEMO, PROMPT, ids_of, plain, plant, run, settings, trips_of
from support.plants import loud_token
from support.runs import faults

pytestmark = pytest.mark.transformers

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
NAN = float("nan")

# -- nothing is wrong: the tokens are those of model.generate ------------------------------------------------------


@pytest.mark.parametrize("guards", ["default", "off", "strict", "observe"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_on_a_healthy_model_the_tokens_are_those_of_transformers(
    healthy: Path, dtype: str, options: dict[str, Any], guards: str
) -> None:
    made = run(healthy, BATCH, guards, dtype=dtype, max_new_tokens=20, seed=3, **options)
    assert ids_of(made) == plain(healthy, BATCH, dtype, seed=3, max_new_tokens=20, **options)
    assert [trip for trip in trips_of(made) if trip[2] != "degenerate"] == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_eager_and_sdpa_and_a_tied_head_are_as_in_transformers(healthy_tied: Path, attention: str) -> None:
    made = run(healthy_tied, BATCH, dtype="bf16", max_new_tokens=12, attention=attention, **SAMPLED)
    assert ids_of(made) == plain(healthy_tied, BATCH, "bf16", attention=attention, max_new_tokens=12, **SAMPLED)


def test_a_mixture_of_experts_is_as_in_transformers(healthy_moe: Path) -> None:
    made = run(healthy_moe, BATCH, dtype="fp16", max_new_tokens=12, **SAMPLED)
    assert ids_of(made) == plain(healthy_moe, BATCH, "fp16", max_new_tokens=12, **SAMPLED)


def test_the_end_token_ends_a_row_and_the_others_go_on() -> None:
    texts = ["The quick", PROMPT]
    made = run("demo", texts, dtype="fp32", max_new_tokens=60)
    assert ids_of(made) == plain(DEMO, texts, "fp32", do_sample=False, max_new_tokens=60)
    assert made.generation is not None
    assert [row.finish for row in made.generation.rows] == ["eos", "eos"]
    assert len({len(row.ids) for row in made.generation.rows}) == 2


def test_other_seeds_give_other_tokens_and_the_same_seed_the_same(healthy: Path) -> None:
    one, two, again = (ids_of(run(healthy, seed=seed, do_sample=True, max_new_tokens=8)) for seed in (1, 2, 1))
    assert one != two and one == again


def test_defaults_come_from_the_generation_config(healthy: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(healthy, tmp_path / "model"))
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 7, "eos_token_id": 503}'
    )
    made = run(folder, BATCH, dtype="fp32", seed=5)
    assert ids_of(made) == plain(folder, BATCH, "fp32", seed=5)
    assert made.generation is not None and made.generation.options["temperature"] == 0.6
    # A flag that equals transformers' own default still wins over the file.
    hot = run(folder, BATCH, dtype="fp32", seed=5, temperature=1.0, top_k=0, top_p=1.0)
    assert ids_of(hot) == plain(folder, BATCH, "fp32", seed=5, temperature=1.0, top_k=0, top_p=1.0)
    assert ids_of(hot) != ids_of(made)


def test_a_prompt_prefilled_in_chunks_gives_the_logits_of_the_whole(healthy: Path) -> None:
    """fp32, where chunks only change the order of sums: the numbers agree to five digits, the tokens are the same."""
    text = ["The quick brown fox jumps over the lazy dog. " * 2, "Hello"]
    whole = run(healthy, text, settings(float32_logits={"chunk": 0}), dtype="fp32", max_new_tokens=8)
    parts = run(healthy, text, settings(float32_logits={"chunk": 3}), dtype="fp32", max_new_tokens=8)
    assert ids_of(whole) == ids_of(parts)
    assert whole.generation is not None and parts.generation is not None
    assert whole.generation.logits is not None and parts.generation.logits is not None
    width = whole.prompts[0].rows[0].padding + len(whole.prompts[0].rows[0].ids)
    assert (whole.generation.logits.chunks, parts.generation.logits.chunks) == (1, math.ceil(width / 3))
    for a, b in zip(whole.generation.rows, parts.generation.rows, strict=True):
        assert a.margin == pytest.approx(b.margin, rel=1e-3) and a.top1 == pytest.approx(b.top1, rel=1e-4)


def test_only_the_last_position_is_materialised_and_both_costs_are_recorded(healthy: Path) -> None:
    made = run(healthy, BATCH, dtype="fp16", max_new_tokens=2).generation
    assert made is not None and made.logits is not None
    rows, width, vocabulary = 3, max(len(row) for row in [run(healthy, BATCH).prompts[0].rows[0].ids]), 512
    assert made.logits.bytes == rows * vocabulary * 4
    assert made.logits.whole_prompt_bytes >= rows * width * vocabulary * 4
    assert made.logits.upcast and made.logits.upcast_seconds > 0


def test_the_numbers_of_a_step_are_those_of_a_float64_loop(healthy: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = run(healthy, ["Hello there"], dtype="fp32", max_new_tokens=4)
    assert made.generation is not None
    row, ids = made.generation.rows[0], made.prompts[0].rows[0].ids
    model = AutoModelForCausalLM.from_pretrained(healthy, dtype=torch.float64).eval()
    for step in range(4):
        with torch.no_grad():
            logits = model(torch.tensor([ids + row.ids[:step]])).logits[0, -1]
        chances = torch.softmax(logits, -1)
        first, second = logits.topk(2).values.tolist()
        assert row.top1[step] == pytest.approx(chances.max().item(), rel=1e-4)
        assert row.margin[step] == pytest.approx(first - second, abs=1e-5)
        assert row.entropy[step] == pytest.approx(-(chances * chances.log()).sum().item(), rel=1e-4)


# -- the demo --------------------------------------------------------------------------------------------------------


def test_without_guards_the_demo_prints_exclamation_marks_and_that_is_recognised() -> None:
    made = run(guards="off", max_new_tokens=16)
    assert made.generation is not None and made.generation.rows[0].text == "!" * 16
    report = judge(made)
    assert report.verdict == {"fp16": "fail"} and report.exit_code("fail") == 1
    assert [finding.kind for finding in report.findings] == ["nonfinite-logits", "degenerate-text"]
    assert report.findings[0].place.step == 0 and "layer 4" in report.findings[0].cause.sentence
    assert (
        "not usable" in report.findings[1].cause.sentence
        and "qprec probe demo --dtype fp16" in report.findings[1].cause.advice
    )


def test_without_guards_the_sampling_error_is_a_finding_with_its_step() -> None:
    made = run(guards="off", do_sample=True, top_k=0)
    assert made.generation is not None and made.generation.error is not None
    assert "probability tensor contains either" in made.generation.error.message
    report = judge(made)
    finding = next(each for each in report.findings if each.kind == "sampling-error")
    assert (finding.place.step, finding.place.row, finding.severity) == (0, 0, "error") and report.exit_code(
        "fail"
    ) == 1


@pytest.mark.parametrize("sample", [False, True])
def test_with_guards_the_demo_gives_the_text_of_fp32_and_the_record_says_how(sample: bool) -> None:
    made = run(do_sample=sample or None)
    wide = run(dtype="fp32", do_sample=sample or None)
    assert made.generation is not None and wide.generation is not None
    assert made.generation.rows[0].text == wide.generation.rows[0].text == ANSWER
    assert [(each.start, each.dtype) for each in made.generation.rows[0].stretches] == [(0, "bf16")]
    assert trips_of(made) == [(0, 0, "watch", "wholly bad"), (0, 0, "recover", "recovered")]
    watch, recover = made.generation.trips
    assert watch.before["nan"] == 512 and recover.after["nan"] == 0 and recover.acted
    assert watch.poisoned is not None and (watch.poisoned.layer, watch.poisoned.position) == (4, 0)
    report = judge(made)
    assert report.verdict == {"fp16": "risk", "bf16": "ok"}
    assert (report.exit_code("fail"), report.exit_code("risk"), report.exit_code("never")) == (0, 1, 0)


def test_stop_ends_the_row_at_the_last_good_token_with_exit_code_1() -> None:
    made = run(guards=settings(recover={"on_failure": "stop"}))
    assert made.generation is not None
    assert (made.generation.rows[0].ids, made.generation.rows[0].finish) == ([], "failed")
    assert judge(made).exit_code("fail") == 1


def test_the_record_of_a_generation_survives_saving_and_loading(tmp_path: Path) -> None:
    made = run(guards="off", max_new_tokens=3)
    save(made, tmp_path / "gen.json")
    again = load(tmp_path / "gen.json")
    assert to_json(again) == to_json(made) and isinstance(again, Run)


# -- planted faults ----------------------------------------------------------------------------------------------------


def nan_at(step: int, row: int = 0) -> Any:
    def fault(now: int, logits: torch.Tensor, cache: Any) -> None:
        if now == step:
            logits[row] = NAN

    return fault


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_row_that_fails_leaves_the_other_rows_bit_for_bit_alone(
    healthy: Path, step: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = run(healthy, BATCH, max_new_tokens=12, **options)
    plant(monkeypatch, nan_at(step, row=1))
    made = run(healthy, BATCH, max_new_tokens=12, **options)
    assert made.generation is not None and clean.generation is not None
    for number in (0, 2):
        assert made.generation.rows[number] == clean.generation.rows[number]
    row = made.generation.rows[1]
    assert [(each.start, each.dtype) for each in row.stretches] == (
        [(0, "fp16"), (step, "bf16")] if step else [(0, "bf16")]
    )
    assert row.ids[:step] == clean.generation.rows[1].ids[:step] and len(row.ids) == 12
    assert [trip[:3] for trip in trips_of(made)] == [(step, 1, "watch"), (step, 1, "recover")]


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_recovered_in_fp32_goes_on_as_fp32_would_have_from_there(
    healthy: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on, the fallback is the fp32 run: same prefix, same random numbers."""
    plant(monkeypatch, nan_at(0))
    only = settings(recover={"ladder": ["fp16", "fp32"]})
    made = run(healthy, [PROMPT], only, max_new_tokens=12, **options)
    assert ids_of(made) == plain(healthy, [PROMPT], "fp32", max_new_tokens=12, **options)


def test_the_ladder_is_climbed_until_a_dtype_works(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:] = NAN

    loaded = plant(monkeypatch, always, ["fp16", "bf16"])
    made = run(healthy, [PROMPT], max_new_tokens=6)
    assert loaded == ["fp16", "bf16", "fp32"]
    assert ids_of(made) == plain(healthy, [PROMPT], "fp32", do_sample=False, max_new_tokens=6)
    assert judge(made).verdict == {"fp16": "risk", "bf16": "risk", "fp32": "ok"}


def test_a_row_that_no_dtype_can_compute_is_ended_and_that_is_a_failure(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, nan_at(3, row=1), ["fp16"])

    def later(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:] = NAN

    plant(monkeypatch, later, ["bf16", "fp32"])
    made = run(healthy, BATCH[:2], max_new_tokens=10)
    assert made.generation is not None
    rows = made.generation.rows
    assert (rows[1].finish, len(rows[1].ids)) == ("failed", 3) and len(rows[0].ids) == 10
    assert trips_of(made, "recover") == [(3, 1, "recover", "not recovered")]
    assert judge(made).exit_code("fail") == 1


def test_a_poisoned_cache_is_named_and_dropped(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(now: int, logits: torch.Tensor, cache: Any) -> None:
        if now == 2:
            cache.layers[1].values[0, :, 1] = NAN

    clean = run(healthy, [PROMPT], max_new_tokens=8)
    plant(monkeypatch, poison)
    made = run(healthy, [PROMPT], settings(recover={"ladder": ["fp16", "fp32"]}), max_new_tokens=8)
    assert made.generation is not None
    watch = made.generation.trips[0]
    assert watch.step == 3 and watch.poisoned is not None
    assert (watch.poisoned.layer, watch.poisoned.part, watch.poisoned.position) == (1, "values", 1)
    assert not watch.poisoned.in_padding and ids_of(made)[0][:3] == ids_of(clean)[0][:3]
    assert len(ids_of(made)[0]) == 8


def test_a_transient_nan_is_told_from_a_poisoned_cache(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, nan_at(2))
    made = run(healthy, [PROMPT], max_new_tokens=5)
    assert made.generation is not None and made.generation.trips[0].poisoned is None
    assert "KV cache was finite" in judge(made).findings[0].cause.sentence


def test_returning_goes_back_to_fp16_after_the_set_number_of_tokens(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, nan_at(2, row=1))
    back = settings(recover={"then": "return", "return_after": 3})
    made = run(healthy, BATCH, back, max_new_tokens=12)
    assert made.generation is not None
    stretches = [(each.start, each.dtype) for each in made.generation.rows[1].stretches]
    assert stretches == [(0, "fp16"), (2, "bf16"), (5, "fp16")]
    assert trips_of(made, "recover") == [(2, 1, "recover", "recovered"), (5, 1, "recover", "returned")]


def test_a_row_whose_prefix_fails_in_fp16_stays_where_it_is() -> None:
    made = run(guards=settings(recover={"then": "return", "return_after": 2}))
    assert made.generation is not None and made.generation.rows[0].text == ANSWER
    assert trips_of(made, "recover") == [(0, 0, "recover", "recovered"), (2, 0, "recover", "stays")]


def test_padding_that_gives_nan_is_told_apart_and_the_row_recovers_without_it(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pad positions are NaN in the cache, as where fully masked rows are divided by zero."""

    def masked(now: int, logits: torch.Tensor, cache: Any) -> None:
        pads = [3, 0]
        for row, count in enumerate(pads[: len(logits)]):
            if now == 0 and count and len(logits) == 2:
                cache.layers[1].keys[row, :, :1] = NAN
                logits[row] = NAN

    texts = ["Hello", "The quick brown fox"]
    plant(monkeypatch, masked, ["fp16"])
    made = run(healthy, texts, max_new_tokens=6)
    kinds = {finding.kind: finding for finding in judge(made).findings}
    assert kinds["masked-row"].place.row == 0 and kinds["masked-row"].place.layer == 1
    cause = kinds["masked-row"].cause
    assert "layers up to 0 made of the left padding" in cause.sentence and "--prompts" in cause.advice
    assert len(ids_of(made)[0]) == 6 and len(ids_of(made)[1]) == 6


def test_an_overflow_at_pad_tokens_is_not_called_a_fault_of_the_mask(tmp_path: Path) -> None:
    """The pad token's embedding is what overflows; masked attention is as it should be."""
    folder = make_checkpoint(tmp_path / "model", edit=loud_token("<|endoftext|>", 40_000.0))
    findings = judge(run(folder, ["a", "abcdef"], max_new_tokens=2)).findings
    said = [each.cause.sentence for each in findings if each.kind == "masked-row"]
    assert said and all("does not tell an operation that overflowed" in each for each in said)
    assert not any("masked rows of left padding gave NaN" in each.cause.sentence for each in findings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_left_padding_of_a_healthy_model_is_no_finding(healthy: Path, dtype: str, attention: str) -> None:
    made = run(healthy, ["Hello", "The quick brown fox jumps"], dtype=dtype, attention=attention, max_new_tokens=6)
    assert [f for f in judge(made).findings if f.severity != "info"] == []


def test_one_infinite_logit_is_clamped_never_zeroed(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(now: int, logits: torch.Tensor, cache: Any) -> None:
        if now == 1:
            logits[0, 7] = float("inf")

    plant(monkeypatch, infinite)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.01}):
        made = run(healthy, [PROMPT], max_new_tokens=4, **options)
        assert ids_of(made)[0][1] == 7
        assert trips_of(made) == [(1, 0, "watch", "partly bad"), (1, 0, "clamp", "repaired")]
        assert judge(made).verdict == {"fp16": "risk"}


def test_a_row_that_is_partly_bad_again_and_again_is_computed_again(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[0, 7] = float("inf")

    plant(monkeypatch, always)
    made = run(healthy, [PROMPT], settings(clamp={"most": 2}), max_new_tokens=6)
    assert [trip[3] for trip in trips_of(made) if trip[2] != "watch"] == ["repaired", "repaired", "recovered"]
    assert ids_of(made)[0][:2] == [7, 7] and len(ids_of(made)[0]) == 6


def test_equal_logits_are_not_taken_for_a_distribution(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(now: int, logits: torch.Tensor, cache: Any) -> None:
        if now == 2:
            logits[0] = 0.0

    plant(monkeypatch, flat)
    made = run(healthy, [PROMPT], max_new_tokens=4)
    assert trips_of(made) == [(2, 0, "watch", "flat"), (2, 0, "recover", "recovered")]


def test_observe_reports_and_changes_nothing(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, nan_at(2))
    watched, off = (run(healthy, [PROMPT], name, max_new_tokens=6) for name in ("observe", "off"))
    assert ids_of(watched) == ids_of(off)
    assert watched.generation is not None
    assert not any(trip.acted for trip in watched.generation.trips)
    assert [trip.guard for trip in watched.generation.trips] == ["watch", "recover"]
    assert judge(watched).exit_code("fail") == 1


def test_filters_that_leave_nothing_keep_the_likeliest_token(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LogitsProcessor, Qwen3ForCausalLM

    class Nothing(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -float("inf")) if ids.shape[1] == self.at else scores

    own = Qwen3ForCausalLM._get_logits_processor

    def with_filter(self: Any, *args: Any, **kwargs: Any) -> Any:
        processors, nothing = own(self, *args, **kwargs), Nothing()
        nothing.at = len(clean.prompts[0].rows[0].ids) + 2
        processors.append(nothing)
        return processors

    clean = run(healthy, [PROMPT], max_new_tokens=5)
    monkeypatch.setattr(Qwen3ForCausalLM, "_get_logits_processor", with_filter)
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 1}):
        made = run(healthy, [PROMPT], max_new_tokens=5, **options)
        assert ids_of(made) == ids_of(clean)
        assert trips_of(made) == [(2, 0, "watch", "all filtered"), (2, 0, "epsilon", "likeliest kept")]
    bare = run(healthy, [PROMPT], "off", max_new_tokens=5, do_sample=True)
    assert bare.generation is not None and bare.generation.error is not None and bare.generation.error.step == 2


@pytest.fixture
def all_suppressed(healthy: Path, tmp_path: Path) -> Path:
    import json
    import shutil

    folder = Path(shutil.copytree(healthy, tmp_path / "model"))
    (folder / "generation_config.json").write_text(
        json.dumps({"suppress_tokens": list(range(512)), "eos_token_id": 503, "max_new_tokens": 4})
    )
    return folder


@pytest.mark.parametrize("guards", [settings(epsilon=False), "strict", "off", "observe"], ids=str)
def test_filters_that_leave_nothing_are_never_called_ok(all_suppressed: Path, guards: Any) -> None:
    """No other dtype is tried: it would change nothing about a filter."""
    made = run(all_suppressed, [PROMPT], guards)
    report = judge(made)
    assert made.dtypes == ["fp16"] and report.verdict == {"fp16": "fail"} and report.exit_code("fail") == 1
    assert next(f for f in report.findings if f.kind == "sampling-error").place.step == 0


def test_a_temperature_that_overflows_is_not_blamed_on_filters(healthy: Path) -> None:
    made = run(healthy, [PROMPT], do_sample=True, temperature=1e-40, max_new_tokens=3)
    greedy = run(healthy, [PROMPT], max_new_tokens=3)
    assert ids_of(made) == ids_of(greedy)  # the likeliest token is what the temperature goes to
    finding = next(f for f in judge(made).findings if f.kind == "sampling-error")
    assert "temperature or penalty" in finding.cause.sentence and finding.severity == "warning"


# -- text ---------------------------------------------------------------------------------------------------


def test_a_loop_with_healthy_logits_is_told_but_not_blamed_on_numbers(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loop(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[0, 9] = 30.0

    plant(monkeypatch, loop)
    made = run(healthy, [PROMPT], max_new_tokens=20)
    assert ids_of(made) == [[9] * 20] and trips_of(made) == [(7, 0, "degenerate", "run")]
    report = judge(made)
    assert [(f.kind, f.severity) for f in report.findings] == [("degenerate-text", "info")]
    assert "healthy" in report.findings[0].cause.sentence and report.verdict == {"fp16": "ok"}
    stopped = run(healthy, [PROMPT], settings(degenerate={"stop_loops": True}), max_new_tokens=20)
    assert len(ids_of(stopped)[0]) == 8


def test_text_that_bad_logits_made_is_ended_when_nothing_else_may_be_done() -> None:
    made = run(guards=settings(recover=False, clamp=False), max_new_tokens=40)
    assert made.generation is not None
    assert (made.generation.rows[0].finish, made.generation.rows[0].ids) == ("degenerate", [0] * 8)
    assert judge(made).exit_code("fail") == 1


def test_two_rows_that_are_sure_of_the_same_text_are_no_failure(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sure(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:, 10 + now] = 60.0

    plant(monkeypatch, sure)
    made = run(healthy, ["Hello", "The quick brown"], do_sample=True, max_new_tokens=12)
    assert ids_of(made)[0] == ids_of(made)[1] and faults(judge(made)) == []


def test_a_loop_that_meets_a_recovered_step_is_not_ended(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:, 9] = 60.0

    plant(monkeypatch, loop, ["bf16"])

    def loop_and_nan(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[:, 9] = 60.0
        if now == 3:
            logits[:] = NAN

    plant(monkeypatch, loop_and_nan, ["fp16"])
    made = run(healthy, [PROMPT], max_new_tokens=20)
    assert ids_of(made) == [[9] * 20] and judge(made).verdict["fp16"] == "risk"


def test_a_loop_in_one_row_is_not_blamed_for_the_bad_logits_of_another(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(now: int, logits: torch.Tensor, cache: Any) -> None:
        logits[0, 9] = 60.0
        logits[1] = NAN

    plant(monkeypatch, both)
    made = run(healthy, BATCH[:2], settings(recover=False), max_new_tokens=12)
    assert made.generation is not None
    assert [(row.finish, len(row.ids)) for row in made.generation.rows] == [("length", 12), ("degenerate", 8)]


def test_observe_reports_no_more_than_the_guards_would_have_done(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(now: int, logits: torch.Tensor, cache: Any) -> None:
        if now == 1:
            logits[0, 7] = float("inf")

    plant(monkeypatch, infinite)
    assert trips_of(run(healthy, [PROMPT], "observe", max_new_tokens=3)) == [
        (1, 0, "watch", "partly bad"),
        (1, 0, "clamp", "repaired"),
    ]


def test_the_sampling_settings_of_the_record_are_those_that_were_used(healthy: Path) -> None:
    made = run(healthy, [PROMPT], do_sample=True, max_new_tokens=2).generation
    assert made is not None and (made.options["top_k"], made.options["temperature"]) == (50, 1.0)


def test_the_length_of_the_generation_config_counts_the_prompt(healthy: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(healthy, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"max_length": 17, "eos_token_id": 503}')
    made = run(folder, ["The quick brown"])
    # Said again: transformers 5.0 takes the file's length for that of the new tokens alone, as no other version does.
    assert ids_of(made) == plain(folder, ["The quick brown"], "fp16", do_sample=False, max_length=17)
    assert len(ids_of(made)[0]) == 17 - len(made.prompts[0].rows[0].ids)


def test_only_one_position_of_logits_is_computed_and_a_row_alone_has_no_padding(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen_precision.model.loaded as lanes

    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    load = lanes.Models._load

    def seen(self: Any, dtype: str) -> Any:
        model = load(self, dtype)
        model.register_forward_hook(
            lambda module, args, kwargs, out: shapes.append((dtype, kwargs["input_ids"].shape, out.logits.shape)),
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(lanes.Models, "_load", seen)
    plant(monkeypatch, nan_at(0, row=0))
    made = run(healthy, ["Hello", "The quick brown fox"], max_new_tokens=2)
    widths = [len(row.ids) for row in made.prompts[0].rows]
    assert shapes[0][1] == (2, max(widths)) and shapes[1][:2] == ("bf16", (1, widths[0]))
    assert all(logits[1] == 1 for _, _, logits in shapes)


def test_a_lane_whose_rows_are_all_over_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row fails and goes on in bf16; when the others have ended, the fp16 weights are given back."""
    from qwen_precision.model.loaded import Models as Store

    released, release = [], Store.release

    def giving_back(self: Store, dtype: str) -> None:
        model = self.get(dtype)
        release(self, dtype)
        assert all(weight.is_meta for weight in model.parameters())
        released.append(dtype)

    monkeypatch.setattr(Store, "release", giving_back)
    plant(monkeypatch, nan_at(1, row=1), ["fp32"])
    ladder = settings(recover={"ladder": ["fp32", "bf16"]})
    made = run("demo", [PROMPT, "The quick"], ladder, dtype="fp32", max_new_tokens=60)
    assert made.generation is not None and [row.finish for row in made.generation.rows] == ["eos", "eos"]
    assert released == ["fp32"] and len(ids_of(made)[1]) > len(ids_of(made)[0])


# -- interrupted, refused -----------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_generated() -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    made = run(dtype="fp32", progress=interrupt)
    assert made.stopped == "interrupted" and made.generation is not None
    assert len(made.generation.rows[0].ids) == 3 and made.generation.rows[0].finish == "interrupted"
    assert judge(made).exit_code("fail") == 3


def test_ctrl_c_while_the_second_dtype_is_loaded_keeps_what_was_generated() -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == "loading the weights in bf16":
            raise KeyboardInterrupt

    made = run(progress=interrupt)
    assert made.stopped == "interrupted" and made.generation is not None
    assert judge(made).exit_code("fail") == 1


def test_out_of_memory_keeps_what_was_generated() -> None:
    def full(done: int, total: int, what: str) -> None:
        if done == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    made = run(dtype="fp32", progress=full)
    assert made.stopped is not None and "out of memory" in made.stopped
    assert made.generation is not None and len(made.generation.rows[0].ids) == 2


def test_a_second_dtype_that_does_not_fit_ends_only_the_row_that_needs_it(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen_precision.model.loaded as lanes

    plant(monkeypatch, nan_at(2, row=1))
    clean_free, calls = lanes.free_bytes, []

    def little(device: torch.device) -> int:
        calls.append(device)
        return 0 if len(calls) > 1 else clean_free(device)

    monkeypatch.setattr(lanes, "free_bytes", little)
    made = run(healthy, BATCH[:2], max_new_tokens=5)
    assert made.generation is not None
    assert [(row.finish, len(row.ids)) for row in made.generation.rows] == [("length", 5), ("failed", 2)]
    assert "are free" in made.generation.trips[-1].why


def test_a_missing_tensor_is_refused_not_made_up(healthy: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(healthy, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QprecError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(folder)


def test_a_probe_of_another_checkpoint_or_dtype_is_refused(demo_run: Run, healthy: Path, tmp_path: Path) -> None:
    save(demo_run, tmp_path / "probe.json")
    with pytest.raises(UsageError, match="give a probe of the same one"):
        run(healthy, probe_run=tmp_path / "probe.json")
    save(demo_run.model_copy(update={"dtypes": ["bf16"]}), tmp_path / "probe.json")
    with pytest.raises(UsageError, match="did not probe fp16"):
        run(probe_run=tmp_path / "probe.json")


def test_a_probe_with_little_headroom_is_advice(demo_run: Run, tmp_path: Path) -> None:
    save(demo_run, tmp_path / "probe.json")
    made = run(probe_run=tmp_path / "probe.json")
    advice = [finding for finding in judge(made).findings if finding.kind == "advice"]
    least = room(judge(demo_run).headroom["fp16"][0].headroom)
    assert len(advice) == 1 and "fail" in advice[0].cause.sentence
    assert f"{least} at layer 3" in advice[0].cause.sentence
