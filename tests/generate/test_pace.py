"""A generation that will take long says so, once, as soon as its first tokens have shown how fast it goes."""

from pathlib import Path

import pytest

from qwen_precision.cli import main
from qwen_precision.generate import pace
from qwen_precision.generate.pace import paced
from qwen_precision.progress import lasting

pytestmark = pytest.mark.usefixtures("scratch")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, in seconds."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def decode(clock: list[float], total: int, first: float, each: float, steps: int, rows: int = 1) -> list[str]:
    """What is announced while so many steps are made."""
    told: list[str] = []
    shown: list[int] = []
    step = paced(lambda done, limit, what: shown.append(done), told.append, rows)
    for number in range(steps):
        step(number, total, "")
        clock[0] += each if number else first
    assert shown == list(range(steps))
    return told


def test_a_billion_tokens_are_told_in_the_time_that_they_take_and_only_once(clock: list[float]) -> None:
    (told,) = decode(clock, 10**9, first=30.0, each=0.01, steps=100)
    assert told == "up to 1,000,000,000 tokens, about 116 days at most; Ctrl-C ends it and keeps what there is"


def test_slow_steps_are_told_after_a_few_seconds_with_their_rows(clock: list[float]) -> None:
    (told,) = decode(clock, 1000, first=1.0, each=6.0, steps=4, rows=500)
    assert told.startswith("up to 1,000 tokens in 500 rows, about 100 min at most; ")


def test_what_ends_within_a_minute_is_not_told(clock: list[float]) -> None:
    assert decode(clock, 64, first=1.0, each=0.5, steps=64) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.4, "3 s"), (119, "119 s"), (121, "2 min"), (7100, "118 min"), (7300, "2 h"), (200_000, "2 days")],
)
def test_times_are_as_rough_as_they_are_known(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


def test_many_rows_are_counted_before_they_are_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    Path("many.txt").write_text("\n".join(f"{number} is a number" for number in range(120)))
    assert main(["generate", "demo", "--prompts", "many.txt", "--max-new-tokens", "1", "--fail-on", "never"]) == 0
    assert capsys.readouterr().err.startswith("120 prompts, 1,")
