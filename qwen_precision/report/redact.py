"""Takes out of a record what should not travel with it: always paths, on request every text. Pure; no torch.

Redacted, a text is its length and the first 12 digits of its SHA-256, so that two reports can be seen to be about
the same prompt; token ids become numbers in the order of their first use, so that a repetition is still one (id 0
stays 0: a run of it is what NaN prints).
"""

import hashlib
import re
from typing import Any

from qwen_precision.record import Run

_PATH = re.compile(r"""(?:(?<=[\s"'(=,;:])|^)(?:~|\.{1,2}|[A-Za-z]:)?[\\/](?:[^:;,"()\n]*[\\/])?([^\s:;,"()'\n]*)""")
"""From a root to the last separator before a sign that ends a sentence's part: folders may hold spaces."""

_TEXTS = {"text", "input", "clean_text"}


def without_paths(run: Run) -> Run:
    """Every path cut to its last part; a hub id stays. Prompts and generated texts are not looked into."""
    data = _strip(run.model_dump(by_alias=True), keep=_TEXTS | {"tokens"})
    source = str(run.model.source)
    if "\\" in source or source.count("/") > 1 or source.startswith((".", "/", "~")):
        parts = [part for part in re.split(r"[\\/]", source) if part and not part.endswith(":")]
        home = len(parts) < 3 and parts[:1] in (["home"], ["Users"], ["root"], ["~"])
        data["model"]["source"] = "model" if home or not parts else parts[-1]
    return Run.model_validate(data)


def redacted(run: Run) -> Run:
    """Without prompts, texts and token strings, too."""
    data = {**without_paths(run).model_dump(by_alias=True), "redacted": True}
    names: dict[int, int] = {0: 0}
    called = {prompt["name"]: f"prompt {number}" for number, prompt in enumerate(data["prompts"], 1)}
    for prompt in data["prompts"]:
        prompt["name"] = called[prompt["name"]]
        for row in prompt["rows"]:
            row.update(text=_digest(row["text"]), tokens=["" for _ in row["tokens"]], ids=_renamed(row["ids"], names))
    made, sweep = data["explanation"], data["sweep"]
    for each in [*made["controls"], *made["continuations"]] if made is not None else []:
        each["prompt"] = called.get(each["prompt"], "")
    if sweep is not None:
        sweep["prompt"] = called.get(sweep["prompt"])
        for each in sweep["worst"]:
            each.update(text="", ids=_renamed(each["ids"], names))
    if data["generation"] is not None:
        for row in data["generation"]["rows"]:
            row.update({key: _digest(row[key]) for key in _TEXTS if row.get(key)})
            row.update(tokens=["" for _ in row["tokens"]], ids=_renamed(row["ids"], names))
        for trip in data["generation"]["trips"]:
            trip["why"] = re.sub(r"\bid \d+", "a token", trip["why"])
    return Run.model_validate(data)


def _strip(value: Any, keep: set[str]) -> Any:
    if isinstance(value, str):
        # A last part with no suffix may be somebody's home.
        return _PATH.sub(lambda match: match[1] if "." in match[1] else "…", value)
    if isinstance(value, dict):
        return {_strip(key, keep): item if key in keep else _strip(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [_strip(item, keep) for item in value]
    return value


def _digest(text: str) -> str:
    return f"[{len(text)} characters, sha256 {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}]"


def _renamed(ids: list[int], names: dict[int, int]) -> list[int]:
    # Even steps upward: no run of ids that counts down comes of it.
    return [names.setdefault(each, 2 * len(names)) for each in ids]
