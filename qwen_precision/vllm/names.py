"""What the files of an engine's workers are called: each writes its own, however many of them are given one name."""

from pathlib import Path
from typing import Any

from qwen_precision.errors import QprecError
from qwen_precision.files import is_running
from qwen_precision.record import load

PROCESS = "process"
"""Of a record's environment: the id of the process that wrote it."""


def replica(parallel: Any) -> int:
    """Which of an engine's data parallel copies this is.

    ``data_parallel_rank`` alone does not tell: of a dense model vLLM sets it to 0 in each of them.
    """
    found = getattr(parallel, "data_parallel_index", None)
    return int(getattr(parallel, "data_parallel_rank", 0) if found is None else found)


def own_file(path: Path, parallel: Any, rank: int, process: int) -> Path:
    """The file of one worker: ``run.json``, of others ``run.rank1.json``, ``run.dp1.json``, ``run.dp1.rank1.json``.

    Where such a file was written by another process that still runs (two engines that were given one name), the number
    of this one is in the name too: ``run.pid4711.json``.
    """
    copy = replica(parallel)
    parts = [f".dp{copy}" if copy else "", f".rank{rank}" if rank else ""]
    mine = path.with_name(f"{path.stem}{''.join(parts)}{path.suffix}")
    writer = _writer(mine)
    if writer is None or writer == process or not is_running(writer):
        return mine
    return mine.with_name(f"{mine.stem}.pid{process}{mine.suffix}")


def _writer(path: Path) -> int | None:
    """Who wrote a record; None where that is not told, or it is none."""
    try:
        told = load(path).environment.get(PROCESS, "") if path.is_file() else ""
    except (OSError, QprecError):
        return None
    return int(told) if told.isdecimal() else None
