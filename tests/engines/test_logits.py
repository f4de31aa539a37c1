"""The logits processor in both of vLLM's interfaces: pretended ones everywhere, vLLM's own by ``make engines``."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_precision.judge import judge
from qwen_precision.record import load, save
from qwen_precision.settings import read_prompts
from qwen_precision.vllm.names import PROCESS
from support.checkpoints import DEMO, ROOT

NAME = "qwen_precision.vllm.logits:WatchLogits"
FIRST, SECOND = "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"
NAN, INF = float("nan"), float("inf")


class First(ABC):
    """As vLLM 0.32's, in short."""

    @abstractmethod
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: Any) -> Any: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: Any) -> None: ...


class Second(ABC):
    """As vLLM 0.32's, in short."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    @abstractmethod
    def apply(self, logits: Any, ctx: Any) -> Any: ...


def pretended(monkeypatch: pytest.MonkeyPatch, first: bool = True, second: bool = True) -> None:
    """The modules that the processor imports of vLLM."""
    places = {**({FIRST: First} if first else {}), **({SECOND: Second} if second else {})}
    for place, base in places.items():
        parts = place.split(".")
        for number in range(1, len(parts) + 1):
            name = ".".join(parts[:number])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        setattr(sys.modules[place], "LogitsProcessor", base)  # noqa: B010  # a module has no such attribute to mypy


REAL = pytest.param("vLLM's own", marks=pytest.mark.engine)


@pytest.fixture(params=["pretended", REAL])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The class, on vLLM's base classes or on pretended ones."""
    if request.param == "pretended":
        pretended(monkeypatch)
    else:
        pytest.importorskip("vllm", reason="vLLM is not installed: make engines")
    monkeypatch.setenv("QPREC_TRIPS", str(tmp_path / "trips.json"))
    sys.modules.pop("qwen_precision.vllm.logits", None)
    module = importlib.import_module("qwen_precision.vllm.logits")
    yield module.WatchLogits
    sys.modules.pop("qwen_precision.vllm.logits", None)


def config(named: bool = True) -> Any:
    """What a processor asks vLLM's configuration."""
    model = SimpleNamespace(
        model=str(DEMO), revision=None, dtype=torch.float16, logits_processors=[NAME] if named else None
    )
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(rank=0))


def params(wish: str | None = "watch", temperature: float = 0.0) -> Any:
    extra = {"qprec": wish} if wish is not None else None
    return SimpleNamespace(extra_args=extra, temperature=temperature, repetition_penalty=1.0)


def update(added: Any = (), removed: Any = (), moved: Any = ()) -> Any:
    ways = [(one, other, SimpleNamespace(name=way)) for one, other, way in moved]
    return SimpleNamespace(batch_size=4, added=list(added), removed=list(removed), moved=ways)


def trips(folder: Path) -> list[tuple[list[int], int]]:
    """Of every request that failed: its prompt and the first failing step."""
    if not (folder / "trips.json").exists():
        return []
    run = load(folder / "trips.json")
    first = {trip.row: trip.step for trip in reversed(run.generation.trips)}  # type: ignore[union-attr]
    return [(row.ids, first[number]) for number, row in enumerate(run.prompts[0].rows)]


# -- V1 ------------------------------------------------------------------------------------------------------------


def test_a_row_of_who_asks_is_kept_and_one_of_who_does_not_is_not_even_looked_at(kind: Any, tmp_path: Path) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params(None), [16], []), (1, params(), [17, 18], [5])]))
    logits = torch.full((2, 512), NAN)
    assert processor.apply(logits) is logits and logits.isnan().all()
    assert trips(tmp_path) == [([17, 18], 1)]
    assert not processor.is_argmax_invariant()


def test_healthy_logits_write_nothing_and_keep_their_bits(kind: Any, tmp_path: Path) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params("guard"), [16], [])]))
    logits = torch.randn(1, 512)
    logits[0, :100] = -INF  # a grammar's mask
    assert torch.equal(processor.apply(logits.clone()), logits) and not trips(tmp_path)


def test_requests_are_followed_when_they_go_and_change_places(kind: Any, tmp_path: Path) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(n, params(), [16 + n], []) for n in range(3)]))
    processor.update_state(update(removed=[0], moved=[(2, 0, "UNIDIRECTIONAL"), (0, 1, "SWAP")]))
    logits = torch.zeros(2, 512)
    logits[1] = NAN
    processor.apply(logits)
    assert trips(tmp_path) == [([18], 0)]
    processor.update_state(update([(1, params(None), [20], [])]))  # its place is somebody else's
    processor.apply(torch.full((2, 512), NAN))
    assert trips(tmp_path) == [([18], 0), ([17], 0)]
    processor.update_state(None)


def test_the_guard_mends_a_partly_bad_row_of_who_asked_for_it_alone(kind: Any) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params("guard"), [16], []), (1, params(), [17], [])]))
    logits = torch.zeros(2, 512)
    logits[:, 7], logits[:, 9] = 3.0, NAN
    made = processor.apply(logits)
    assert int(made[0].argmax()) == 7 and torch.isfinite(made[0]).all()
    assert int(made[1].argmax()) == 9 and made[1, 9].isnan()


def test_what_a_request_may_ask_for_is_checked_before_it_runs(kind: Any) -> None:
    for wish in ("watch", "guard", None):
        kind.validate_params(params(wish))
    kind.validate_params(Another())  # no fault of whoever asked
    with pytest.raises(ValueError, match="expected 'watch' or 'guard'"):
        kind.validate_params(params("everything"))


def test_a_fault_of_its_own_ends_the_watching_and_never_the_engine(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config()
    made.model_config.model = str(tmp_path / "nowhere")
    processor = kind(made, torch.device("cpu"), False)
    logits = torch.full((1, 512), NAN)
    for _ in range(3):
        processor.update_state(update([(0, params(), [16], [])]))
        assert processor.apply(logits) is logits
    assert len(caplog.records) == 1 and "watching stopped after step 0: QprecError: " in caplog.text


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


class Another:
    """Something of another vLLM: whatever is asked of it is not there, or is not as it was."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"another vLLM has no {name}")


def test_what_another_vllm_lacks_ends_the_watching_at_any_call_and_no_logit_changes(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logits, bare = torch.full((1, 512), NAN), SimpleNamespace(extra_args={"qprec": "watch"})
    for fault in ("made", "told", "began", "stepped"):
        caplog.clear()
        processor = kind(Another() if fault == "made" else config(), slots([[16]], [1]))
        processor.update_state(Another() if fault == "told" else None)
        taken = processor.add_request(0, bare if fault == "began" else params())
        for _ in range(2):
            assert processor.apply(logits, Another()) is logits and logits.isnan().all()
        assert taken == (fault == "stepped"), "V2 is not told to process who is not looked at"
        assert [each.getMessage().startswith("qprec: watching stopped after") for each in caplog.records] == [True]
        assert processor.add_request(0, params()) is False, "off for good"


def test_what_was_met_before_a_fault_is_kept_and_the_file_says_that_it_is_not_all(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params(), [16, 17], [])]))
    processor.apply(torch.full((1, 512), NAN))
    monkeypatch.setattr(processor._trips, "meet", raises)
    processor.update_state(update([(1, params(), [18], [])]))
    processor.apply(torch.full((2, 512), NAN))
    run = load(tmp_path / "trips.json")
    assert trips(tmp_path) == [([16, 17], 0)]
    assert run.stopped == "watching stopped after step 1: RuntimeError: a bug"


def test_a_fault_before_anything_failed_leaves_a_file_that_says_so_and_is_no_ok(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params(), [16, 17], [])]))
    monkeypatch.setattr(processor, "_look", raises)
    processor.apply(torch.zeros(1, 512))
    run = load(tmp_path / "trips.json")
    assert run.stopped == "watching stopped after step 0: RuntimeError: a bug"
    assert judge(run).verdict == {"fp16": "incomplete"} and judge(run).exit_code("fail") == 3


def test_every_data_parallel_copy_has_a_trip_file_of_its_own_and_of_its_workers_the_first_that_see_it(
    kind: Any, tmp_path: Path
) -> None:
    for copy, rank, sharded in ((0, 0, None), (1, 0, None), (1, 1, None), (0, 1, True)):
        made = config()
        made.parallel_config = SimpleNamespace(
            rank=rank, data_parallel_rank=0, data_parallel_index=copy, enable_batch_sharded_sampling=sharded
        )
        processor = kind(made, torch.device("cpu"), False)
        processor.update_state(update([(0, params(), [16], [])]))
        processor.apply(torch.full((1, 512), NAN))
    names = {"trips.json", "trips.dp1.json", "trips.rank1.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_two_engines_that_were_given_one_file_write_two_and_the_second_says_which(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        processor = kind(config(), torch.device("cpu"), False)
        processor.update_state(update([(0, params(), [16], [])]))
        processor.apply(torch.full((1, 512), NAN))

    fail()
    mine = load(tmp_path / "trips.json")
    theirs = {**mine.environment, PROCESS: str(os.getppid())}
    save(mine.model_copy(update={"environment": theirs}), tmp_path / "trips.json")
    fail()
    assert load(tmp_path / "trips.json").environment == theirs
    assert (tmp_path / f"trips.pid{os.getpid()}.json").exists() and f"trips.pid{os.getpid()}.json" in caplog.text


def test_what_ends_a_process_is_not_held_back(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(*_: Any) -> None:
        raise KeyboardInterrupt

    processor = kind(config(), torch.device("cpu"), False)
    processor.update_state(update([(0, params(), [16], [])]))
    monkeypatch.setattr(processor, "_look", broken_off)
    with pytest.raises(KeyboardInterrupt):
        processor.apply(torch.zeros(1, 512))


def test_a_file_that_cannot_be_written_ends_the_writing_and_not_the_mending(
    kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QPREC_TRIPS", "/nowhere/at/all/trips.json")
    processor = kind(config(), torch.device("cpu"), False)
    for number in range(2):
        processor.update_state(update([(0, params("guard"), [16 + number], [])]))
        logits = torch.zeros(1, 512)
        logits[0, 9] = NAN
        assert torch.isfinite(processor.apply(logits)).all()
    assert len(caplog.records) == 1 and "is not written any more" in caplog.text


# -- installed -----------------------------------------------------------------------------------------------------


def test_installed_alone_it_writes_only_where_who_runs_the_server_names_a_file(
    kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QPREC_TRIPS")
    processor = kind(config(named=False), torch.device("cpu"), False)
    processor.update_state(update([(0, params(), [16], [])]))
    processor.apply(torch.full((1, 512), NAN))
    assert not list(tmp_path.iterdir()) and "set QPREC_TRIPS" in caplog.text
    monkeypatch.setenv("QPREC_TRIPS", str(tmp_path / "trips.json"))
    processor = kind(config(named=False), torch.device("cpu"), False)
    processor.update_state(update([(0, params(), [16], [])]))
    processor.apply(torch.full((1, 512), NAN))
    assert trips(tmp_path) == [([16], 0)]


def test_installed_and_named_it_acts_once_and_the_other_keeps_quiet(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    same = config()
    both = [kind(same, torch.device("cpu"), False) for _ in range(2)]
    for each in both:
        each.update_state(update([(0, params(), [16], [])]))
    assert [bool(each._asked) for each in both] == [True, False] and not caplog.records
    assert not kind(config(), torch.device("cpu"), False)._idle, "another engine of the process has its own"


def test_of_it_and_its_subclasses_one_acts_in_an_engine_in_either_interface(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = type("One", (kind,), {}), type("Other", (kind,), {})
    for states in (torch.device("cpu"), slots([[16]], [1])):
        same = config()
        both = [each(same, states) for each in (one, other, kind)]
        assert [each.add_request(0, params()) for each in both] == [True, False, False] and not caplog.records
    both[0].apply(torch.full((1, 512), NAN), step([(0, 0, 0)]))
    assert trips(tmp_path) == [([16], 0)]


def test_the_package_names_the_class_as_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.logits_processors"] == {"qprec": NAME}


def test_loading_it_loads_nothing_else_of_this_package(tmp_path: Path) -> None:
    code = f"""
import sys, json
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import torch, pytest
from engines import test_logits
with pytest.MonkeyPatch.context() as patch:
    test_logits.pretended(patch)
    before = set(sys.modules)
    import qwen_precision.vllm.logits
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [name for name in json.loads(done.stdout) if not name.startswith("qwen_precision.vllm")] == []


def test_a_vllm_that_has_only_the_first_interface_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, second=False)
    kind = loaded()
    assert issubclass(kind, First) and kind(config(), torch.device("cpu"), False) is not None


def test_a_vllm_that_has_only_the_second_interface_loads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, first=False)
    kind = loaded()
    assert issubclass(kind, Second) and kind(config(), slots([[16]], [1])).add_request(0, params())


def loaded() -> Any:
    """The class, on what is there now."""
    sys.modules.pop("qwen_precision.vllm.logits", None)
    kind = importlib.import_module("qwen_precision.vllm.logits").WatchLogits
    sys.modules.pop("qwen_precision.vllm.logits", None)
    return kind


# -- V2 ------------------------------------------------------------------------------------------------------------


def slots(ids: list[list[int]], prompts: list[int]) -> Any:
    """What V2 knows of its slots: a row of ids each, of which so many are the prompt."""
    table = torch.zeros((len(ids), 16), dtype=torch.int32)
    for row, each in enumerate(ids):
        table[row, : len(each)] = torch.tensor(each)
    lengths = SimpleNamespace(np=np.array(prompts))
    return SimpleNamespace(all_token_ids=SimpleNamespace(gpu=table), prompt_len=lengths, prefill_len=lengths)


def step(rows: list[tuple[int, int, int]]) -> Any:
    """V2's layout of a step: of every row its slot, which of the slot's rows it is, and the position of its token."""
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    of = np.array(list(dict.fromkeys(slot for slot, _, _ in rows)))
    names = dict(zip(("expanded_idx_mapping", "expanded_local_pos", "pos"), columns, strict=True))
    return SimpleNamespace(**names, idx_mapping_np=of, idx_mapping=torch.tensor(of))


def test_in_the_second_interface_a_row_is_told_by_its_slot_and_its_ids_by_the_slots_table(
    kind: Any, tmp_path: Path
) -> None:
    processor = kind(config(), slots([[16, 17], [20, 21, 22, 5, 6]], [2, 3]))
    assert not processor.add_request(0, params(None)) and processor.add_request(1, params())
    logits = torch.full((2, 512), NAN)
    assert processor.apply(logits, step([(1, 0, 4), (0, 0, 1)])) is logits
    assert trips(tmp_path) == [([20, 21, 22], 2)]
    [spec] = read_prompts(None, str(tmp_path / "trips.json"))
    assert [row.ids for row in spec.rows or []] == [[20, 21, 22, 5, 6]]


def test_in_the_second_interface_who_comes_later_into_a_slot_is_asked_anew(kind: Any, tmp_path: Path) -> None:
    processor = kind(config(), slots([[16]], [1]))
    assert processor.add_request(0, params()) and not processor.add_request(0, params(None))
    processor.apply(torch.full((1, 512), NAN), step([(0, 0, 0)]))
    assert not trips(tmp_path)


def test_in_the_second_interface_drafted_tokens_and_half_read_prompts_are_nobodys_step(
    kind: Any, tmp_path: Path
) -> None:
    processor = kind(config(), slots([[16, 17, 18, 19]], [4]))
    processor.add_request(0, params())
    logits = torch.zeros(3, 512)
    logits[1:] = NAN
    processor.apply(logits, step([(0, 0, 3), (0, 1, 4), (0, 2, 5)]))
    processor.apply(torch.full((1, 512), NAN), step([(0, 0, 1)]))  # two of four tokens are read
    assert not trips(tmp_path)


def test_in_the_second_interface_the_guard_mends_too(kind: Any) -> None:
    processor = kind(config(), slots([[16], [17]], [1, 1]))
    processor.add_request(1, params("guard"))
    logits = torch.zeros(2, 512)
    logits[:, 7], logits[:, 9] = 3.0, NAN
    made = processor.apply(logits, step([(0, 0, 0), (1, 0, 0)]))
    assert made[0, 9].isnan() and int(made[1].argmax()) == 7


@pytest.mark.engine
def test_both_of_vllms_own_loaders_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make engines")
    first, second = importlib.import_module(FIRST), importlib.import_module(f"{SECOND}.loader")
    [one] = first._load_logitsprocs_by_fqcns([NAME])
    [other] = second._load_v2_logitsprocs_by_fqcns([NAME])
    assert one is other
    point = importlib.metadata.EntryPoint("qprec", NAME, "vllm.logits_processors")
    for module in (importlib.metadata, second):
        monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == point.group else [])
    assert first._load_logitsprocs_plugins() == second._load_v2_logitsprocs_plugins() == [one]


@pytest.mark.engine
def test_vllms_own_layout_of_a_step_is_the_one_that_is_pretended_here() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make engines")
    module = importlib.import_module(f"{SECOND}.interface")
    assert set(vars(step([(0, 0, 0)]))) <= set(module.LogitsContext.__dataclass_fields__)
    assert set(vars(slots([[1]], [1]))) <= set(module.LogitsProcRequestState.__dataclass_fields__)
