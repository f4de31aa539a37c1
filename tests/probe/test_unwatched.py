"""What is written behind torch's back has no origin that can be watched: it fails all the same, where it is met."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from qwen_precision.judge.checks import judge
from qwen_precision.judge.findings import Finding
from qwen_precision.probe.watched import Section, WatchedRun
from qwen_precision.record.run import Event, Reseed, Run
from qwen_precision.settings.prompts import PromptSpec
from qwen_precision.watcher import Reading
from support import plants
from support.builders import a_pass, a_run, an_event
from support.checkpoints import DEMO, make_checkpoint
from support.runs import TEXTS, explained, run_probe

NAN, INF = float("nan"), float("inf")


def write_into(monkeypatch: pytest.MonkeyPatch, owner: Any, value: float, when: Callable[..., bool]) -> None:
    """Let a module's fp16 output be overwritten at its last token as a kernel of one's own would: unseen."""
    plain = owner.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if out.dtype == torch.float16 and when(self):
            out.numpy()[-1, -1, 3] = value
        return out

    monkeypatch.setattr(owner, "forward", forward)


def in_layer(number: int) -> Callable[[Any], bool]:
    """For the MLP of one layer, whichever instance of it runs: they run in order."""
    seen: list[int] = []

    def here(mlp: Any) -> bool:
        seen.append(0)
        return (len(seen) - 1) % 3 == number

    return here


def unwatched(run: Run) -> list[Finding]:
    return [each for each in judge(run).findings if each.kind == "unwatched"]


WAYS: list[dict[str, Any]] = [{}, {"memory": "streamed"}, {"attention": "eager"}, {"reference": False}]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_an_interrupt_before_a_failing_layer_was_looked_at_blames_no_kernel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stopped = WatchedRun.look, []

    def look(self: WatchedRun, section: Section, readings: list[Reading], *more: Any) -> None:
        if section.key[0] == "fp16" and any(not reading.finite for reading in readings):
            stopped.append(section.key)
            raise KeyboardInterrupt
        plain(self, section, readings, *more)

    monkeypatch.setattr(WatchedRun, "look", look)
    run = run_probe(DEMO, **settings)
    assert stopped and run.stopped is not None and not unwatched(run)


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_a_kernel_wrote_unseen_is_named_where_it_is_met(
    value: float, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model")
    write_into(monkeypatch, modeling_qwen3.Qwen3MLP, value, lambda mlp: True)
    run = explained(folder, **{"dtypes": ["fp16"], **settings})
    report = judge(run)
    assert report.verdict["fp16"] == "fail"
    first = report.findings[0]
    assert (first.kind, first.cause.kind, first.place.module) == ("unwatched", "not-watched", "model.layers.0")
    assert first.place.name == "residual add after mlp" and first.place.channel == 3
    assert not first.origin and first.spread.prompts == tuple(text[:9] for text in TEXTS)
    assert first.place.token is not None and first.place.token.position == len(run.prompts[0].rows[0].ids) - 1


def test_each_layer_that_is_written_into_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model")
    write_into(monkeypatch, modeling_qwen3.Qwen3MLP, NAN, lambda mlp: True)
    found = unwatched(explained(folder, dtypes=["fp16"]))
    assert [each.place.layer for each in found] == [0, 1, 2]


def test_one_row_of_a_batch_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model")
    write_into(monkeypatch, modeling_qwen3.Qwen3MLP, NAN, lambda mlp: True)
    [first, *_] = unwatched(explained(folder, [PromptSpec(name="two", batch=["abcdef", "ab"])], dtypes=["fp16"]))
    assert first.place.token is not None and first.place.token.row == 1


def test_logits_that_a_kernel_spoiled_after_the_last_operation_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model")
    head = lambda linear: linear.out_features > 256  # noqa: E731  # the vocabulary is the widest
    write_into(monkeypatch, torch.nn.Linear, NAN, head)
    run = run_probe(folder, TEXTS[:1], dtypes=["fp16"])
    assert judge(run).verdict["fp16"] == "fail"
    assert [each.place.name for each in unwatched(run)] == ["logits"]


def test_beside_an_origin_nothing_is_unwatched(tmp_path: Path) -> None:
    """All that an origin spoils later, in what layer and row ever, is its own."""
    for name, plant in {"a": plants.residual_add, "b": plants.low_score(70_000.0), "c": plants.lm_head_output}.items():
        folder = make_checkpoint(tmp_path / name, edit=plant)
        batch = [PromptSpec(name="three", batch=["aaaaaaaaa", "Zb", "abc"])]
        run = explained(folder, batch, attention="eager", explain=False)
        assert judge(run).verdict["fp16"] != "ok" and not unwatched(run)


def judged(**changes: Any) -> list[Finding]:
    fp32 = a_pass("fp32", [1.0] * 6)
    return unwatched(a_run([fp32, a_pass("fp16", [1.0, 1.0, 1.0, NAN, NAN, NAN], **changes)]))


def test_a_stream_that_was_replaced_had_failed_whatever_comes_after() -> None:
    carried = an_event(3, nan=1, inf=0, clean_inputs=False)
    [found] = judged(events=[carried], reseeded=[Reseed(layer=32, rows=[0], clamped=False)])
    assert found.place.layer == 31


def test_behind_a_clamp_nothing_is_evidence() -> None:
    events = [an_event(2), an_event(5, nan=1, inf=0, clean_inputs=False)]
    assert judged(events=events, reseeded=[Reseed(layer=31, rows=[0], clamped=False)])
    assert not judged(events=events, reseeded=[Reseed(layer=31, rows=[0], clamped=True)])


def test_what_came_near_the_limit_before_is_no_origin() -> None:
    near, bad = an_event(1, inf=0, value=60_000.0), an_event(5, nan=1, inf=0, clean_inputs=False)
    [found] = judged(events=[near, bad])
    assert found.place.module == "lm_head"


@pytest.mark.parametrize("event", [an_event(2, clean_inputs=False), an_event(2, nan=1, clean_inputs=False)])
def test_what_comes_to_nothing_before_the_end_is_no_failure(event: Event) -> None:
    assert not judged(events=[event])


def test_an_infinity_that_is_carried_to_the_end_may_be_meant() -> None:
    """Some models keep tokens out by it; what it is not is an answer of NaN."""
    assert not judged(events=[an_event(5, clean_inputs=False)])


def test_a_stream_that_was_spoiled_behind_a_layer_is_met_there() -> None:
    [found] = judged(events=[], top1=[None], reseeded=[Reseed(layer=32, rows=[0], clamped=False)])
    assert (found.place.layer, found.place.name) == (31, "residual add after mlp")
    assert found.cause.sentence.startswith("What the residual add after mlp gave was finite")


def test_a_bad_weight_is_an_origin() -> None:
    assert not judged(events=[an_event(5, nan=1, inf=0, clean_inputs=False, clean_weights=False)])


def test_a_row_whose_answer_alone_is_missing_fails_where_the_reference_has_one() -> None:
    [found] = judged(top1=[None])
    assert (found.place.module, found.place.name) == ("lm_head", "logits")
    assert not unwatched(a_run([a_pass("fp32", [1.0] * 6, top1=[None]), a_pass("fp16", [1.0] * 6, top1=[None])]))
