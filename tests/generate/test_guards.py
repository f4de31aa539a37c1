"""Each guard: leaves healthy logits alone to the bit, fires on its fault, just below and just above its limit."""

import math
from pathlib import Path

import pytest
import torch

from qwen_precision.errors import UsageError
from qwen_precision.generate.draw import Chooser, sampling_error
from qwen_precision.judge.degenerate import at_the_end, symptoms
from qwen_precision.settings.config import configs_folder
from qwen_precision.settings.guards import GUARDS, Clamp, Degenerate, GuardSettings, Watch, guard_profiles, load_guards
from qwen_precision.watcher.look import Look, bound, clamped, look, may_repair, nearly_uniform

NAN, INF = float("nan"), float("inf")


def chooser(sample: bool = False, watch: bool = True, processors: object = lambda ids, scores: scores) -> Chooser:
    return Chooser(processors, lambda ids, _: torch.zeros(len(ids), dtype=torch.bool), sample, 0, watch)


def draw(raw: torch.Tensor, sample: bool = False, **more: object):
    ids, going = torch.ones(len(raw), 3, dtype=torch.long), torch.ones(len(raw), dtype=torch.bool)
    return chooser(sample, **more)(ids, raw, going, ["fp16"] * len(raw))


# -- watch ------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ([1.0, 2.0, 3.0], None),
        ([1.0, -INF, 3.0], None),  # a masked vocabulary is meant
        ([1.0, -INF, -INF], None),
        ([NAN, NAN, NAN], "wholly bad"),
        ([INF, INF, INF], "wholly bad"),
        ([-INF, -INF, -INF], "wholly bad"),
        ([INF, NAN, -INF], "wholly bad"),
        ([1.0, NAN, 3.0], "partly bad"),
        ([1.0, INF, 3.0], "partly bad"),
        ([2.0, 2.0, 2.0], "flat"),
        ([2.0, 2.0, math.nextafter(2.0, 3.0)], None),
    ],
)
def test_a_row_is_called_what_it_is(row: list[float], kind: str | None) -> None:
    assert look(torch.tensor(row, dtype=torch.float64), Watch()).kind == kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sample", [False, True])
def test_the_cheap_numbers_of_a_step_notice_every_row_that_a_close_look_would(dtype: torch.dtype, sample: bool) -> None:
    torch.manual_seed(0)
    raw = torch.randn(6, 300).to(dtype)
    raw[1], raw[2, 7], raw[3, 7], raw[4], raw[5, :200] = NAN, NAN, INF, -INF, -INF
    rows = draw(raw, sample)[1]
    assert [row.usable for row in rows] == [look(each, Watch()).kind is None for each in raw]
    assert [row.usable for row in rows] == [True, False, False, False, False, True]


def test_a_flat_row_is_noticed_just_within_its_limit_and_not_just_outside() -> None:
    settings = Watch(flat=1e-4)
    for size in (3, 512, 151936):  # of the tokens that are possible, whatever else is masked
        entropy = math.log(size)
        assert nearly_uniform(entropy + 0.99e-4, 1 / size, settings)
        assert not nearly_uniform(entropy + 1.01e-4, 1 / size, settings)


def test_equal_logits_beside_a_masked_vocabulary_are_flat_too() -> None:
    raw = torch.full((1, 512), -INF)
    raw[0, :200] = 1.5
    row = draw(raw)[1][0]
    assert row.margin == 0 and nearly_uniform(row.entropy, row.top1, Watch())
    assert look(raw[0], Watch()).kind == "flat" and look(raw[0], Watch(flat=0)).kind is None


def test_what_the_processors_made_of_a_row_is_told_by_its_sign() -> None:
    raw = torch.randn(1, 64)
    assert draw(raw, processors=lambda ids, scores: scores * 1e39)[1][0].left == INF
    assert draw(raw, processors=lambda ids, scores: torch.full_like(scores, -INF))[1][0].left == -INF


def test_healthy_logits_are_drawn_from_untouched() -> None:
    raw = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    before = raw.clone()

    def in_place(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.mul_(2)  # some processors of transformers write into what they are given

    torch.manual_seed(5)
    ours = draw(raw, sample=True, processors=in_place)[0][:, -1]
    torch.manual_seed(5)
    theirs = torch.multinomial(torch.softmax(before * 2, -1), 1).squeeze(1)
    assert torch.equal(ours, theirs) and torch.equal(raw, before)


def test_a_bad_row_changes_nothing_in_what_the_others_draw() -> None:
    raw = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    bad = raw.clone()
    bad[2] = NAN
    torch.manual_seed(5)
    healthy = draw(raw, sample=True)[0][:, -1]
    torch.manual_seed(5)
    ours = draw(bad, sample=True)[0][:, -1]
    assert torch.equal(healthy[[0, 1, 3]], ours[[0, 1, 3]])


def test_a_row_that_is_over_goes_on_with_padding() -> None:
    ids, going = torch.ones(2, 3, dtype=torch.long), torch.tensor([True, False])
    longer, _ = chooser()(ids, torch.tensor([[0.0, 0.0, 1.0]] * 2), going, ["fp16"] * 2)
    assert longer[:, -1].tolist() == [2, 0]


def test_the_sampling_error_is_torchs_own() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.multinomial(torch.tensor([[NAN, 1.0]]), 1)
    assert sampling_error() == str(caught.value)


# -- float32 logits ------------------------------------------------------------


def test_upcast_logits_survive_a_division_that_overflows_in_fp16() -> None:
    raw = torch.tensor([[30000.0, 100.0]], dtype=torch.float16)

    def cold(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / 0.4

    assert not draw(raw, processors=cold)[1][0].drawable
    assert draw(raw.float(), processors=cold)[1][0].drawable


# -- clamp ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3, 1e-9, 50.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5, 100.0])
def test_a_clamped_row_stays_finite_through_penalty_and_temperature(
    dtype: torch.dtype, temperature: float, penalty: float
) -> None:
    limit = bound(Clamp(), dtype, temperature, penalty)
    row = clamped(torch.tensor([INF, 3.0, NAN, -INF], dtype=dtype), limit)
    penalised = torch.where(row < 0, row * penalty, row / penalty)
    assert torch.isfinite(row).all() and torch.isfinite(penalised / temperature).all()
    assert row.argmax() == 0 and torch.equal(row[1], torch.tensor(3.0, dtype=dtype).clamp(-limit, limit))


def test_the_largest_finite_number_itself_would_not_survive_the_temperature() -> None:
    largest = torch.tensor(torch.finfo(torch.float32).max)
    assert torch.isinf(largest / 0.7)
    # 65504 rounds up to 65536 in bf16; the bound of fp16 is below it in every format.
    assert float(torch.tensor(bound(Clamp(), torch.float16, 1.0, 1.0)).to(torch.bfloat16)) < 65504


def test_the_bound_of_the_settings_holds_where_nothing_would_overflow() -> None:
    assert bound(Clamp(bound=123.0), torch.float32, 1.0, 1.0) == 123.0
    assert bound(Clamp(), torch.float32, 1.0, 1.0) == pytest.approx(1e30)


def test_a_row_is_repaired_up_to_its_share_and_not_beyond() -> None:
    half = Clamp(share=0.5)
    assert may_repair(Look(nan=50, inf=0, negative_inf=0, elements=100, flat=False), half, 0)
    assert not may_repair(Look(nan=50, inf=1, negative_inf=0, elements=100, flat=False), half, 0)


def test_a_row_is_repaired_so_many_times_and_not_once_more() -> None:
    seen = Look(nan=1, inf=0, negative_inf=0, elements=100, flat=False)
    assert may_repair(seen, Clamp(most=3), 2) and not may_repair(seen, Clamp(most=3), 3)


@pytest.mark.parametrize("row", [[NAN] * 3, [INF, NAN, -INF], [2.0] * 3])
def test_a_row_with_nothing_to_go_by_is_never_repaired(row: list[float]) -> None:
    assert not may_repair(look(torch.tensor(row), Watch()), Clamp(share=0.99), 0)


# -- degenerate text ------------------------------------------------------------


def kinds(ids: list[int], top_k: int = 0, **limits: int) -> list[tuple[str, int, int]]:
    return [(each.kind, each.start, each.length) for each in symptoms(ids, Degenerate(**limits), top_k)]


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([5] + [0] * 7, []),
        ([5] + [0] * 8, [("run", 1, 8)]),
        ([5] + [0] * 30 + [6], [("run", 1, 30)]),
        ([1, 2, 3] * 3, []),
        ([9] + [1, 2, 3] * 4, [("cycle", 1, 12)]),
        ([1, 2] * 3 + [1], []),
        ([1, 2] * 4, [("cycle", 0, 8)]),
        (list(range(16)) * 4, [("cycle", 0, 64)]),
        (list(range(17)) * 4, []),
        ([7] * 9 + [1, 2] * 5, [("run", 0, 9), ("cycle", 9, 10)]),
        (list(range(40)), []),
        ([], []),
    ],
)
def test_runs_and_cycles_are_found_just_above_their_limits_and_not_below(
    ids: list[int], found: list[tuple[str, int, int]]
) -> None:
    assert kinds(ids) == found


def test_the_ids_that_top_k_makes_of_a_nan_row_are_recognised_and_a_countdown_of_digits_is_not() -> None:
    assert kinds(list(range(19, -1, -1)), top_k=20) == [("descending", 0, 20)]
    assert kinds([300, *range(19, 12, -1)], top_k=20) == [("descending", 1, 7)]
    assert kinds(list(range(24, 14, -1)), top_k=20) == []  # 9876543210 in a byte-level vocabulary
    assert kinds([4, 3, 2, 1, 0]) == [] and kinds([5, 4, 3, 2, 1, 0]) == [("descending", 0, 6)]


def test_a_symptom_is_noticed_at_the_very_token_that_completes_it() -> None:
    ids = [3, 1, 4] + [0] * 12
    first = next(n for n in range(len(ids)) if at_the_end(ids[: n + 1], Degenerate()))
    assert first == 3 + 8 - 1


# -- profiles ------------------------------------------------------------


def test_every_guard_is_a_row_with_a_switch_and_a_sentence() -> None:
    assert list(GUARDS) == [
        "float32_logits",
        "watch",
        "clamp",
        "epsilon",
        "degenerate",
        "recover",
        "advice",
    ]
    for name, guard in GUARDS.items():
        assert "enabled" in guard.model_fields and (guard.__doc__ or "").strip(), name
        assert getattr(GuardSettings.model_validate({name: {}}), name).enabled


def test_the_default_profile_spells_out_the_defaults() -> None:
    assert load_guards("default") == GuardSettings()
    text = (configs_folder() / "guards" / "default.yaml").read_text()
    for name, guard in GUARDS.items():
        for key in guard.model_fields:
            assert key == "enabled" or f"  {key}:" in text, (name, key)


def test_every_profile_loads() -> None:
    assert guard_profiles() == ["default", "observe", "off", "strict"]
    off, observe, strict = (load_guards(name) for name in ("off", "observe", "strict"))
    assert not any(getattr(off, name).enabled for name in GUARDS if name not in ("float32_logits", "watch"))
    assert not observe.act and strict.recover.on_failure == "stop" and not strict.clamp.enabled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clmap: false", ["unknown guard 'clmap'", "did you mean 'clamp'"]),
        ("clamp: {bnd: 1}", ["unknown setting 'bnd' of clamp", "did you mean 'bound'"]),
        ("clamp: {share: 2}", ["clamp.share", "less than 1"]),
        ("clamp: [1]", ["clamp"]),
        ("watch: false", ["clamp acts on what watch sees"]),
        ("float32_logits: false", ["recover puts rows of two dtypes"]),
        ("recover: {ladder: [fp16, fp8]}", ["recover.ladder", "unknown dtype 'fp8'"]),
        ("recover: {ladder: [fp16, fp16]}", ["twice"]),
        ("recover: {ladder: []}", ["recover.ladder"]),
        ("recover: {on_failure: pray}", ["recover.on_failure", "fallback"]),
        ("degenerate: {run: 1}", ["degenerate.run"]),
        ("- clamp", ["should hold guards"]),
        ("clamp: {bound: .nan}", ["clamp.bound"]),
        ("{", ["not valid YAML"]),
    ],
)
def test_a_wrong_profile_names_the_guard_and_the_setting(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_guards(str(path))
    assert all(word in str(caught.value) for word in [*words, str(path)]), caught.value


@pytest.mark.parametrize("text", ["recover: stop", "recover: [1]", "recover: 7"])
def test_a_flag_over_a_wrong_profile_is_still_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match="recover"):
        load_guards(str(tmp_path / "mine.yaml"), "stop")


def test_the_flag_wins_over_the_profile() -> None:
    assert load_guards("default", "stop").recover.on_failure == "stop"
    assert load_guards("strict", "fallback").recover.on_failure == "fallback"
    with pytest.raises(UsageError, match="recover is off"):
        load_guards("off", "stop")
    assert load_guards("default", "rescale").recover.on_failure == "rescale"
    with pytest.raises(UsageError, match=r"nope.*default, observe, off, strict"):
        load_guards("nope")
