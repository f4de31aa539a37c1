"""The whole of a probe: what it judges, and how often."""

import pytest

from qwen_precision.diagnose import run as module
from qwen_precision.judge import Report
from qwen_precision.record import Run
from qwen_precision.settings import load_settings, read_prompts


@pytest.mark.parametrize("explain", [True, False])
def test_every_run_is_judged_once(explain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Run] = []
    judge = module.judge

    def counted(run: Run) -> Report:
        judged.append(run)
        return judge(run)

    monkeypatch.setattr(module, "judge", counted)
    report = module.diagnose("demo", load_settings(None, {"explain": explain}), read_prompts(["Hello"], None))
    assert len({id(run) for run in judged}) == len(judged) <= 2
    assert report.run is judged[-1]


def test_what_nothing_is_added_to_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Run] = []
    judge = module.judge

    def counted(run: Run) -> Report:
        judged.append(run)
        return judge(run)

    monkeypatch.setattr(module, "judge", counted)
    settings = load_settings(None, {"explain": False, "dtypes": ["bf16"]})
    module.diagnose("demo", settings, read_prompts(["Hello"], None))
    assert len(judged) == 1
