"""What a checkpoint's small files say, before anything is made of it: types and bounds, in one place.

transformers builds what a config asks for, and fails late, in words of its own. What this program itself computes with
is checked here; what only a family's own code reads may fail there, and is a sentence too (``foreign_faults``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwen_precision.errors import ENDS, QprecError, in_one_line, is_ours
from qwen_precision.files import is_whole
from qwen_precision.model.index import MAX_JSON, read_json

_MOST_CONFIG = 4 << 20  # bytes of a config.json: one with names for 20,000 labels has one million
_MOST_TOKENIZER = 256 << 20  # bytes of a tokenizer's file
_READ = ("*.json", "*.txt", "*.jinja", "*.model")
"""Files that transformers reads of a folder, beside the weights."""

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Layers = Annotated[int, Field(ge=0, le=2000)]
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
    for key, part in (("", raw), *((f"{key}.", value) for key, value in raw.items() if isinstance(value, dict))):
        try:
            _Config.model_validate(part)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = key + ".".join(str(each) for each in first["loc"] if isinstance(each, int) or each in part)
            raise QprecError(
                f"{path}: {where}: {first['msg'].removeprefix('Input ')}; compare it with the hub's."
            ) from error
    return raw


def _check_file(path: Path) -> None:
    """A pipe would be waited for, a device read without end."""
    if path.is_dir() or (path.is_symlink() and not path.exists()):
        return
    most = MAX_JSON if path.name.endswith("config.json") else _MOST_TOKENIZER
    if not path.is_file():
        raise QprecError(f"{path}: is no regular file; download the checkpoint again.")
    if path.stat().st_size > most:
        raise QprecError(f"{path}: is larger than {most >> 20} MiB; download the checkpoint again.")


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
        "tokenizer's files is not what the model expects: compare them with the hub's."
    )
