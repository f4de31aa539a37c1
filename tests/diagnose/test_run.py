"""The whole of a probe: what it judges, and how often."""

import pytest

from qwen_precision.diagnose import run as module
from qwen_precision.judge import Report
from qwen_precision.record import Run
from qwen_precision.settings import load_settings, read_prompts


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


def test_what_nothing_is_added_to_is_not_judged_again(judged: list[Run]) -> None:
    settings = load_settings(None, {"explain": False, "dtypes": ["bf16"]})
    module.diagnose("demo", settings, read_prompts(["Hello"], None))
    assert len(judged) == 1
