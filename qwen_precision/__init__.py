"""qprec: find where a Qwen3 checkpoint overflows in half precision, why, and how much headroom the rest has.

From Python: ``watch(model)`` around a forward of your own, ``probe_model("Qwen/Qwen3-8B")`` for all of `qprec probe`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_precision.version import __version__

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from qwen_precision.judge import Report
    from qwen_precision.watcher import Readings

__all__ = ["__version__", "probe_model", "watch"]


# Both need torch, and reading a report does not: it is imported when they are called.


def watch(model: "nn.Module") -> "AbstractContextManager[Readings]":
    """Watch every operation of whatever ``model`` does in the block; its outputs do not change by a bit.

        with qwen_precision.watch(model) as readings:
            model(**inputs)
        print(readings)                     # the operations with the least headroom
        print(readings.first_nonfinite())   # where a NaN or an infinity began

    Args:
        model: any loaded module; it may be called several times in the block.

    Returns:
        What to put behind ``with``; it gives the Readings, which can be asked in the block and after it.

    Raises:
        TypeError: not a module.
        qwen_precision.errors.QprecError: the model is being watched already; or, of the readings, nothing was measured.
    """
    from qwen_precision.watcher import watch as watching

    return watching(model)


def probe_model(
    model: str | Path,
    *,
    dtypes: Sequence[str] | None = None,
    prompts: Sequence[str] | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> "Report":
    """All that `qprec probe` does but its output: nothing is printed, no file is written.

        report = qwen_precision.probe_model("demo", dtypes=["fp16"], prompts=["Hello"])
        report.verdict       # {"fp16": "fail"}
        report.findings[0]   # where it starts, and why

    Args:
        model: a hub id, a checkpoint folder, or the word demo.
        dtypes: of fp32, fp16, bf16; all by default.
        prompts: texts, or the path of a file of prompts; a built-in set by default.
        config: a profile, by name or file; what is given here wins over it.
        revision: branch, tag or commit of a hub id.
        settings: any other field of ``ProbeSettings``, named as the flag is: device, attention, memory, max_tokens,
            explain, budget, sweep, …

    Returns:
        The judged run: verdict by dtype, findings (the first stands first), headroom, and the run itself.

    Raises:
        TypeError: an unknown setting, or prompts that are neither texts nor a path.
        qwen_precision.errors.QprecError: what `qprec probe` would end with, as one sentence.
    """
    from qwen_precision.diagnose import from_python

    return from_python(str(model), dtypes, prompts, config, revision, settings)
