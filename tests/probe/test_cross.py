"""Every plant in every shape, stored in every dtype, resident and streamed, with both attentions: the same findings."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Report
from support.checkpoints import RATIO, SHAPES, edit_json, make_checkpoint
from support.plants import (
    SIZE,
    down_proj_output,
    expert_output_too_large,
    expert_product,
    gate_too_large,
    ids_of,
    lm_head_output,
    loud_token,
    o_proj_and_product,
    one_channel,
    one_unit,
    product_and_sum,
    query_norm_too_large,
    residual_add,
    swiglu_product,
    two_tokens,
)
from support.runs import run_probe

pytestmark = pytest.mark.arithmetic

Plant = Callable[[Any], None]
Place = tuple[int | None, str, str | None, bool]
"""Layer, operation, text of the token that is named (None for any), whether it is predicted."""

SPARSE: dict[str, dict[str, Any]] = {
    "moe": {"moe": True},
    "moe, another head ratio": {"moe": True, **RATIO},
    "moe, all experts": {"moe": True, "num_experts_per_tok": 8},
    "moe, in a loop": {"moe": True, "loop": True},
}


def nothing(model: Any) -> None:
    """A healthy model."""


def just_below(model: Any) -> None:
    """The SwiGLU product reaches 60,000: risk, and no failure."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 245.0, 245.0)


def first_and_last_layer(model: Any) -> None:
    """Two faults that have nothing to do with each other."""
    one_channel(model, 3, 100.0)
    for index in (1, len(model.model.layers) - 1):
        if hasattr(model.model.layers[index].mlp, "gate_proj"):
            one_unit(model, index, 3, 400.0, 400.0)


def expert_and_token(model: Any) -> None:
    """One expert's down projection, driven by "Z" alone."""
    expert_output_too_large(model)
    model.model.embed_tokens.weight[:, 3] = 0.5
    model.model.embed_tokens.weight[ids_of("Z")[0], 3] = SIZE * 100


@dataclass(frozen=True)
class Case:
    plant: Plant
    places: list[Place]
    shapes: dict[str, dict[str, Any]]
    only: tuple[str, ...] = ()
    """Shapes it can be planted in, where not all."""


DENSE = [
    Case(nothing, [], SHAPES),
    Case(just_below, [], SHAPES),
    Case(gate_too_large, [(1, "gate_proj output", None, False)], SHAPES),
    Case(query_norm_too_large, [(1, "q_norm output", None, False)], SHAPES),
    Case(swiglu_product, [(1, "SwiGLU product", None, False)], SHAPES),
    Case(down_proj_output, [(1, "down_proj output", None, False)], SHAPES),
    Case(residual_add, [(1, "residual add after mlp", None, False)], SHAPES),
    Case(lm_head_output, [(None, "logits", None, False)], SHAPES),
    Case(loud_token("Z", 40_000.0), [(1, "residual add after mlp", "Z", False)], SHAPES),
    Case(two_tokens, [(1, "SwiGLU product", "Y", False), (1, "down_proj output", "Z", False)], SHAPES),
    Case(product_and_sum, [(1, "down_proj output", "Y", False), (1, "residual add after mlp", "Z", False)], SHAPES),
    Case(o_proj_and_product, [(1, "o_proj output", None, False), (1, "SwiGLU product", None, True)], SHAPES),
    Case(
        first_and_last_layer,
        [(1, "SwiGLU product", None, False), (-1, "SwiGLU product", None, False)],
        SHAPES,
        ("dense", "another head ratio"),
    ),
    Case(nothing, [], SPARSE),
    Case(expert_product, [(1, "SwiGLU product of the experts", None, False)], SPARSE),
    Case(expert_output_too_large, [(1, "down projection of the experts", None, False)], SPARSE),
    Case(expert_and_token, [(1, "down projection of the experts", "Z", False)], SPARSE),
]
CASES = {
    f"{getattr(case.plant, '__name__', 'plant')}-{shape}": (case, shape)
    for case in DENSE
    for shape in (case.only or case.shapes)
}
PROMPTS = "- {name: row, text: abYcZd}\n- {name: batch, batch: [abcYdeZf, bZY]}\n"


def places(report: Report) -> list[Place]:
    found = [each for each in report.findings if each.dtype == "fp16" and each.severity == "error"]
    return [
        (each.place.layer, each.place.name, each.place.token.text if each.place.token else None, each.predicted)
        for each in found
    ]


WAYS = list(product(("bfloat16", "float16", "float32"), (("resident", "sdpa"), ("streamed", "eager")))) + list(
    product(("float32", "bfloat16", "float16"), (("streamed", "sdpa"), ("resident", "eager")))
)
"""All ways to store and run a checkpoint; each plant takes turns, so that in its shapes it sees most of them."""


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_a_plant_gives_as_many_findings_as_places_that_would_have_to_change(number: int, tmp_path: Path) -> None:
    case, shape = list(CASES.values())[number]
    for turn in (5 * number, 5 * number + 7):
        stored, (memory, attention) = WAYS[turn % len(WAYS)]
        check(case, shape, stored, memory, attention, tmp_path / str(turn))


def check(case: Case, shape: str, stored: str, memory: str, attention: str, tmp_path: Path) -> None:
    tmp_path.mkdir()
    options = dict(case.shapes[shape])
    loop = options.pop("loop", False)
    folder = make_checkpoint(tmp_path / "model", edit=case.plant, dtype=stored, **options)
    if loop:
        edit_json(folder / "config.json", experts_implementation="eager")
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    last = case.shapes[shape].get("num_hidden_layers", 3) - 1
    wanted = [(last if layer == -1 else layer, what, token, ahead) for layer, what, token, ahead in case.places]
    run = run_probe(folder, file=str(tmp_path / "prompts.yaml"), attention=attention, memory=memory)
    report = judge(run)
    found = places(report)
    unnamed = [
        (layer, what, token if mine[2] else None, ahead)
        for (layer, what, token, ahead), mine in zip(found, wanted, strict=False)
    ]
    way = stored, memory, attention, found
    assert unnamed == wanted and len(found) == len(wanted), way
    if case.plant is nothing:
        assert report.verdict["fp16"] == "ok", way
    assert report.verdict["bf16"] == report.verdict["fp32"] == "ok", way
