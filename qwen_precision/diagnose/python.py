"""A whole probe called from Python: what the command line makes of its flags, made of arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_precision.diagnose.run import diagnose
from qwen_precision.errors import UsageError
from qwen_precision.judge import Report
from qwen_precision.settings import ProbeSettings, load_settings, read_prompts


def from_python(
    model: str,
    dtypes: Sequence[str] | None,
    prompts: Sequence[str] | Path | None,
    config: str | None,
    revision: str | None,
    settings: Mapping[str, Any],
) -> Report:
    """As ``qwen_precision.probe_model``, which documents it.

    Raises:
        TypeError: an unknown setting, or something in the place of a list.
        QprecError: as ``diagnose`` does.
    """
    unknown = next((name for name in settings if name not in ProbeSettings.model_fields), None)
    if unknown is not None:
        known = ", ".join(name for name in ProbeSettings.model_fields if name not in ("dtypes", "prompts"))
        raise TypeError(f"probe() got an unexpected keyword argument {unknown!r}; known: {known}.")
    if isinstance(dtypes, str):
        raise TypeError(f"probe: dtypes takes a list; give [{dtypes!r}].")
    if isinstance(prompts, str):
        raise TypeError("probe: prompts takes a list of texts, or a pathlib.Path of a file of prompts.")
    if prompts is not None and not isinstance(prompts, Path) and not prompts:
        raise UsageError("prompts: is empty; give a text at least, or None for the built-in set.")
    asked = load_settings(config, {**settings, "dtypes": list(dtypes) if dtypes is not None else None})
    texts = list(prompts) if prompts is not None and not isinstance(prompts, Path) else []
    file = str(prompts) if isinstance(prompts, Path) else asked.prompts if not texts else None
    return diagnose(model, asked, read_prompts(texts, file), revision)
