"""What is known of an engine: which values pass through fp16 there, where that was read, and how to avoid it. No torch.

An engine is a YAML file of ``configs/engines/`` by its name, or any such file by its path; nothing of it is code.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator

from qwen_precision.errors import UsageError
from qwen_precision.settings.config import configs_folder, first_error, known, near_or_known, read_yaml

Evidence = Literal["tested here", "read in the source", "reported by users"]

EVIDENCE = get_args(Evidence)
"""How it is known that an option avoids a failure."""

ALL = "all"
"""Stands for every engine that comes with qprec."""

VALUES: dict[str, str] = {
    "weights": "as a weight",
    "outputs": "",
    "outputs but scores": "",
    "products": "as a product's output",
    "operands": "as a product's operand",
    "residual": "in the residual stream",
    "keys and values": "in the KV cache",
    "squares": "inside a norm",
    "mean squares": "inside a norm",
    "sums": "as a sum on its way",
}
"""What can pass through fp16, and how that is said of a place. ``outputs`` are those of every operation but the insides
of norms, with the scores of eager attention where a record holds them; ``squares`` and ``mean squares`` are these
insides; ``sums`` are the partial sums of products."""


_PATH = re.compile(r"!?[\w.*-]{1,200}")


class _Read(BaseModel):
    """Something that was read in a public place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(pattern=r"^https://\S+$")]
    version: Annotated[str, Field(min_length=1)]
    """A release or a commit: what the source said then."""


class Option(_Read):
    """What a user can do so that a value does not pass through fp16."""

    option: Annotated[str, Field(min_length=1)]
    """As it is typed."""
    evidence: Evidence


class Rule(_Read):
    """Values that pass through fp16."""

    values: Annotated[list[str], Field(min_length=1)]
    """Of ``VALUES``."""
    because: Annotated[str, Field(min_length=1)]
    """What the source does, in a sentence."""
    modules: Annotated[list[str], Field(max_length=50)] = []
    """Paths of modules that it holds for, ``*`` for any characters, and behind ``!`` those of them that it does not;
    empty for all. No regular expressions: an engine is a stranger's file, and theirs can take longer than a life."""
    models: list[str] = []
    """Architectures that it holds for; empty for all."""
    saturates: bool = False
    """Whether what leaves the range becomes the largest number: finite, and wrong."""
    avoid: list[Option] = []
    """The best first; empty where the engine has no such option."""

    @field_validator("values")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        return [known(each, VALUES, "value") for each in value]

    @field_validator("modules")
    @classmethod
    def _paths(cls, value: list[str]) -> list[str]:
        for each in value:
            if not _PATH.fullmatch(each):
                raise ValueError(
                    f"{each[:40]!r} is no path of modules; give one like '*.down_proj', '!*.0.mlp' for not"
                )
        if value and all(each.startswith("!") for each in value):
            raise ValueError("only says what it does not hold for; put '*' first")
        return value

    def holds_for(self, module: str) -> bool:
        """Whether it is about a module."""
        found = [each for each in self.modules if fnmatchcase(module, each.removeprefix("!"))]
        return not self.modules or (bool(found) and not any(each.startswith("!") for each in found))


class Engine(BaseModel):
    """One engine, as it is started in one way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Of its file."""
    runs: Annotated[str, Field(min_length=1)]
    """What it is, and how it is started so that the rules hold."""
    note: str = ""
    """What a user should know of it that no rule says, in a sentence."""
    order: int = 100
    """Where it is named among others: the lowest first."""
    rules: Annotated[list[Rule], FailFast(), Field(max_length=100)]
    """Empty where nothing passes through fp16."""


def engine_names() -> list[str]:
    """The engines that come with qprec, in the order in which they are named."""
    return [each.name for each in _bundled()]


@lru_cache(maxsize=1)
def _bundled() -> tuple[Engine, ...]:
    folder = configs_folder() / "engines"
    found = [_read(path, path.stem) for path in folder.glob("*.yaml")]
    return tuple(sorted(found, key=lambda each: (each.order, each.name)))


def load_engines(asked: list[str]) -> tuple[Engine, ...]:
    """The engines of these names or files, each once; ``all`` stands for every one that comes with qprec.

    Raises:
        UsageError: no such engine, or a file that is not one; what is wrong in it is named.
    """
    found: dict[str, Engine] = {}  # by name, or by path: a file may be called as one that comes with qprec is
    bundled = {engine.name: engine for engine in _bundled()}
    for each in asked:
        if each == ALL:
            found |= bundled
        elif each in bundled:
            found[each] = bundled[each]
        elif Path(each).suffix in (".yaml", ".yml"):
            found[str(Path(each).absolute())] = _read(Path(each), Path(each).stem)
        else:
            raise UsageError(f"--engine: unknown engine {each!r}; {near_or_known(each, [*bundled, ALL], cutoff=0.65)}")
    return tuple(_apart(found))


def _apart(found: dict[str, Engine]) -> Iterator[Engine]:
    """Those of one name told apart by where they were read."""
    names = Counter(engine.name for engine in found.values())
    for key, engine in found.items():
        alike = names[engine.name] > 1 and key != engine.name
        yield engine.model_copy(update={"name": os.path.relpath(key)}) if alike else engine


def _read(path: Path, name: str) -> Engine:
    label = f"--engine {path}"
    data = read_yaml(path, label, "a YAML file that describes an engine")
    if not isinstance(data, dict):
        raise UsageError(f"{label}: should hold `runs` and `rules`.")
    try:
        return Engine.model_validate({**data, "name": name})
    except ValidationError as error:
        key, message = first_error(error)
        raise UsageError(f"{label}: {key}: {message}.") from error
