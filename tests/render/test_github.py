"""GitHub annotations: the model in the title, an operation once, ten of a level at most."""

import pytest

from qwen_precision.judge import judge
from qwen_precision.record.run import Run, Site
from qwen_precision.render import FORMATS, View, one
from support.builders import a_model, a_pass, a_run, an_event, healthy_run, many_overflows_run, overflowing_run


def annotations(*runs: Run) -> list[str]:
    return str(FORMATS["github"].render(View(tuple(judge(run) for run in runs)))).splitlines()


@pytest.mark.parametrize(
    ("source", "named"),
    [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/data/models/mine/", "models/mine"), ("a:b,c", "a%3Ab%2Cc")],
)
def test_a_title_names_the_model_whatever_signs_are_in_its_name(source: str, named: str) -> None:
    model = a_model(source=source)
    title = annotations(overflowing_run(model=model))[0].split("::")[1]
    assert title == f"error title=qprec {named}%2C fp16%3A overflow%2C layer 31%2C residual add after mlp"
    nothing, logits = annotations(healthy_run(model=model))
    assert nothing == f"::notice title=qprec {named}::nothing found"
    assert logits.startswith(
        f"::notice title=qprec {named}%2C float32 logits::bf16: upcasting saves at least 0.00405 of loss"
    )


def test_two_models_side_by_side_are_told_apart() -> None:
    lines = annotations(overflowing_run(), overflowing_run(model=a_model(source="Qwen/Qwen3-4B")))
    assert [line.split("%2C")[0] for line in lines if line.startswith("::error")] == [
        "::error title=qprec Qwen/Qwen3-8B",
        "::error title=qprec Qwen/Qwen3-4B",
    ]


def test_an_operation_that_overflows_in_several_layers_is_one_annotation() -> None:
    lines = annotations(many_overflows_run(40))
    assert len(lines) == 2
    assert "layers 0 to 39%2C residual add after mlp::In layer 0: The residual add" in lines[0]


def test_github_is_given_ten_annotations_at_most_and_the_last_counts_the_rest() -> None:
    sites = [Site(layer=0, module=f"model.layers.0.part{n}", op=f"op{n}", call=0) for n in range(14)]
    fp16 = a_pass("fp16", [float("inf")] * 14, [an_event(n) for n in range(14)])
    run = a_run([a_pass("fp32", [70000.0] * 14), fp16], sites=sites, dtypes=["fp16"])
    lines = annotations(run)
    assert len(lines) == 10 and lines[-1].endswith("::5 more findings of this severity, of 5 other operations")
    assert str(FORMATS["github"].render(one(judge(run)))).count("\n") == 10


def test_of_more_than_nine_checkpoints_with_logits_the_rest_is_counted() -> None:
    runs = [healthy_run(model=a_model(source=f"model {number}")) for number in range(11)]
    lines = [line for line in annotations(*runs) if "float32 logits" in line]
    assert len(lines) == 10 and lines[-1].endswith("::float32 logits of 2 more checkpoints: see the job summary")
