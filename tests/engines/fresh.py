"""A question to a fresh vLLM engine, in a process of its own: a cache stays poisoned."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import ROOT

NEEDS_VLLM = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make engines"),
]
BAD, CLEAN = "The capital of France is", "1"
Texts = list[list[str]]


def serve(
    folder: Path,
    model: Path,
    dtype: str,
    *rounds: list[str],
    record: str = "",
    asks: list[str | None] | None = None,
    tokens: int = 6,
    workers: int = 1,
    fault: int = 0,
) -> Texts:
    """Texts of a fresh engine, round by round.

    Args:
        record: watch every operation, and save it in the folder by this name.
        asks: what the prompts of a round ask of the logits processor, one after another.
        fault: the reading at which the watcher fails, of all that it takes; 0 for none.
    """
    to = folder / f"{len(list(folder.iterdir()))}.texts.json"
    asked: dict[str, Any] = {"model": str(model), "dtype": dtype, "rounds": rounds, "asks": asks or [None]}
    asked |= {
        "record": str(folder / record) if record else "",
        "tokens": tokens,
        "workers": workers,
        "to": str(to),
        "fault": fault,
    }
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "QPREC_TRIPS": str(folder / "trips.json")}
    command = [sys.executable, str(Path(__file__).parent / "serve.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert to.exists(), done.stderr[-3000:]  # several workers may end the process otherwise than well
    texts: Texts = json.loads(to.read_text(encoding="utf-8"))
    return texts
