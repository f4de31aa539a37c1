"""Ctrl-C and SIGTERM end the work and keep what there is; the second ends at once; leftovers are removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_precision.cli import main
from qwen_precision.errors import QprecError
from qwen_precision.files import _prefix, unfinished, write_atomically
from qwen_precision.model import locate, open_checkpoint
from qwen_precision.probe.shadow import Shadow
from qwen_precision.record import load
from qwen_precision.rescue.export import _earlier
from support.checkpoints import ROOT

pytestmark = pytest.mark.usefixtures("scratch")

Capture = pytest.CaptureFixture[str]
PROBE = ["probe", "demo", "--dtype", "fp16", "--prompt", "hello", "--no-explain", "-o", "run.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("layer", "code"), [(1, 3), (5, 1)])
def test_the_first_signal_ends_the_work_and_keeps_what_was_found(
    number: int, layer: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    original = Shadow._layer

    def signalled(self: Any, index: int) -> None:
        if index == layer:
            os.kill(os.getpid(), number)
        original(self, index)

    monkeypatch.setattr(Shadow, "_layer", signalled)
    before = signal.getsignal(number)
    assert main(PROBE) == code
    assert load(Path("run.json")).stopped == "interrupted"
    assert os.listdir() == ["run.json"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_rescue_is_written_leaves_no_folder(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def signalled(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), getattr(signal, number))

    monkeypatch.setattr("qwen_precision.rescue.export.Exporter.write", signalled)
    assert main([*PROBE, "--rescue-to", "safe"]) in (1, 3)
    assert os.listdir() == ["run.json"]
    assert load(Path("run.json")).unfinished is not None


SECOND = """
import os, signal, sys
from qwen_precision.probe.shadow import Shadow
from qwen_precision.files import unfinished
from pathlib import Path
from qwen_precision.cli import main
def twice(self, index):
    unfinished(Path("run.json").resolve()).write_text("half")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
Shadow._layer = twice
main(sys.argv[1:])
print("still here")
"""


def test_the_second_signal_ends_at_once_with_code_3_and_nothing_half_written() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SECOND, *PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr and os.listdir() == []


IMPORTING = """
import os, runpy, signal, sys
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.{0})
sys.meta_path.insert(0, Importing())
runpy.run_module("qwen_precision", run_name="__main__")
"""
ENDING = """
import atexit, os, runpy, signal
def signalled():
    os.kill(os.getpid(), signal.{0})
    print("at the end")
atexit.register(signalled)
runpy.run_module("qwen_precision", run_name="__main__")
"""


def _started(script: str, words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """The program, begun by a script."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, "-c", script, *words], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_program_is_imported_is_a_sentence_and_code_3(number: str) -> None:
    done = _started(IMPORTING.format(number), PROBE)
    assert (done.returncode, done.stdout, os.listdir()) == (3, "", [])
    assert done.stderr == "qprec: interrupted; nothing was saved.\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_last_word_changes_no_verdict(number: str) -> None:
    done = _started(ENDING.format(number), PROBE)
    assert done.returncode == 1 and "FAIL" in done.stdout and done.stdout.endswith("at the end\n"), done.stderr
    assert "interrupted" not in done.stderr and load(Path("run.json")).stopped is None


def test_the_program_leaves_no_temporary_folder_of_a_library() -> None:
    Path("temporary").mkdir()
    Path("home").touch()  # matplotlib, which finds no place for its settings there, makes one that it removes at exit
    words = ["report", str(ROOT / "tests/fixtures/demo-probe.json"), "--fail-on", "never", "-o", "picture.png"]
    more = {"TMPDIR": "temporary", "MPLCONFIGDIR": "home/nothing"}
    done = _started('import runpy; runpy.run_module("qwen_precision", run_name="__main__")', words, **more)
    assert done.returncode == 0 and "temporary" in done.stderr, done.stderr
    assert os.listdir("temporary") == [] and Path("picture.png").stat().st_size > 1000


def _dead() -> int:
    """The number of a process that is gone."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return int(done.stdout)


def test_what_a_dead_process_left_of_a_file_is_removed_and_nothing_else() -> None:
    target = Path("run.json").resolve()
    left, other = Path(f"{_prefix(target)}{_dead()}-0"), Path(f"{_prefix(Path('other.json'))}{_dead()}-0")
    lives, elsewhere = Path(f"{_prefix(target)}{os.getppid()}-0"), Path(".qprec-partial-x-y-1-0")
    for each in (left, other, lives, elsewhere):
        each.write_text("half")
    write_atomically(target, "whole")
    assert not left.exists() and all(each.exists() for each in (other, lives, elsewhere))
    assert target.read_text() == "whole"


def test_what_a_dead_process_left_of_an_export_is_removed_by_the_next(capsys: Capture) -> None:
    left = Path(f"{_prefix(Path('safe').resolve())}{_dead()}-0")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert main([*PROBE, "--rescue-to", "safe"]) == 0
    assert sorted(os.listdir()) == ["run.json", "safe"]


def test_an_earlier_export_is_put_back_where_a_process_was_killed_while_it_was_replaced(capsys: Capture) -> None:
    assert main([*PROBE, "--rescue-to", "safe"]) == 0
    (Path("safe") / "mine").touch()
    os.rename("safe", _earlier(Path("safe").resolve()))
    assert main([*PROBE, "--rescue-to", "safe"]) == 2  # it is there already
    assert (Path("safe") / "mine").exists() and sorted(os.listdir()) == ["run.json", "safe"]
    os.rename("safe", _earlier(Path("safe").resolve()))
    assert main([*PROBE, "--rescue-to", "safe", "--force"]) == 0
    assert not (Path("safe") / "mine").exists() and sorted(os.listdir()) == ["run.json", "safe"]


def test_the_name_of_an_unfinished_file_fits_whatever_the_file_is_called() -> None:
    write_atomically(Path("é" * 120 + ".json"), "whole")
    assert len(os.fsencode(unfinished(Path("é" * 120 + ".json")).name)) < 100


def test_a_half_export_never_loads_because_its_config_comes_last(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    seen: list[set[str]] = []

    def watched(path: Path) -> str:
        if path.parent.name.startswith(".qprec-partial-"):
            seen.append(set(os.listdir(path.parent)))
            if path.name != "config.json":
                with pytest.raises(QprecError):
                    open_checkpoint(path.parent, "half")
        return "0" * 64

    monkeypatch.setattr("qwen_precision.rescue.export.sha256_of", watched)
    main([*PROBE, "--rescue-to", "safe"])
    assert seen and all("config.json" not in names for names in seen[:-1]) and "config.json" in seen[-1]
    assert locate("safe")[0].is_dir()
