"""Settings: YAML profiles and command-line flags, checked by one schema. Flags win over the profile.

A profile is found by path or by name; names are the files of ``configs/``, which travel in the wheel.
"""

import difflib
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from qwen_precision.dtypes import DTYPES, REFERENCE, RESCUED
from qwen_precision.errors import UsageError
from qwen_precision.files import is_whole, read_text
from qwen_precision.settings.levels import FAIL_ON

ATTENTION = ("sdpa", "eager")
MEMORY = ("auto", "resident", "streamed")
ARITHMETIC = ("native", "tensor-core", "fp16-accumulate")
"""How products of 16-bit operands are computed; what each is stands in ``watcher/arithmetic.py``."""
SWEEPS = ("first-token", "length")
"""Searches for what triggers an overflow."""
RESCUE_DTYPES = ("fp16", "bf16", "source")
"""What the weights of a rescued checkpoint may be written in; ``source`` leaves each tensor its own format."""
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Of a file of prompts or texts, a line each."""


class ProbeSettings(BaseModel):
    """What a probe can be told; every field is also a flag."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtypes: list[str] = Field(default_factory=lambda: list(DTYPES))
    reference: bool = True
    prompts: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    device: str = "auto"
    attention: str | None = None
    memory: str = "auto"
    arithmetic: str = ARITHMETIC[0]
    near_overflow: float = Field(default=2.0, ge=1.0, le=1e6)
    underflow_share: float = Field(default=0.01, gt=0, le=1)
    rescue_margin: float = Field(default=4.0, ge=1.0, le=1024.0)
    explain: bool | None = None
    """Control runs: after a failure (None), always and with all that measures precision (True), or never."""
    budget: int = Field(default=10, ge=0, le=1000)
    """Forwards that control runs may take."""
    sweep: str | None = None
    sweep_limit: int | None = Field(default=None, ge=1)
    sweep_texts: str | None = None
    fail_on: str = "fail"

    @field_validator("dtypes")
    @classmethod
    def _known_dtypes(cls, value: list[str]) -> list[str]:
        for name in value:
            known(name, DTYPES, "dtype")
        if not value:
            raise ValueError(f"at least one dtype is needed; expected {alternatives(DTYPES)}")
        return list(dict.fromkeys(value))

    @field_validator("memory", "attention", "arithmetic", "fail_on", "sweep")
    @classmethod
    def _known_word(cls, value: str | None, info: ValidationInfo) -> str | None:
        table, what = {
            "memory": (MEMORY, "mode"),
            "attention": (ATTENTION, "implementation"),
            "arithmetic": (ARITHMETIC, "arithmetic"),
            "fail_on": (FAIL_ON, "level"),
            "sweep": (SWEEPS, "sweep"),
        }[str(info.field_name)]
        return None if value is None else known(value, table, what)

    @model_validator(mode="after")
    def _agree(self, info: ValidationInfo) -> "ProbeSettings":
        if self.explain is False and {"explain", "budget"} <= _flags_in(info):
            raise ValueError("--budget: is for the control runs, which --no-explain leaves out; give one of the two")
        if self.sweep != SWEEPS[0] and (self.sweep_limit or self.sweep_texts):
            flag = "--sweep-limit" if self.sweep_limit else "--sweep-texts"
            raise ValueError(f"{flag}: goes with --sweep {SWEEPS[0]}; add it")
        return self


class Target(BaseModel):
    """Where a rescaled checkpoint shall go, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    dtype: str = RESCUE_DTYPES[0]
    """Of ``RESCUE_DTYPES``."""
    force: bool = False
    """Replace an earlier export."""
    keep: bool = False
    """Keep it although it could not be verified."""


class GenerateSettings(BaseModel):
    """What a generation can be told beside its guards; every field is also a flag. None: as the checkpoint says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dtype: str = "fp16"
    prompts: str | None = None
    chat: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    do_sample: bool | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    attention: str | None = None
    guards: str = "default"
    """Profile of the guards, by name or file; their settings are in the record one by one."""
    on_failure: str | None = None

    @field_validator("dtype", "attention")
    @classmethod
    def _known_word(cls, value: str | None, info: ValidationInfo) -> str | None:
        table, what = (DTYPES, "dtype") if info.field_name == "dtype" else (ATTENTION, "implementation")
        return None if value is None else known(value, table, what)

    @model_validator(mode="before")
    @classmethod
    def _without_guards(cls, data: Any) -> Any:
        """``no_guards`` is no setting of its own: it is the profile ``off``."""
        if not isinstance(data, dict) or not data.get("no_guards"):
            return {key: value for key, value in data.items() if key != "no_guards"} if isinstance(data, dict) else data
        if "guards" in data or "on_failure" in data:
            raise ValueError("--no-guards: goes with neither --guards nor --on-failure; give one of them")
        return {**{key: value for key, value in data.items() if key != "no_guards"}, "guards": "off"}

    @field_validator("temperature")
    @classmethod
    def _warm(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(f"should be above 0, not {value:g}; for the likeliest token at every step use --greedy")
        return value


def load_generate_settings(flags: dict[str, Any], no_guards: bool = False) -> GenerateSettings:
    """Settings from the flags that were given (None means not given).

    Raises:
        UsageError: a wrong value, or flags that do not go together; the flag is named.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return GenerateSettings.model_validate({**given, "no_guards": no_guards})
    except ValidationError as error:
        key, message = first_error(error)
        raise UsageError(f"{flag_of(key)}: {message}." if key else f"{message}.") from error


def load_target(
    folder: Path | None, settings: ProbeSettings, output: Path, dtype: str | None, force: bool, keep: bool
) -> Target | None:
    """Where a rescaled checkpoint shall go; None where nobody asked for one.

    Args:
        folder: of ``--rescue-to``.
        settings: of the probe; it must run what a rescue is made from.
        output: where the run is saved.
        dtype, force, keep: the flags that go with the folder.

    Raises:
        UsageError: flags that do not go together.
    """
    if folder is None:
        flags = {"--rescue-dtype": dtype, "--keep-unverified": keep}
        alone = next((flag for flag, value in flags.items() if value), None)
        if alone is not None:
            raise UsageError(f"{alone}: says how to write a rescued checkpoint; add --rescue-to FOLDER.")
        return None
    if RESCUED not in settings.dtypes:
        raise UsageError("--rescue-to: makes a checkpoint safe in fp16, which --dtype leaves out; add --dtype fp16.")
    if not settings.reference:
        raise UsageError("--rescue-to: needs the fp32 reference; leave --no-reference out.")
    real = Path(os.path.realpath(output))
    if Path(os.path.realpath(folder)) in (real, *real.parents):
        raise UsageError(f"-o {output}: lies in the folder of --rescue-to, which is written whole; choose another.")
    return Target(folder=folder, dtype=dtype or RESCUE_DTYPES[0], force=force, keep=keep)


def _flags_in(info: ValidationInfo) -> set[str]:
    """Settings that were given as flags, and not by a profile or by default."""
    return set((info.context or {}).get("flags", ()))


def known(value: str, table: Iterable[str], what: str) -> str:
    """``value``, if it is in the table.

    Raises:
        ValueError: it is not; pydantic makes a finding of it that names the key.
    """
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}; expected {alternatives(table)}")
    return value


def alternatives(table: Iterable[str]) -> str:
    """ "a, b or c", for a message."""
    names: list[str] = [str(name) for name in table]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def configs_folder() -> Path:
    """Where the profiles and prompt sets lie: in the wheel, or in the source tree of an editable install."""
    inside = Path(str(resources.files("qwen_precision"))) / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "configs"


def profile_names() -> list[str]:
    """The profiles that come with qprec."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def load_settings(profile: str | None, flags: dict[str, Any]) -> ProbeSettings:
    """Settings from a profile and the flags that were given (None means not given).

    Raises:
        UsageError: no such profile, not YAML, an unknown key or a wrong value; the key is named.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    data = _read_profile(profile) if profile else {}
    source = f"--config {profile}: " if profile else ""
    unknown = [key for key in data if key not in ProbeSettings.model_fields]
    if unknown:
        hint = near_or_known(str(unknown[0]), ProbeSettings.model_fields)
        raise UsageError(f"{source}unknown key {unknown[0]!r}; {hint}")
    merged = {**data, **given}
    if merged.get("reference") is False and "dtypes" not in merged:
        merged["dtypes"] = [name for name in DTYPES if name != REFERENCE]  # nobody asked for the costly one
    try:
        return ProbeSettings.model_validate(merged, context={"flags": set(given)})
    except ValidationError as error:
        key, message = first_error(error)
        where = flag_of(key) if key in given else f"{source}{key}"
        raise UsageError(f"{where}: {message}." if key else f"{message}.") from error


_FLAGS = {"dtypes": "--dtype", "attention": "--attn", "reference": "--no-reference"}


def flag_of(key: str) -> str:
    """The command-line option of a setting."""
    return _FLAGS.get(key, "--" + key.replace("_", "-"))


def first_error(error: ValidationError) -> tuple[str, str]:
    """Key and message (as a part of a sentence) of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return ".".join(str(part) for part in first["loc"]), f"{message[0].lower()}{message[1:]}"


def near_or_known(word: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The end of a sentence about a word that is not in a table: the nearest that is, or all of them.

    ``cutoff`` is how alike they must be, from 0 to 1.
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."


def _read_profile(profile: str) -> dict[str, Any]:
    path = Path(profile)
    if not path.suffix and profile in profile_names():
        path = configs_folder() / f"{profile}.yaml"
    data = read_yaml(path, f"--config {profile}", f"a file or one of the profiles {', '.join(profile_names())}")
    if not isinstance(data, dict):
        raise UsageError(f"--config {profile}: should hold keys and values, like `memory: streamed`.")
    return data


def read_yaml(path: Path, label: str, expected: str) -> Any:
    """Parse a YAML file with the safe loader (no tags that build objects).

    Raises:
        UsageError: unreadable, too large or not YAML; the message names the place.
    """
    text = read_text(path, MAX_CONFIG_BYTES, label, expected)
    try:
        return yaml.load(text, _Loader)
    except _TooMany as error:
        raise UsageError(f"{label}: {path} holds more than {_MOST_NODES:,} values; prompts fit into JSONL.") from error
    except Exception as error:  # a tag's own constructor raises what it likes: `!!bool x` is a KeyError
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{label}: {path}{place} is not valid YAML; expected {expected}.") from error


_MOST_NODES = 100_000
"""Values of a YAML file: its reader takes 30 µs for each. The one in C is ten times as fast, and dies of ``[[[[[…``."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SIXTY = "(?::[0-5]?[0-9])+"
"""In the patterns of numbers: to the base of 60, as 1:30. What that comes to takes the square of their length."""


def _without_sixty(pattern: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(pattern.pattern.replace(_SIXTY, "(?!)"), pattern.flags)


class _TooMany(Exception):
    """Of values in a YAML file."""


class _Loader(yaml.SafeLoader):
    """Without merge keys (thirty lines of them stand for more than any memory holds), numbers to the base of 60, half
    characters, and more values than a file of settings or prompts has."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count them as they come."""
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise _TooMany
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        """Refuse a lone surrogate, which no file could be written with."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not is_whole(value):
            raise yaml.constructor.ConstructorError(None, None, "half a character", node.start_mark)
        if node.tag in _NUMBERS and ":" in str(value):  # said to be one: `!!int 1:30`
            raise yaml.constructor.ConstructorError(None, None, "a number to the base of 60", node.start_mark)
        return value

    def flatten_mapping(self, node: Any) -> None:
        """Refuse `<<`."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys are not read", key.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _without_sixty(pattern)) for tag, pattern in told]
    for first, told in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
