"""What a checkpoint's small files say, before anything is made of it: types and bounds, in one place.

transformers builds what a config asks for, and fails late, in words of its own. What this program itself computes with
is checked here; what only a family's own code reads may fail there, and is a sentence too (``foreign_faults``).
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwen_precision.errors import ENDS, QprecError, in_one_line, is_ours
from qwen_precision.files import is_whole
from qwen_precision.model.index import read_json
from qwen_precision.model.steps import MOST_BYTES, MOST_VALUES

_MOST_CONFIG = 4 << 20  # bytes of a file of settings: a config.json with names for 20,000 labels has one million
_READ = ("*.json", "*.txt", "*.jinja", "*.model")
"""Files that transformers reads of a folder, beside the weights."""

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_MOST_LAYERS = 2000
_MOST_EXPERTS = 600_000  # of all layers together: Kimi K2 has 23,000, Doge 524,000 without a module for each
_Layers = Annotated[int, Field(ge=0, le=_MOST_LAYERS)]
_Experts = Annotated[int, Field(ge=0, le=20_000)]
_Labels = Annotated[int, Field(ge=0, le=100_000)]


class _Config(BaseModel):
    """Keys that this program computes with, and keys that say how much transformers builds."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: _Size | None = None
    hidden_size: _Size | list[_Size] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, lt=2**40)] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tie_word_embeddings: bool | None = None
    moe_intermediate_size: int | list[int] | None = None
    num_hidden_layers: _Layers | None = None
    num_layers: _Layers | None = None
    n_layer: _Layers | None = None
    n_layers: _Layers | None = None
    encoder_layers: _Layers | None = None
    decoder_layers: _Layers | None = None
    num_experts: _Experts | list[_Experts] | None = None
    num_local_experts: _Experts | None = None
    n_routed_experts: _Experts | None = None
    num_labels: _Labels | None = None
    attention_types: list[Any] | None = None

    @field_validator("attention_types")
    @classmethod
    def _few_types(cls, value: list[Any] | None) -> list[Any] | None:
        """GPT-Neo writes a layer's type once, with how many layers have it."""
        told = [each for each in value or () if isinstance(each, list) and len(each) == 2 and _is_a_list_of(*each)]
        if sum(len(kinds) * count for kinds, count in told) > _MOST_LAYERS:
            raise ValueError(f"stands for more than {_MOST_LAYERS} layers")
        return value

    @model_validator(mode="after")
    def _few_experts(self) -> "_Config":
        layers = max(filter(None, (getattr(self, key) for key in _LAYERS)), default=1)
        experts = [getattr(self, key) or 0 for key in ("num_experts", "num_local_experts", "n_routed_experts")]
        most = max(max(each, default=0) if isinstance(each, list) else each for each in experts)
        if layers * most > _MOST_EXPERTS:
            raise ValueError(f"asks for {layers * most:,} experts in all layers; {_MOST_EXPERTS:,} are the most")
        return self


_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def _is_a_list_of(kinds: Any, count: Any) -> bool:
    return isinstance(kinds, list) and isinstance(count, int)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; nothing else that transformers will read of the folder can hang it.

    Raises:
        QprecError: a value of it, or a file beside it, is refused; the message names it.
    """
    for pattern in _READ:
        for path in folder.glob(pattern):
            _check_file(path)
    path = folder / "config.json"
    raw = read_json(path, "every checkpoint has one; is this the right folder?", _MOST_CONFIG)
    check_values(path, raw)
    for key, part in _parts(raw):
        try:
            _Config.model_validate(part)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = key + ".".join(str(each) for each in first["loc"] if isinstance(each, int) or each in part)
            said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
            raise QprecError(f"{path}: {f'{where}: ' if where else ''}{said}; compare it with the hub's.") from error
    _check_sizes(path, raw)
    return raw


def _parts(part: dict[str, Any], before: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each config in a config, by what its keys begin with: at the top any object, below it what is called one."""
    yield before, part
    for key, value in part.items():
        if isinstance(value, dict) and (not before or key.endswith("config")):
            yield from _parts(value, f"{before}{key}.")


_MOST_SIZE = 1 << 22
_NO_SIZE = re.compile(
    "token|vocab|_ids?$|_index$|position|length|seq|context|ctx|theta|rate|chunk|window|pixel|seed|base|freq|param|train|"
    "step|time|period|offset|max_|embeddings$"
)
"""In the name of a number that may be large, because nothing is made as large as it: an id, a bound, a base."""


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """No number that could say how large something is, at any depth, is larger than anything of a model."""
    stack: list[tuple[str, Any]] = list(raw.items())
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.items())
        elif isinstance(value, list):
            stack.extend((key, each) for each in value)
        elif type(value) is int and value > _MOST_SIZE and not _NO_SIZE.search(key):
            raise QprecError(f"{path}: {ascii(key)[1:-1]}: {value:,} is no size; compare it with the hub's.")


def _check_file(path: Path) -> None:
    """A pipe would be waited for, a device read without end."""
    if path.is_dir() or (path.is_symlink() and not path.exists()):
        return
    most = _MOST_CONFIG if path.name.endswith("config.json") else MOST_BYTES
    if not path.is_file():
        raise QprecError(f"{path}: is no regular file; download the checkpoint again.")
    if path.stat().st_size > most:
        raise QprecError(f"{path}: is larger than {most >> 20} MiB; download the checkpoint again.")
    if path.suffix == ".json" and path.stat().st_size > _MOST_CONFIG and _values(path) > MOST_VALUES:
        raise QprecError(f"{path}: holds more than {MOST_VALUES:,} values; download the checkpoint again.")


def _values(path: Path) -> int:
    """How many values a JSON file holds, counted before any of them is made."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found += part.count(b",") + part.count(b"[") + part.count(b"{")
    return found


def check_values(path: Path, data: dict[str, Any]) -> None:
    """No number that is none or that no machine holds, no half character, anywhere in a JSON file.

    Raises:
        QprecError: there is one; the message names the key at the top that it is under.
    """
    for key, value in data.items():
        for each in _leaves({key: value}):
            wrong = _wrong(each)
            if wrong is not None:
                name = key if is_whole(key) else ascii(key)
                raise QprecError(f"{path}: {name}: holds {wrong}; compare it with the hub's.")


def _wrong(value: Any) -> str | None:
    if isinstance(value, str) and not is_whole(value):
        return "half a character"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >= 2**63 else None


def _leaves(value: Any) -> Iterator[Any]:
    """Every key and every value that holds no other."""
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, dict):
            stack.extend(each)
            stack.extend(each.values())
        elif isinstance(each, list):
            stack.extend(each)
        else:
            yield each


def tamed(config: PretrainedConfig) -> PretrainedConfig:
    """The config without switches that say what a forward gives out and nothing of how it computes."""
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        part.return_dict, part.output_hidden_states = True, False
        if getattr(part, "output_attentions", False):  # a property that some implementations of attention refuse
            part.output_attentions = False
    return config


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What of the tokenizer's own settings is computed with.

    Raises:
        QprecError: a setting is of another type.
    """
    longest: Any = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or math.isnan(longest):
        path = folder / "tokenizer_config.json"
        raise QprecError(f"{path}: model_max_length: should be a number, not {str(longest)[:40]!r}.")


@contextmanager
def foreign_faults(folder: Path) -> Iterator[None]:
    """What the code of others raises over a checkpoint's values, as a sentence; what our own raises stays a bug."""
    try:
        yield
    except (QprecError, MemoryError, torch.OutOfMemoryError, *ENDS):
        raise
    except BaseException as error:
        if is_ours(error):
            raise
        raise QprecError(fault(folder, error)) from error


def fault(folder: Path, error: BaseException) -> str:
    """The sentence of ``foreign_faults``."""
    return (
        f"{folder}: transformers fails on this checkpoint ({in_one_line(error)}); a value of its config.json or of its "
        f"tokenizer's files is not what the model expects (compare them with the hub's), or torch {torch.__version__} "
        "not what this transformers needs."
    )
