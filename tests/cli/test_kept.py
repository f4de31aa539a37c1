"""What was measured is not lost: it is shown where it cannot be saved, and saved before what can fail."""

import errno
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from qwen_precision.cli import main
from qwen_precision.errors import QprecError
from qwen_precision.record import LayerPowers, load

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["probe", "demo", "--dtype", "fp16", "--prompt", "hello", "--no-explain", "-o", "run.json"]
GENERATE = ["generate", "demo", "--max-new-tokens", "2", "-o", "run.json"]


@pytest.mark.parametrize("args", [PROBE, GENERATE, [*GENERATE, "--text"], [*PROBE[:-1], "run.md"]])
def test_on_a_full_disk_the_answer_is_shown_and_the_old_file_is_there(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    Path("run.json").write_bytes(b'{"schema":4}')

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qwen_precision.files._replace", full)
    assert main(args) == 3
    told = capsys.readouterr()
    assert told.out.strip() and "cannot be written (No space left on device)" in told.err
    assert Path("run.json").read_bytes() == b'{"schema":4}' and [each.name for each in Path().iterdir()] == ["run.json"]


def _beyond(self: object) -> None:
    try:
        LayerPowers(layer=0, input_norm=121, query=0, value=0, post_norm=0, product=[0])
    except ValidationError:
        raise


def test_a_plan_beyond_the_records_powers_is_no_plan_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("qwen_precision.rescue.plan.Planner.plan", _beyond)
    assert main(PROBE) == 1
    assert "2^120" in str(load(Path("run.json")).rescue)


@pytest.mark.parametrize("step", ["rescue.plan.Planner.plan", "diagnose.run.explained"])
def test_what_fails_after_the_measurement_leaves_it_saved(
    step: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise QprecError("model-00002.safetensors: cannot be read")

    monkeypatch.setattr(f"qwen_precision.{step}", failing)
    assert main(PROBE) in (1, 3)
    run = load(Path("run.json"))
    assert run.passes
    assert "model-00002.safetensors: cannot be read" in capsys.readouterr().err + (run.unfinished or "")


def test_half_a_character_in_a_guard_files_name_is_saved_as_another(capsys: Capture) -> None:
    Path("\udc80.yaml").write_text("act: true\n")
    assert main([*GENERATE, "--guards", "\udc80.yaml", "--fail-on", "never"]) == 0
    assert json.loads(Path("run.json").read_text(encoding="utf-8"))["settings"]["guards"] == "?.yaml"
