"""The whole of a probe: what it judges, and how often."""

import pytest

from qwen_precision.diagnose import run as module
from qwen_precision.judge import Report
from qwen_precision.record import Run
from qwen_precision.settings import engine_names, load_settings, read_prompts


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every run that is judged, in order."""
    runs: list[Run] = []
    judge = module.judge

    def counted(run: Run) -> Report:
        runs.append(run)
        return judge(run)

    monkeypatch.setattr(module, "judge", counted)
    return runs


@pytest.mark.parametrize("explain", [True, False])
def test_every_run_is_judged_once(explain: bool, judged: list[Run]) -> None:
    report = module.diagnose("demo", load_settings(None, {"explain": explain}), read_prompts(["Hello"], None))
    assert len({id(run) for run in judged}) == len(judged) <= 2
    assert report.run is judged[-1]


@pytest.mark.parametrize(("dtype", "told"), [("fp16", engine_names()), ("bf16", [])])
def test_engines_are_told_unasked_where_fp16_fails(dtype: str, told: list[str]) -> None:
    settings = load_settings(None, {"explain": False, "dtypes": [dtype]})
    report = module.diagnose("demo", settings, read_prompts(["Hello"], None))
    assert [each.engine.name for each in report.engines] == told


def test_what_nothing_is_added_to_is_not_judged_again(judged: list[Run]) -> None:
    settings = load_settings(None, {"explain": False, "dtypes": ["bf16"]})
    module.diagnose("demo", settings, read_prompts(["Hello"], None))
    assert len(judged) == 1
