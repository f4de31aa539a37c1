"""A worker of a serving engine is watched from start to stop: what its record says, without any engine installed."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.pretend import BAD, Engine, Worker
from qwen_precision.errors import QprecError
from qwen_precision.judge import Finding, judge, with_fresh_engines
from qwen_precision.probe import Collector
from qwen_precision.qwen3 import name_of
from qwen_precision.record import Run, load, save
from qwen_precision.render import FORMATS
from qwen_precision.report import view
from qwen_precision.vllm import extension, live
from qwen_precision.vllm.batch import FlatInspector
from qwen_precision.vllm.names import PROCESS
from qwen_precision.watcher import Watcher, aten


def watched(*forwards: dict[str, tuple[int, list[int]]], slots: dict[str, int] | None = None) -> Run:
    """The record of some forwards."""
    engine = Engine()
    worker = Worker(engine)
    worker.qprec_start()
    for requests in forwards:
        engine.run(requests, slots)
    return Run.model_validate(worker.qprec_stop())


def origins(run: Run) -> list[tuple[str, str, Any]]:
    """Of every finding that is an origin: module, prompt and token."""
    return [(each.place.module, str(each.place.prompt), at(each)) for each in judge(run).findings if each.origin]


def at(finding: Finding) -> tuple[int, int, int | None] | None:
    token = finding.place.token
    return (token.row, token.position, token.id) if token is not None else None


def test_the_origin_is_named_with_the_request_and_the_token_that_made_it() -> None:
    run = watched({"a": (0, [1, 2]), "b": (0, [3, 4, BAD])})
    assert origins(run) == [("layers.0.down_proj", "batch 0 of 2 requests", (1, 2, BAD))]
    assert [row.ids for row in run.prompts[0].rows] == [[1, 2], [3, 4, BAD]]


def test_each_request_that_overflows_is_looked_at_whatever_stands_before_it() -> None:
    run = watched({"a": (0, [BAD]), "b": (0, [3, BAD])})
    began = [each for each in run.passes[0].events if each.inf and each.clean_inputs]
    assert [(each.row, each.position) for each in began] == [(0, 0), (1, 1)]


def test_a_token_that_is_decoded_has_its_place_in_the_whole_request() -> None:
    run = watched({"a": (0, [1, 2])}, {"a": (2, [1, 2, BAD])})
    assert origins(run) == [("layers.0.down_proj", "request a", (0, 2, BAD))]
    assert run.prompts[0].rows[0].ids == [1, 2, BAD]


def test_what_a_request_left_in_its_own_cache_begins_nothing_when_it_is_read_again() -> None:
    run = watched({"a": (0, [BAD, 1])}, {"a": (2, [BAD, 1, 2]), "b": (0, [1])})
    assert origins(run) == [("layers.0.down_proj", "request a", (0, 0, BAD))]


def test_attention_that_reads_a_cache_of_somebody_else_is_where_a_clean_request_goes_bad() -> None:
    run = watched({"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots={"a": 0, "b": 0})
    assert ("layers.0.attn", "request b", (0, 0, 1)) in origins(run)


def test_a_request_of_clean_tokens_is_clean_and_every_layer_has_its_own_readings() -> None:
    run = watched({"a": (0, [1, 2, 3])})
    assert judge(run).verdict == {"fp16": "ok"} and not run.reference
    relus = [(each.layer, each.module) for each in run.sites if each.op == "relu"]
    assert relus == [(0, "layers.0.rotary_emb"), (1, "layers.1.rotary_emb")]


def test_the_residual_add_inside_a_norm_has_a_name_of_its_own() -> None:
    run = watched({"a": (0, [1])})
    names = [name_of(each.module, each.op, each.call) for each in run.sites if each.module.endswith("layernorm")]
    assert "input_layernorm residual add" in names and "input_layernorm residual stream" in names
    assert "input_layernorm mean square plus eps" in names


def test_answers_are_the_same_bit_for_bit_and_nothing_is_left_when_it_has_stopped() -> None:
    plain, engine = Engine(), Engine()
    requests = {"a": (0, [1, 2]), "b": (0, [BAD])}
    worker = Worker(engine)
    worker.qprec_start()
    answers = engine.run(requests)
    worker.qprec_stop()
    assert torch.equal(answers.nan_to_num(), plain.run(requests).nan_to_num())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in engine.modules())


def test_every_rank_saves_a_record_of_its_own(tmp_path: Path) -> None:
    for rank, name in enumerate(["run.json", "run.rank1.json"]):
        engine = Engine()
        worker = Worker(engine, rank=rank)
        worker.qprec_start()
        engine.run({"a": (0, [1])})
        worker.qprec_stop(str(tmp_path / "run.json"))
        [engine_choice, *_] = load(tmp_path / name).choices
        assert f"rank {rank} of 2" in engine_choice.reason


def test_every_data_parallel_copy_saves_records_of_its_own(tmp_path: Path) -> None:
    named = {(1, 0): "run.dp1.json", (1, 1): "run.dp1.rank1.json"}
    for (copy, rank), name in named.items():
        worker = Worker(Engine(), rank=rank)
        worker.vllm_config.parallel_config.data_parallel_index = copy
        worker.vllm_config.parallel_config.data_parallel_rank = 0  # what vLLM says of a dense model
        stopped(worker, tmp_path / "run.json")
        assert [each.value for each in load(tmp_path / name).choices if each.what == "data parallel"] == ["rank 1"]
    assert {path.name for path in tmp_path.iterdir()} == set(named.values())


def test_a_record_of_another_engine_that_still_runs_is_left_alone_and_one_of_who_is_gone_is_replaced(
    tmp_path: Path,
) -> None:
    run, path = watched({"a": (0, [1])}), tmp_path / "run.json"
    for process, name in ((os.getppid(), f"run.pid{os.getpid()}.json"), (2**22 + 1, "run.json")):
        save(run.model_copy(update={"environment": {**run.environment, PROCESS: str(process)}}), path)
        stopped(Worker(Engine()), path)
        assert load(tmp_path / name).environment[PROCESS] == str(os.getpid())
        assert load(path).environment[PROCESS] == (str(process) if name != "run.json" else str(os.getpid()))


def stopped(worker: Worker, path: Path) -> None:
    """A watch of one request, saved."""
    worker.qprec_start()
    worker.model_runner.get_model().run({"a": (0, [1])})
    worker.qprec_stop(str(path))


@pytest.mark.parametrize("bad", ["nowhere/run.json", "."])
def test_a_record_that_cannot_be_written_there_is_not_lost(bad: str, tmp_path: Path) -> None:
    worker = Worker(Engine())
    worker.qprec_start()
    engine = worker.model_runner.get_model()
    engine.run({"a": (0, [1])})
    with pytest.raises(QprecError, match="qprec_stop") as refused:
        worker.qprec_stop(str(tmp_path / bad))
    assert "\n" not in str(refused.value)
    engine.run({"b": (0, [BAD])})
    worker.qprec_stop(str(tmp_path / "run.json"))
    assert [each.name for each in load(tmp_path / "run.json").prompts] == ["request a", "request b"]


def test_a_disk_that_is_full_only_once_it_is_written_loses_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Engine())
    worker.qprec_start()
    worker.model_runner.get_model().run({"a": (0, [1])})
    with monkeypatch.context() as patch:
        patch.setattr(extension, "save", raises(QprecError("no space left")))
        with pytest.raises(QprecError, match="no space left"):
            worker.qprec_stop(str(tmp_path / "run.json"))
    assert Run.model_validate(worker.qprec_stop()).prompts[0].name == "request a"


# -- a fault of ours ------------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Any:
    def fault(*_: Any, **__: Any) -> Any:
        raise error

    return fault


FAULTS = {
    "the batch cannot be told": (live, "batch_of"),
    "no inspector can be made": (live, "FlatInspector"),
    "a module's name cannot be entered": (Watcher, "enter_module"),
    "a module's name cannot be left": (Watcher, "leave_module"),
    "an output cannot be read": (Watcher, "_read"),
    "what a kernel wrote cannot be told": (aten.Rule, "written"),
    "an operation cannot be looked at closely": (FlatInspector, "__call__"),
    "the readings cannot be brought": (Watcher, "take"),
    "the readings cannot be kept": (Collector, "add"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_ends_the_watching_keeps_what_there_was_and_changes_no_answer(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounds: list[dict[str, tuple[int, list[int]]]] = [{"a": (0, [1, 2])}, {"b": (0, [BAD])}, {"c": (0, [5])}]
    plain, engine = Engine(), Engine()
    worker = Worker(engine)
    worker.qprec_start()
    answers = [engine.run(rounds[0])]
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault], raises(RuntimeError("a bug of ours")))
        answers.append(engine.run(rounds[1]))
    answers.append(engine.run(rounds[2]))  # sound again, and off all the same
    run = Run.model_validate(worker.qprec_stop())
    for answer, requests in zip(answers, rounds, strict=True):
        assert torch.equal(answer.nan_to_num(), plain.run(requests).nan_to_num())
    assert run.stopped == "watching stopped after step 1: RuntimeError: a bug of ours"
    assert len(caplog.records) == 1 and run.stopped in caplog.text
    assert [each.name for each in run.prompts] == ["request a"] and len(run.passes) == 1
    assert judge(run).verdict == {"fp16": "incomplete"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in engine.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_an_operation_that_writes_runs_once_whatever_befalls_us_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    worker = Worker(engine)
    worker.qprec_start()
    sound = Watcher._read

    def fails_behind_attention(self: Any, rule: Any, *rest: Any) -> None:
        sound(self, rule, *rest)
        if "attention" in rule.op:
            raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Watcher, "_read", fails_behind_attention)
    engine.run({"a": (0, [1, 2, 3])})
    assert {len(kept) for kept in engine.cache.values()} == {3}, "else its cache held every token twice"
    with pytest.raises(QprecError, match="a bug of ours"):
        worker.qprec_stop()


def test_where_it_is_shown_a_record_says_that_the_watching_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(Engine())
    worker.qprec_start()
    engine = worker.model_runner.get_model()
    engine.run({"a": (0, [1])})
    monkeypatch.setattr(live, "batch_of", raises(RuntimeError("a bug")))
    engine.run({"b": (0, [1])})
    worker.qprec_stop(str(tmp_path / "run.json"))
    shown = view([tmp_path / "run.json"], "never", None, False, [])
    said = "watching stopped after step 1: RuntimeError: a bug"
    assert all(said in " ".join(FORMATS[name].render(shown).split()) for name in ("screen", "table", "markdown"))


def test_where_it_stopped_at_once_that_is_what_the_stop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Engine())
    worker.qprec_start()
    monkeypatch.setattr(live, "batch_of", raises(RuntimeError("a bug")))
    worker.model_runner.get_model().run({"a": (0, [1])})
    with pytest.raises(QprecError, match="watching stopped after step 0: RuntimeError: a bug, and no request ran"):
        worker.qprec_stop()


def test_a_runner_that_lacks_what_another_vllm_has_is_refused_in_a_sentence_and_no_hook_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    monkeypatch.setattr(live, "attached", raises(AttributeError("no such thing")))
    with pytest.raises(QprecError, match=r"is not as 0\.32 is"):
        Worker(engine).qprec_start()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in engine.modules())


def test_an_error_of_the_engine_is_its_own_and_the_watch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    worker = Worker(engine)
    worker.qprec_start()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "slots", [0])
        engine.cache[0, 0] = [torch.zeros(3)]  # of another shape: its attention raises
        with pytest.raises(RuntimeError, match="stack expects"):
            engine.run({"a": (0, [1])})
    engine.cache.clear()
    engine.run({"b": (0, [BAD])})
    run = Run.model_validate(worker.qprec_stop())
    assert run.stopped is None and "request b" in [each.name for each in run.prompts]


def test_ctrl_c_passes_and_the_forward_behind_it_is_watched_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    worker = Worker(engine)
    worker.qprec_start()
    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "_read", raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.run({"a": (0, [1])})
    engine.run({"b": (0, [3, BAD])})
    run = Run.model_validate(worker.qprec_stop())
    assert origins(run) == [("layers.0.down_proj", "request b", (0, 1, BAD))] and run.stopped is None


def test_a_compiled_model_is_refused_in_a_sentence() -> None:
    with pytest.raises(QprecError, match="enforce_eager=True"):
        Worker(Engine(), mode=3).qprec_start()


def test_a_runner_that_is_not_known_is_refused() -> None:
    engine = Engine()
    engine.runner = SimpleNamespace(get_model=lambda: engine)
    with pytest.raises(QprecError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        Worker(engine).qprec_start()


def test_start_and_stop_come_in_turn_and_something_runs_between() -> None:
    worker = Worker(Engine())
    with pytest.raises(QprecError, match="call qprec_start first"):
        worker.qprec_stop()
    worker.qprec_start()
    with pytest.raises(QprecError, match="watched already"):
        worker.qprec_start()
    with pytest.raises(QprecError, match="no request ran"):
        worker.qprec_stop()


# -- a cache that holds what another request left there ------------------------------------------------------------

HELD = {"a": 0, "b": 0, "c": 0}


def causes(run: Run) -> list[tuple[str, str | None]]:
    """Of every origin: the request, and its cause."""
    return [(str(each.place.prompt), each.cause.kind) for each in judge(run).findings if each.origin]


def test_a_poisoned_cache_is_told_by_the_same_request_in_a_fresh_engine() -> None:
    poisoned = watched({"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots=HELD)
    told = with_fresh_engines([poisoned, watched({"x": (0, [1, 2, 3])})])
    assert ("request b", "poisoned-cache") in causes(told[0]) and ("request a", "not-told") in causes(told[0])
    [found] = [each for each in judge(told[0]).findings if each.cause.kind == "poisoned-cache"]
    assert "'request a' had failed in this engine before" in " ".join(found.cause.evidence)
    assert "VLLM_RAISE_ON_LOGIT_NANS=1" in found.cause.advice and "No guard on rows" in found.cause.advice
    assert judge(told[1]).findings == []


def test_a_report_of_both_records_tells_it_redacted_too(tmp_path: Path) -> None:
    save(watched({"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots=HELD), tmp_path / "run.json")
    save(watched({"x": (0, [1, 2])}), tmp_path / "fresh.json")
    for redact in (False, True):
        shown = view([tmp_path / "run.json", tmp_path / "fresh.json"], "never", None, redact, [])
        assert "poisoned-cache" in [each.cause.kind for each in shown.reports[0].findings]
        assert all(each.run.redacted is redact for each in shown.reports)


def test_it_is_told_by_the_same_request_in_the_same_engine_before_the_cache_was_poisoned() -> None:
    run = watched({"c": (0, [1, 2])}, {"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots={**HELD, "c": 1})
    assert ("request b", "poisoned-cache") in causes(run)


@pytest.mark.parametrize(
    "fresh",
    [
        [{"x": (0, [3, 2])}],  # another request
        [{"x": (0, [BAD])}, {"y": (0, [1, 2])}],  # it fails there too: nothing says that that engine is a fresh one
    ],
)
def test_without_the_same_request_clean_somewhere_it_stays_untold_and_the_way_to_tell_is_named(fresh: Any) -> None:
    poisoned = watched({"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots=HELD)
    run = with_fresh_engines([poisoned, watched(*fresh, slots={"x": 0, "y": 0})])[0]
    [found] = [each for each in judge(run).findings if each.place.prompt == "request b" and each.origin]
    assert found.cause.kind == "not-told" and "in a fresh engine" in found.cause.advice


def test_a_healthy_engine_and_one_in_which_only_the_request_itself_is_at_fault_have_no_poisoned_cache() -> None:
    healthy = watched({"a": (0, [1])}, {"b": (0, [1, 2])}, slots=HELD)
    own = watched({"a": (0, [1])}, {"b": (0, [BAD, 2])})
    assert causes(healthy) == [] and ("request b", "poisoned-cache") not in causes(own)


def test_records_of_the_workers_of_one_engine_are_no_fresh_engines_to_each_other() -> None:
    poisoned = watched({"a": (0, [BAD])}, {"b": (0, [1, 2])}, slots=HELD)
    other = watched({"b": (0, [1, 2])})
    reason = "watched in its worker, rank 1 of 2"
    other = other.model_copy(update={"choices": [each.model_copy(update={"reason": reason}) for each in other.choices]})
    assert with_fresh_engines([poisoned, other])[0] is poisoned


def test_what_poisoned_it_may_have_run_before_anybody_watched() -> None:
    engine = Engine()
    engine.run({"a": (0, [BAD])}, HELD)
    worker = Worker(engine)
    worker.qprec_start()
    engine.run({"b": (0, [1, 2])}, HELD)
    run = Run.model_validate(worker.qprec_stop())
    [(_, kind), *_] = causes(run)
    assert kind == "not-told" and "fresh engine" not in judge(run).findings[0].cause.advice, "nobody is suspected"
    told = with_fresh_engines([run, watched({"x": (0, [1, 2])})])[0]
    assert ("request b", "poisoned-cache") in causes(told)


def test_an_operation_that_reads_no_cache_is_never_its_victim() -> None:
    run, other = watched({"a": (0, [BAD])}), watched({"x": (0, [1])})
    [prompt] = other.prompts
    same = prompt.model_copy(update={"rows": run.prompts[0].rows})  # as if the same tokens had been clean there
    told = with_fresh_engines([run, other.model_copy(update={"prompts": [same]})])[0]
    assert causes(told)[0] == ("request a", "not-told") and told is run
