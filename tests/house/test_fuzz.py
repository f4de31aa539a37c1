"""A short part of `make fuzz` and `make kill`: hostile input and signals at random, each in a process with limits."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("args", [["fuzz.py", "--share", "0.005"], ["kill.py", "--count", "26", "--ranks", "2"]])
def test_a_short_part_of_it_breaks_nothing(args: list[str]) -> None:
    words = [sys.executable, str(ROOT / "scripts" / args[0]), *args[1:]]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("said", ["qprec: out of memory; try less.", "RuntimeError: can't allocate memory", ""])
def test_a_case_that_uses_up_the_memory_is_broken(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    fuzz = importlib.import_module("fuzz")
    (tmp_path / "err.txt").write_text(said or "qprec: model: holds too much.")
    (tmp_path / "out.txt").write_text("")
    assert (fuzz._wrong(["probe"], 3, tmp_path) is None) == (not said)
