"""Pictures carry the message: the limit is named, the failure pointed at, words do not collide, points tell values."""

import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib.image
import pytest

from qwen_precision.judge import judge, sized
from qwen_precision.record.run import Run, Site
from qwen_precision.render import FORMATS, View, one
from qwen_precision.render.canvas import Canvas, as_svg, titled
from qwen_precision.render.headroom import headroom
from qwen_precision.render.pictures import error_growth, heat_map, logits_by_length, pictures, steps
from support.builders import (
    a_continuation,
    a_generation,
    a_model,
    a_pass,
    a_run,
    advised_run,
    an_event,
    generated,
    healthy_run,
    healthy_text_run,
    hostile_run,
    overflowing_run,
)

LIMIT = "fp16's largest number, 65,504"


def deep_run(layers: int, over: bool = True) -> Run:
    """A stream that grows with depth and, if asked to, leaves fp16 in the last layer but two."""
    sites, sizes = [], []
    longest = "operation_whose_name_is_as_long_as_can_be"
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for module, op, call, share in ((path, "add", 1, 1.0), (f"{path}.mlp", "mul", 0, 0.3), (path, longest, 0, 0.1)):
            sites.append(Site(layer=layer, module=module, op=op, call=call))
            sizes.append(share * (80000.0 + layer if over and layer >= layers - 3 else 10.0 + 100.0 * layer))
    bad = [number for number, size in enumerate(sizes) if size > 65504]
    column = [float("inf") if number in bad else size for number, size in enumerate(sizes)]
    error = [1e-4 * (layer + 1) for layer in range(layers)]
    fp16 = a_pass("fp16", column, [an_event(number) for number in bad], layer_error=error)
    return a_run([a_pass("fp32", sizes), fp16], sites=sites, dtypes=["fp16"])


def texts(drawn: Canvas) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in drawn.figure.findobj(Text) if text.get_text()]


def spans(drawn: Canvas) -> list[Any]:
    """Shaded regions: (left, low, right, high), in data's units or shares of the axes."""
    return [patch.get_extents() for patch in drawn.axes[0].patches]


def alone(drawn: Canvas | None, run: Run) -> Canvas:
    assert drawn is not None
    as_svg(titled(drawn, judge(run)))  # places everything
    return drawn


@pytest.mark.parametrize(
    ("draw", "layers"),
    [
        *((heat_map, layers) for layers in (1, 6, 24, 28, 31, 36, 64, 94)),
        (headroom, 1),
        (headroom, 94),
        (error_growth, 94),
    ],
)
def test_labels_never_touch_at_any_depth(draw: Any, layers: int) -> None:
    drawn = alone(draw(judge(deep_run(layers, over=layers > 3))), deep_run(layers))
    for axes in drawn.figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [each.get_window_extent() for each in labels if each.get_text() and each.get_visible()]
            touching = [pair for pair in itertools.pairwise(boxes) if pair[0].overlaps(pair[1])]
            assert not touching
    across = drawn.axes[0].get_xticklabels()
    assert layers == 1 or len(across) > 2


def test_the_margin_of_a_generation_is_inside_its_picture() -> None:
    row = a_continuation([1, 2, 3], ["a"] * 3, margin=[2.0, 14.0, 7.5], entropy=[3.0, 0.1, 0.2])
    drawn = steps(judge(generated(a_generation([row]), ["fp16"])))
    assert drawn is not None
    for axes, most in zip(drawn.axes, (3.0, 14.0), strict=True):
        assert axes.get_ylim()[0] == 0.0 and most <= axes.get_ylim()[1] < 2 * most


def test_steps_without_a_value_are_crosses_above_the_data_and_no_scale_stands_beside_nothing() -> None:
    mixed = a_continuation([1, 2], ["a"] * 2, margin=[2.0, math.nan], entropy=[3.0, math.nan])
    dead = a_continuation([1, 2], ["a"] * 2, margin=[math.nan] * 2, entropy=[math.nan] * 2)
    for row, ticks in ((mixed, True), (dead, False)):
        drawn = steps(judge(generated(a_generation([row]), ["fp16"])))
        assert drawn is not None
        for axes in drawn.axes:
            crosses = axes.collections[0].get_offsets()
            assert all(y == axes.get_ylim()[1] for _, y in crosses) and bool(list(axes.get_yticks())) == ticks


def test_every_line_is_inside_the_picture_also_that_of_a_dtype_that_stays_small() -> None:
    fp32, bf16 = [1e4, 1e5, 1e9, 1e9, 1e9, 1e3], [1.0, 1.0, 2.0, 2.0, 3.0, 1.0]
    drawn = headroom(judge(a_run([a_pass("fp32", fp32), a_pass("bf16", bf16)])), wide=True)
    assert drawn is not None
    low, high = drawn.axes[0].get_ylim()
    assert all(low < y < high for line in drawn.axes[0].lines for y in line.get_ydata())


# -- the hero of the page ------------------------------------------------------------------------------------------


def test_the_first_failure_is_pointed_at_by_layer_operation_number_and_token() -> None:
    drawn = alone(headroom(judge(overflowing_run())), overflowing_run())
    said = texts(drawn)
    assert LIMIT in said
    assert 'overflow: layer 31, residual add after mlp\n74,946 at token 0 ("Hello")' in said
    (limit, failing) = spans(drawn)
    inside = drawn.axes[0].transData.transform([(31, 74945.8), (31, 60000.0), (0, 74945.8)])
    assert limit.contains(*inside[0]) and not limit.contains(*inside[1])
    assert failing.contains(*inside[0]) and not failing.contains(*inside[2])


def test_a_healthy_model_has_its_limit_and_its_least_headroom_and_no_mark() -> None:
    drawn = alone(headroom(judge(healthy_run())), healthy_run())
    said = texts(drawn)
    assert LIMIT in said and "least headroom 156x: layer 31, residual add after mlp" in said
    assert len(spans(drawn)) == 1 and not [text for text in said if text.startswith("overflow")]


def test_a_failure_outside_the_layers_is_told_without_a_mark_on_one() -> None:
    size = [1.5, 20.0, 300.0, 410.0, 420.0, 80000.0]
    run = a_run([a_pass("fp32", size), a_pass("fp16", [*size[:5], float("inf")], [an_event(5)])])
    drawn = alone(headroom(judge(run)), run)
    assert [text for text in texts(drawn) if text.startswith("overflow: logits\n80,000")] and len(spans(drawn)) == 1


@pytest.mark.parametrize("layers", [4, 28, 94])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_words_stay_inside_the_picture_and_cover_neither_each_other_nor_the_failure(layers: int, at: float) -> None:
    failing = round(at * (layers - 1))
    sizes = [90000.0 if layer == failing else 900.0 for layer in range(layers)]
    sites = [Site(layer=layer, module=f"model.layers.{layer}", op="add", call=1) for layer in range(layers)]
    run = a_run([a_pass("fp32", sizes), a_pass("fp16", [*sizes], [an_event(failing)])], sites=sites, dtypes=["fp16"])
    drawn = alone(headroom(judge(run)), run)
    limit, words = (text.get_window_extent() for text in drawn.axes[0].texts)
    assert not limit.overlaps(words)
    assert not words.contains(*drawn.axes[0].transData.transform((failing, 90000.0)))
    whole = drawn.figure.bbox
    for box in (limit, words):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_logarithmic_axes_say_so() -> None:
    report = judge(deep_run(6))
    for draw in (headroom, error_growth, heat_map):
        drawn = draw(report)
        assert drawn is not None and [text for text in texts(drawn) if "(log scale)" in text]


# -- alone ---------------------------------------------------------------------------------------------------------


def test_alone_a_picture_names_model_and_verdicts_on_a_background_of_its_own() -> None:
    report = judge(overflowing_run())
    png = FORMATS["png"].render(one(report))
    assert isinstance(png, bytes)
    pixels = matplotlib.image.imread(io.BytesIO(png))
    assert pixels.shape[2] == 3 or (pixels[:, :, 3] == 1.0).all()
    assert pixels[0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    svg = str(FORMATS["svg"].render(one(report)))
    assert "<!-- Qwen/Qwen3-8B -->" in svg and "<!-- fp32 OK, fp16 FAIL, bf16 OK -->" in svg
    assert re.search(r'<g id="patch_1">\s*<path[^>]*style="fill: #ffffff"', svg)


def test_in_a_page_the_background_is_the_pages() -> None:
    for _, svg in pictures(judge(overflowing_run())):
        assert re.search(r'<g id="patch_1">\s*<path[^>]*(fill: none|opacity: 0)', svg), svg[:2000]


# -- what a point says ---------------------------------------------------------------------------------------------


def told(svg: str) -> list[tuple[float, float, str]]:
    """Left edge, upper edge and title of every spot, and that all lie inside the picture."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    width, height = map(float, str(root.get("viewBox")).split()[2:])
    found = []
    for rect in root.iter(f"{space}rect"):
        title = rect.find(f"{space}title")
        if title is not None:
            left, top = float(rect.get("x", "")), float(rect.get("y", ""))
            assert -1 < left < width and -1 < top < height
            assert left + float(rect.get("width", "")) < width + 1 and top + float(rect.get("height", "")) < height + 1
            found.append((left, top, str(title.text)))
    return found


def test_every_layer_tells_its_value_where_it_is_drawn() -> None:
    spots = told(str(FORMATS["svg"].render(one(judge(deep_run(28))))))
    assert len(spots) == 28
    assert spots[0][2] == "layer 0, residual add after mlp: 10, headroom 6,550x in fp16"
    assert spots[27][2] == "layer 27, residual add after mlp: 80,027, headroom 0.819x in fp16"
    assert [left for left, _, _ in spots] == sorted(left for left, _, _ in spots)
    assert [top for _, top, _ in spots] == sorted((top for _, top, _ in spots), reverse=True)


def test_every_cell_of_the_heat_map_tells_its_value() -> None:
    svg = next(svg for caption, svg in pictures(judge(deep_run(28))) if "by layer and operation" in caption)
    spots = told(svg)
    assert len(spots) == 3 * 28 and spots[28 + 5][2] == "layer 5, SwiGLU product: 153"
    assert spots[28][1] > spots[0][1] and spots[1][0] > spots[0][0]


@pytest.mark.parametrize("text", ["</title><script>alert(1)</script>", "a & b < c", "$\\frac{", "\x1b[31m", "上海🙂"])
def test_a_strangers_text_is_inert_in_every_picture(text: str) -> None:
    report = judge(hostile_run(text).model_copy(update={"model": a_model(source=text)}))
    for svg in [str(FORMATS["svg"].render(one(report))), *(svg for _, svg in pictures(report))]:
        ElementTree.fromstring(svg)
        assert "<script" not in svg and "\x1b" not in svg
    assert FORMATS["png"].render(one(report))


def test_no_picture_has_a_script() -> None:
    for _, svg in pictures(judge(deep_run(28))):
        assert not re.search(r"<script|\son\w+=", svg)


# -- what logits cost ----------------------------------------------------------------------------------------------


def parts(run: Run) -> list[str]:
    """What is drawn of a picture that goes about alone."""
    text = str(FORMATS["svg"].render(one(judge(run))))
    return [part.strip() for part in re.findall(r"<!--(.*?)-->", text, flags=re.DOTALL)]


def test_below_the_picture_of_a_run_stands_what_its_logits_take_at_three_lengths() -> None:
    said = parts(healthy_run())
    for words in ("whole prompt, float32", "whole prompt, fp16", "last position alone, float32", "8,000", "128,000"):
        assert words in said, words
    for size in (8_000 * 151936 * 4, 32_000 * 151936 * 4, 128_000 * 151936 * 4, 151936 * 4):
        assert sized(size) in said
    assert any(words.startswith("bf16: upcasting saves at least 0.00405 of loss error") for words in said)
    assert LIMIT in said  # above it


@pytest.mark.parametrize("run", [healthy_run, advised_run, healthy_text_run])
def test_its_words_touch_neither_each_other_nor_the_lines(run: Any) -> None:
    drawn = alone(logits_by_length(judge(run()), steps(judge(run())) or headroom(judge(run()))), run())
    axes = drawn.axes[-1]
    boxes = [each.get_window_extent() for each in (*axes.texts, axes.get_legend())]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    float32 = axes.lines[0].get_xydata()
    points = [(x, y) for (x0, y0), (x1, y1) in itertools.pairwise(float32) for x, y in ((x0, y0), (x1, y1))]
    ends = axes.transData.transform(points)
    across = [ends[0] + (ends[-1] - ends[0]) * share / 100 for share in range(101)]
    assert not [box for box in boxes if any(box.contains(*point) for point in across)]
    heights = [each.get_position().height for each in drawn.axes]
    assert min(heights) > 0.15


def test_without_logits_a_picture_is_what_it_was() -> None:
    assert "whole prompt, float32" not in parts(overflowing_run()) and len(pictures(judge(overflowing_run()))) == 3


def test_of_several_checkpoints_the_first_that_fails_is_drawn() -> None:
    healthy, failing = judge(healthy_run()), judge(overflowing_run())
    drawn = [FORMATS["svg"].render(View(reports)) for reports in ((healthy, failing), (failing,))]
    assert drawn[0] == drawn[1]
