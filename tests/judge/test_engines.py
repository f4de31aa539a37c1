"""A verdict for each engine: against forwards that do the arithmetic for real, and on records made by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.judge import EngineVerdict, judge, with_engines
from qwen_precision.judge.engines import SITES
from qwen_precision.record import Run, Site, Weight, load
from qwen_precision.settings import ALL, VALUES, Engine, Rule, load_engines
from support.arithmetics import leaves, saturated
from support.builders import (
    HEALTHY,
    a_pass,
    a_run,
    an_event,
    healthy_run,
    healthy_text_run,
    overflowing_run,
    stopped_run,
)
from support.checkpoints import ROOT, make_checkpoint
from support.plants import half_a_sum, lm_head_output, loud_scores, one_channel, one_unit, residual_add, swiglu_product
from support.runs import run_probe

TEXT = "The capital of France is Paris"
READ = {"source": "https://example.org/a.py", "version": "1", "because": "it says so"}


def engine(*values: str, **rule: Any) -> Engine:
    return Engine(name="+".join(values), runs="a test", rules=[Rule(values=list(values), **READ, **rule)])


def told(run: Run, *asked: Engine) -> list[EngineVerdict]:
    return list(with_engines(judge(run), asked).engines)


def verdicts(run: Run) -> dict[str, str]:
    found = with_engines(judge(run), load_engines([ALL])).engines
    return {each.engine.name: each.verdict for each in found}


# -- against the arithmetic itself --------------------------------------------------------------------------------


def loud_stream(size: float) -> Callable[[Any], None]:
    return lambda model: one_channel(model, 3, size)


def product_of(gate: float, up: float) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        one_unit(model, 1, 3, gate, up)

    return plant


def values_of(size: float) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        one_channel(model, 3, 100.0)
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[0, 3] = size / 8.0
        attention.o_proj.weight.zero_()

    return plant


def half_of_half_a_sum(model: Any) -> None:
    half_a_sum(model)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.25)


FAULTS: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "stream of 300": (loud_stream(300.0), {"squares"}),
    "stream of 3,000": (loud_stream(3000.0), {"squares", "mean squares"}),
    "SwiGLU product": (swiglu_product, {"operands", "outputs"}),
    "logits": (lm_head_output, {"products", "sums", "outputs"}),
    "values": (values_of(80_000.0), {"keys and values", "operands", "products", "sums", "outputs"}),
    "residual add": (residual_add, {"residual", "outputs", "squares", "mean squares"}),
    "half a sum": (half_a_sum, {"sums"}),
}
"""Faults, and in which arithmetic each of them leaves the range."""

LOOK_ALIKES: dict[str, Callable[[Any], None]] = {
    "stream of 250": loud_stream(250.0),
    "SwiGLU product of 60,025": product_of(245.0, 245.0),
    "values of 60,000": values_of(60_000.0),
    "a quarter of half a sum": half_of_half_a_sum,
}
KINDS = ("outputs", "products", "residual", "operands", "keys and values", "squares", "mean squares", "sums")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Run, Run]]:
    """A checkpoint with a fault, probed by this machine's products and with sums in fp16; each made once."""
    made: dict[str, tuple[Path, Run, Run]] = {}

    def build(name: str) -> tuple[Path, Run, Run]:
        if name not in made:
            edit = FAULTS[name][0] if name in FAULTS else LOOK_ALIKES[name]
            folder = make_checkpoint(tmp_path_factory.mktemp("engine"), dtype="float32", edit=edit)
            runs = [run_probe(folder, [TEXT], dtypes=["fp16"], arithmetic=how) for how in ("native", "fp16-accumulate")]
            made[name] = folder, runs[0], runs[1]
        return made[name]

    return build


@pytest.mark.arithmetic
@pytest.mark.parametrize("value", KINDS)
@pytest.mark.parametrize("fault", [*FAULTS, *LOOK_ALIKES])
def test_an_engine_fails_where_its_arithmetic_done_for_real_leaves_the_range(
    fault: str, value: str, planted: Callable[[str], tuple[Path, Run, Run]]
) -> None:
    folder, native, accumulated = planted(fault)
    (found,) = told(accumulated if value == "sums" else native, engine(value))
    left, _ = leaves(folder, TEXT, value)
    assert (found.verdict == "fail") == left == (value in FAULTS.get(fault, (None, set()))[1])
    assert found.missing == ()


@pytest.mark.arithmetic
def test_a_mean_square_that_overflows_is_silent_and_still_a_failure(
    planted: Callable[[str], tuple[Path, Run, Run]],
) -> None:
    """1/inf is 0: the norm gives zeros, no NaN anywhere, and another answer."""
    folder, native, _ = planted("stream of 3,000")
    left, logits = leaves(folder, TEXT, "mean squares")
    assert left and logits.isfinite().all() and not logits.any()
    found = {each.engine.name: each for each in told(native, *load_engines(["onnxruntime", "onnxruntime-1.24"]))}
    assert found["onnxruntime"].verdict == "ok" and found["onnxruntime-1.24"].verdict == "fail"


@pytest.mark.arithmetic
def test_a_product_finite_in_fp32_and_too_large_as_an_operand_is_told_apart_by_engine(
    planted: Callable[[str], tuple[Path, Run, Run]],
) -> None:
    """llama.cpp#26044: the SwiGLU product is finite in fp32 and infinite as the fp16 operand of down_proj."""
    _, native, _ = planted("SwiGLU product")
    asked = load_engines(["transformers", "llama.cpp-f16", "llama.cpp"])
    transformers, cast, fp32 = told(native, *asked)
    assert (transformers.verdict, cast.verdict, fp32.verdict) == ("fail", "fail", "ok")
    assert transformers.place is not None and cast.place is not None
    assert (transformers.place.name, transformers.value) == ("SwiGLU product", "outputs")
    assert (cast.place.name, cast.value, cast.place.layer) == ("SwiGLU product", "operands", 1)
    assert cast.rule is not None and cast.rule.avoid[0].option == "GGML_CUDA_CUBLAS_COMPUTE_TYPE=f32"
    assert cast.headroom is not None and cast.headroom < 1


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    ("fault", "verdict"), [("SwiGLU product", "risk"), ("residual add", "risk"), ("half a sum", "ok")]
)
def test_what_saturates_stays_finite_and_is_a_risk(
    fault: str, verdict: str, planted: Callable[[str], tuple[Path, Run, Run]]
) -> None:
    folder, native, _ = planted(fault)
    clipped, logits = saturated(folder, TEXT)
    (found,) = told(native, *load_engines(["ascend"]))
    assert found.verdict == verdict and clipped == (verdict == "risk")
    assert logits.isfinite().all()


@pytest.mark.arithmetic
@pytest.mark.parametrize("fault", FAULTS)
def test_the_row_of_transformers_is_what_the_fp16_pass_measured(
    fault: str, planted: Callable[[str], tuple[Path, Run, Run]]
) -> None:
    _, native, _ = planted(fault)
    (found,) = told(native, *load_engines(["transformers"]))
    first = next((each for each in judge(native).findings if each.severity == "error"), None)
    assert (found.verdict == "fail") == (first is not None)
    if first is not None and found.place is not None:
        assert (found.place.name, found.place.layer) == (first.place.name, first.place.layer)


@pytest.mark.arithmetic
def test_scores_that_only_eager_attention_stores_fail_in_no_engine_that_keeps_them_in_fp32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype="float32", edit=loud_scores(120.0))
    run = run_probe(folder, [TEXT], dtypes=["fp16"], attention="eager")
    transformers, vllm = told(run, *load_engines(["transformers", "vllm"]))
    assert (transformers.verdict, vllm.verdict) == ("fail", "ok")
    assert transformers.place is not None and transformers.place.name == "attention scores"
    left, _ = leaves(folder, TEXT, "outputs but scores")
    assert not left, "in fp16 with sdpa, which keeps them so"


@pytest.mark.transformers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [{}, {"moe": True}, {"family": "llama"}, {"family": "gemma3_text"}], ids=str)
def test_what_every_product_reads_is_known_by_name(shape: dict[str, Any], attention: str, tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", **shape), [TEXT], dtypes=["fp16"], attention=attention)
    (found,) = told(run, engine("operands"))
    assert (found.verdict, found.missing) == ("ok", ())


def test_of_a_family_that_is_not_known_it_is_said_what_the_record_does_not_tell(tmp_path: Path) -> None:
    run = run_probe(make_checkpoint(tmp_path / "model", family="gpt2"), [TEXT], dtypes=["fp16"])
    operands, squares = told(run, engine("operands"), engine("squares"))
    assert (operands.verdict, squares.verdict) == ("incomplete", "incomplete")
    assert "c_attn output" in operands.missing[0] and "one kernel" in squares.missing[0]


# -- on records made by hand ----------------------------------------------------------------------------------------

NORMED = [
    Site(layer=0, module="model.layers.0.input_layernorm", op="pow", call=0),
    Site(layer=0, module="model.layers.0.input_layernorm", op="mean", call=0),
    Site(layer=0, module="model.layers.0.mlp", op="mul", call=0),
    Site(layer=0, module="model.layers.0.mlp.down_proj", op="linear", call=0),
    Site(layer=0, module="model.layers.0", op="add", call=1),
]


def record(magnitudes: list[float | None], **changes: Any) -> Run:
    """Five operations of a layer, with their fp32 magnitudes; the insides of the norm compute in fp32."""
    passes = [a_pass("fp32", magnitudes), a_pass("fp16", magnitudes)]
    return a_run(passes, **{"sites": NORMED, "wider": {"fp16": {0: "fp32", 1: "fp32"}}, **changes})


@pytest.mark.parametrize(
    ("size", "verdict"), [(65520.0, "fail"), (65519.0, "risk"), (65504.0 / 2 + 1, "risk"), (65504.0 / 2, "ok")]
)
@pytest.mark.parametrize(("site", "value"), [(0, "squares"), (1, "mean squares"), (2, "operands"), (3, "products")])
def test_each_rule_has_its_limit_where_fp16_rounds_to_infinity(
    site: int, value: str, size: float, verdict: str
) -> None:
    magnitudes = [size if number == site else 1.0 for number in range(5)]
    (found,) = told(record(magnitudes), engine(value))
    assert found.verdict == verdict and found.magnitude == size
    assert found.place is not None and found.place.site == site


def test_the_first_place_is_told_and_not_the_largest() -> None:
    run = record([1.0, 1.0, 70_000.0, 900_000.0, 900_000.0])
    for found in told(run, engine("outputs"), engine("residual", "operands"), engine("operands", "residual")):
        assert found.place is not None and found.place.name == "SwiGLU product"


def test_where_nothing_fails_the_place_with_the_least_headroom_is_told() -> None:
    (found,) = told(record([1e9, 1e9, 10.0, 300.0, 20.0]), engine("outputs"))
    assert found.place is not None and found.place.name == "down_proj output"
    assert (found.verdict, found.headroom) == ("ok", 65504.0 / 300.0)


def test_the_insides_of_norms_are_no_outputs_even_where_no_16_bit_pass_told_so() -> None:
    magnitudes: list[float | None] = [1e9, 1e8, 1.0, 1.0, 1.0]
    run = a_run([a_pass("fp32", magnitudes)], sites=NORMED)
    assert [each.verdict for each in told(run, engine("outputs"), engine("squares"))] == ["ok", "fail"]


def test_what_saturates_is_a_risk_and_hides_no_other_failure() -> None:
    run = record([1.0, 1.0, 70_000.0, 1.0, 90_000.0])
    everything, stream = told(
        run,
        engine("outputs", saturates=True),
        Engine(
            name="clips its stream",
            runs="a test",
            rules=[Rule(values=["residual"], saturates=True, **READ), Rule(values=["outputs"], **READ)],
        ),
    )
    assert everything.verdict == "risk" and everything.place is not None
    assert stream.verdict == "fail" and stream.place is not None and stream.place.name == "SwiGLU product"
    (alone,) = told(record([1.0, 1.0, 1.0, 1.0, 90_000.0]), stream.engine)
    assert alone.verdict == "risk"


def test_a_rule_for_some_modules_or_models_holds_for_no_other() -> None:
    run = record([1.0, 1.0, 70_000.0, 1.0, 1.0])
    assert run.model.architecture == "Qwen3ForCausalLM"
    rules: list[dict[str, Any]] = [
        {"modules": ["*down_proj"]},
        {"models": ["Gemma3ForCausalLM"]},
        {"modules": ["*mlp"]},
    ]
    found = [told(run, engine("outputs", **rule))[0] for rule in rules]
    assert [each.verdict for each in found] == ["ok", "incomplete", "fail"]
    assert found[1].absent == ("none of its rules is about Qwen3ForCausalLM",)


def test_modules_are_heeded_for_weights_and_for_sums_that_were_measured() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    counts: dict[str, Any] = {"underflow": {}, "inexact": {}, "nan": 0, "inf": 0, "elements": 8, "file": "a"}
    weight = Weight(name=name, parameter=name, abs_max=70_000.0, overflow={"fp16": 1}, **counts)
    sizes = [1.0, 1.0, 1.0, 40_000.0, 1.0]
    passes = [a_pass("fp32", sizes), a_pass("fp16", [1.0, 1.0, 1.0, math.inf, 1.0], [an_event(3)])]
    sums = a_run(passes, sites=NORMED, wider={"fp16": {0: "fp32", 1: "fp32"}})
    sums = sums.model_copy(update={"settings": {**sums.settings, "arithmetic": "fp16-accumulate"}})
    for run, values in ((healthy_run(weights=[weight]), ["weights"]), (sums, ["sums"])):
        here, there = told(run, engine(*values, modules=["*down_proj"]), engine(*values, modules=["*", "!*down_proj"]))
        assert here.verdict == "fail" and there.verdict != "fail"


def test_every_rule_by_which_an_engine_fails_is_kept_also_where_two_are_about_one_operation() -> None:
    """A value is an operand of attention's product, and is in the cache: each option alone leaves the other failing."""
    value = Site(layer=0, module="model.layers.0.self_attn.v_proj", op="linear", call=0)
    attention = Site(layer=0, module="model.layers.0.self_attn", op="scaled_dot_product_attention", call=0)
    run = a_run([a_pass("fp32", [70_000.0, 1.0])], sites=[value, attention])
    (found,) = told(run, *load_engines(["llama.cpp-f16"]))
    assert found.verdict == "fail" and set(found.values) == {"operands", "keys and values"}
    [way] = found.avoid
    options = ["GGML_CUDA_CUBLAS_COMPUTE_TYPE=f32", "--cache-type-k bf16 --cache-type-v bf16"]
    assert [each.option for each in way] == options


def test_one_option_that_avoids_all_is_named_alone() -> None:
    magnitudes: list[float | None] = [1.0, 70_000.0, 70_000.0, 1.0, 1.0]
    sites = [site.model_copy(update={"layer": 1, "module": site.module.replace(".0", ".1")}) for site in NORMED]
    (found,) = told(record(magnitudes, sites=sites), *load_engines(["onnxruntime-1.24"]))
    assert len(found.rules) == 2
    assert [[each.option for each in way] for way in found.avoid] == [
        ["--precision int4 --extra_options use_cuda_bf16=true"]
    ]


def test_a_rule_that_is_about_no_operation_of_the_run_is_said_and_is_no_ok() -> None:
    run = record([1.0, 1.0, 1.0, 1.0, 1.0])
    elsewhere, none, unknown = told(
        run,
        engine("mean squares", "outputs", modules=["*ln_1", "*ln_2", "*ln_f"]),
        engine("products", modules=["*c_attn"]),
        engine("keys and values"),
    )
    assert elsewhere.absent[0] == "mean squares in *ln_1, *ln_2 and 1 more: no operation of this kind in the run"
    assert none.absent == ("products in *c_attn: no operation of this kind in the run",)
    assert unknown.absent == () and unknown.missing == ("keys and values: none is known by name",)
    assert {each.verdict for each in (elsewhere, none, unknown)} == {"incomplete"}


def test_a_model_that_has_no_operation_of_a_kind_is_told_from_a_record_that_does_not_name_them() -> None:
    run = a_run([a_pass("fp32", [1.0])], sites=[NORMED[0]])
    products, squares = told(run, engine("products"), engine("mean squares"))
    assert products.absent == ("products: no operation of this kind in the run",) and not products.missing
    assert squares.missing == ("mean squares: none is known by name",) and not squares.absent


@pytest.mark.parametrize("name", ["lm_head", "transformer.h.0.attn.c_attn", "backbone.layers.0.mixer.in_proj"])
def test_products_of_weights_are_judged_whatever_a_family_calls_them_and_attentions_own_are_not(name: str) -> None:
    product = Site(layer=0, module=name, op="linear", call=0)
    scores = Site(layer=0, module="model.layers.0.self_attn", op="matmul", call=0)
    engines = load_engines(["llama.cpp-f16-sums"])
    failing = a_run([a_pass("fp32", [70_000.0, 1.0])], sites=[product, scores])
    fine = a_run([a_pass("fp32", [1.0, 70_000.0])], sites=[product, scores])
    assert [told(run, *engines)[0].verdict == "fail" for run in (failing, fine)] == [True, False]


def test_an_engine_through_which_nothing_passes_in_fp16_is_ok() -> None:
    (found,) = told(overflowing_run(), Engine(name="fp32", runs="a test", rules=[]))
    assert (found.verdict, found.place) == ("ok", None)


def test_a_weight_that_fp16_cannot_hold_fails_before_any_operation() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    counts: dict[str, Any] = {"underflow": {}, "inexact": {}, "nan": 0, "inf": 0, "elements": 8, "file": "a"}
    weight = Weight(name=name, parameter=name, abs_max=70_000.0, overflow={"fp16": 1}, **counts)
    (found,) = told(healthy_run(weights=[weight]), engine("weights", "outputs"))
    assert found.verdict == "fail" and found.place is not None and found.place.name == "down_proj weight"


def test_an_overflow_that_did_no_harm_in_the_fp16_pass_is_a_risk() -> None:
    sizes = [1.5, 20.0, 300.0, 40000.0, 74945.8, 31.0]
    fp16 = a_pass("fp16", [*sizes[:4], math.inf, 31.0], [an_event(4, harmless=True)])
    (found,) = told(a_run([a_pass("fp32", sizes), fp16]), engine("outputs"))
    assert found.verdict == "risk"


def test_what_fp32_cannot_compute_either_fails_in_every_engine() -> None:
    dead = [*HEALTHY[:4], math.inf, math.nan]
    run = a_run([a_pass("fp32", dead, [an_event(4)]), a_pass("fp16", dead, [an_event(4)])])
    assert set(verdicts(run).values()) == {"fail"}


LACKING: dict[str, tuple[Callable[[], Run], str, str]] = {
    "a generation": (healthy_text_run, "outputs", "probe the checkpoint"),
    "no reference": (lambda: a_run([a_pass("fp16", HEALTHY)], reference=False), "outputs", "magnitudes in fp32"),
    "stopped": (stopped_run, "residual", "not reached (interrupted)"),
    "native sums": (healthy_run, "sums", "--arithmetic fp16-accumulate"),
    "no insides of norms": (healthy_run, "squares", "squares: none is known by name"),
    "bf16 alone": (lambda: healthy_run(weight_totals=[]), "weights", "probe with --dtype fp16"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_a_record_lacks_is_said_and_is_no_ok(name: str) -> None:
    run, value, said = LACKING[name]
    (found,) = told(run(), engine(value))
    assert found.verdict == "incomplete" and any(said in each for each in found.missing)


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_record_of_any_schema_is_judged(schema: int) -> None:
    run = load(ROOT / "tests" / "fixtures" / f"run-v{schema}.json")
    found = verdicts(run)
    expected = "fail" if judge(run).verdict.get("fp16") == "fail" else "incomplete"
    assert found["transformers"] in (expected, "ok")


def test_all_engines_are_told_unasked_where_fp16_fails_or_is_at_risk_and_else_none() -> None:
    near = [*HEALTHY[:4], 61_000.0, 31.0]
    risky = a_run([a_pass("fp32", near), a_pass("fp16", near)])
    count = len(load_engines([ALL]))
    runs = overflowing_run(), risky, healthy_run(), healthy_text_run()
    assert [len(with_engines(judge(run)).engines) for run in runs] == [count, count, 0, 0]


def test_every_kind_of_value_of_the_settings_is_one_that_the_judgement_knows() -> None:
    assert {*SITES, "weights"} == set(VALUES) and set(KINDS) <= set(VALUES)
