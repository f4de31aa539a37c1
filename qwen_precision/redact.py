"""Takes out of a record what should not travel with it: always paths, on request every text. Pure; no torch.

Redacted, a text is its length and the first 12 digits of its SHA-256, so that two reports can be seen to be about
the same prompt; token ids become numbers in the order of their first use, so that a repetition is still one (id 0
stays 0: a run of it is what NaN prints).
"""

import hashlib
import re
from typing import Any

from qwen_precision.record import Run

_PATH = re.compile(r"(?:~|\.{0,2})?/(?:[^\s/:;,'\"()]+/)+([^\s/:;,'\"()]*)|[A-Za-z]:\\(?:[^\\\s]+\\)*([^\\\s]*)")
_TEXTS = {"text", "input", "clean_text"}


def without_paths(run: Run) -> Run:
    """Every path cut to its last part; a hub id stays. Prompts and generated texts are not looked into."""
    data = _strip(run.model_dump(by_alias=True), keep=_TEXTS | {"tokens"})
    source = str(run.model.source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        data["model"]["source"] = source.rstrip("/").rpartition("/")[2] or "model"
    return Run.model_validate(data)


def redacted(run: Run) -> Run:
    """Without prompts, texts and token strings, too."""
    data = without_paths(run).model_dump(by_alias=True)
    names: dict[int, int] = {0: 0}
    for prompt in data["prompts"]:
        for row in prompt["rows"]:
            row.update(text=_digest(row["text"]), tokens=["" for _ in row["tokens"]], ids=_renamed(row["ids"], names))
    if data["generation"] is not None:
        for row in data["generation"]["rows"]:
            row.update({key: _digest(row[key]) for key in _TEXTS if row.get(key)})
            row.update(tokens=["" for _ in row["tokens"]], ids=_renamed(row["ids"], names))
        for trip in data["generation"]["trips"]:
            trip["why"] = re.sub(r"\bid \d+", "a token", trip["why"])
    return Run.model_validate(data)


def _strip(value: Any, keep: set[str]) -> Any:
    if isinstance(value, str):
        return _PATH.sub(lambda match: match[1] or match[2] or "…", value)
    if isinstance(value, dict):
        return {key: item if key in keep else _strip(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [_strip(item, keep) for item in value]
    return value


def _digest(text: str) -> str:
    return f"[{len(text)} characters, sha256 {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}]"


def _renamed(ids: list[int], names: dict[int, int]) -> list[int]:
    # Even steps upward: no run of ids that counts down comes of it.
    return [names.setdefault(each, 2 * len(names)) for each in ids]
