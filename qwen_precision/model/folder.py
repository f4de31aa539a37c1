"""A checkpoint on disk: its config, its tokenizer and an index of its tensors; no weight is read here.

Everything comes from strangers, so it is checked before it is used: safetensors only (a pickle can run code
when it is loaded, so it is refused), every shard present and as long as its header says, every tensor the
index names in its shard. Nothing of the checkpoint's own Python code is ever run.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.qwen3 import EMBEDDING, HEAD
from qwen_precision.record import Model

FLOAT_TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
"""Weight formats that can be probed, by safetensors' name."""

_WITHOUT_HEAD = frozenset(("Qwen3Model", "Qwen3MoeModel"))
"""Architectures that are the causal language model but for its lm_head."""

_MAX_HEADER = 100_000_000  # safetensors' own bound on its header


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    size: int
    """Bytes."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder."""

    folder: Path
    source: str
    """What the user typed."""
    revision: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, TensorInfo]

    @property
    def text_config(self) -> Any:
        """What of the config is about text: all of it, or a part, where the model reads images too."""
        return self.config.get_text_config()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many numbers all tensors hold."""
        return sum(info.elements for info in self.tensors.values())

    @property
    def bare(self) -> bool:
        """Whether this is a model without lm_head, as embedding models are: its answer is its final hidden states.

        A tied one has no lm_head in its files either way; there the names tell what it was saved from.
        """
        if not _names_a_head(self.config.architectures):
            return True
        saved_bare = not getattr(self.config, "tie_word_embeddings", False) or EMBEDDING in self.tensors
        return HEAD not in self.tensors and saved_bare

    @property
    def source_dtype(self) -> str:
        """The format that most of the numbers are in."""
        count: dict[str, int] = {}
        for info in self.tensors.values():
            count[info.dtype] = count.get(info.dtype, 0) + info.elements
        return max(count, key=lambda name: count[name])


def model_part(checkpoint: Checkpoint, source: str, architecture: str, layers: int) -> Model:
    """What the record says of a checkpoint.

    Args:
        checkpoint: a checked checkpoint.
        source: what the user typed.
        architecture: class of the model.
        layers: how many decoder layers it has.
    """
    config = checkpoint.text_config
    return Model(
        source=source,
        revision=checkpoint.revision,
        architecture=architecture,
        layers=layers,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=checkpoint.parameters,
        weight_bytes=checkpoint.weight_bytes,
        source_dtype=checkpoint.source_dtype,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
    )


def open_checkpoint(folder: Path, source: str, revision: str | None = None) -> Checkpoint:
    """Check a folder and read all that is small.

    Raises:
        QprecError: the folder is not a causal language model in safetensors, or it is damaged; the message
            names the file.
    """
    if not folder.is_dir():
        raise QprecError(f"{source}: is not a folder; give a checkpoint folder, a hub id (owner/name) or `demo`.")
    raw = _read_json(folder / "config.json", "every checkpoint has one; is this the right folder?")
    _check_config(raw, folder)
    config = _load_config(folder)
    tensors = _index(folder)
    _check_floats(tensors, folder)
    return Checkpoint(folder, source, revision, config, _load_tokenizer(folder), tensors)


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QprecError(f"{path}: missing; {why}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise QprecError(f"{path}: is not readable JSON; download the checkpoint again.") from error
    if not isinstance(data, dict):
        raise QprecError(f"{path}: should hold a JSON object; download the checkpoint again.")
    return data


def _check_config(raw: dict[str, Any], folder: Path) -> None:
    path = folder / "config.json"
    if "auto_map" in raw:
        raise QprecError(f"{path}: this model needs Python code of its own, which qprec does not run.")
    names = raw.get("architectures") or []
    known = isinstance(names, list) and any(_is_known(str(name)) for name in names)
    if not known:
        found = ", ".join(map(str, names)) if isinstance(names, list) and names else "no architecture"
        raise QprecError(f"{path}: names {found}, which this transformers does not have; try a newer one.")
    if raw.get("quantization_config"):
        raise QprecError(f"{path}: the weights are quantised; probe the checkpoint they were made from.")


def _is_known(name: str) -> bool:
    """Whether transformers has a model of this name; a causal one may be of a class of its own maker."""
    return name.endswith("ForCausalLM") or isinstance(getattr(transformers, name, None), type)


def _names_a_head(architectures: Any) -> bool:
    return any(str(name).endswith("ForCausalLM") for name in architectures or [])


def _load_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the broken value leads to
        raise QprecError(f"{folder / 'config.json'}: transformers cannot read it: {in_one_line(error)}") from error
    if not isinstance(config, PretrainedConfig):
        raise QprecError(f"{folder / 'config.json'}: transformers cannot read it.")
    return config


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above: any broken tokenizer file
        raise QprecError(f"{folder}: no usable tokenizer (tokenizer.json): {in_one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) < 2:
        # Without any of its files transformers makes an empty one.
        raise QprecError(f"{folder}: no usable tokenizer (tokenizer.json is missing); download the checkpoint again.")
    return tokenizer


def _index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder, from the index file or the single file."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # transformers takes the single file where both are there
        return _read_header(single)
    if index_path.is_file():
        weight_map = _read_json(index_path, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise QprecError(f"{index_path}: has no weight_map; download the checkpoint again.")
        return _from_index(folder, index_path, {str(name): str(file) for name, file in weight_map.items()})
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise QprecError(
            f"{folder / pickles[0]}: only pickle weights here, which can run code when loaded; "
            "convert them to safetensors (transformers: model.save_pretrained)."
        )
    raise QprecError(f"{folder}: no weights here (model.safetensors or model.safetensors.index.json).")


def _from_index(folder: Path, index_path: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise QprecError(f"{index_path}: names the shard {file!r} outside its folder; this is refused.")
        if not (folder / file).is_file():
            raise QprecError(f"{folder / file}: this shard is missing; download the checkpoint again.")
        headers[file] = _read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise QprecError(
                f"{index_path}: puts the tensor {name} into {file}, which does not hold it; download both again."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file (8 bytes of length, JSON, data), checked against the file's size.

    Format: https://github.com/huggingface/safetensors#format
    """
    broken = f"{path}: truncated or not a safetensors file; download it again."
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, total):
                raise QprecError(broken)
            header = json.loads(file.read(length))
        infos = {
            name: TensorInfo(
                path.name,
                str(entry["dtype"]),
                tuple(int(extent) for extent in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise QprecError(broken) from error
    end = max((info.start + info.size for info in infos.values()), default=8 + length)
    if end > total:
        raise QprecError(
            f"{path}: truncated: its header promises {end} bytes, the file has {total}; download it again."
        )
    return infos


def _check_floats(tensors: dict[str, TensorInfo], folder: Path) -> None:
    for name, info in tensors.items():
        if info.dtype not in FLOAT_TYPES:
            raise QprecError(
                f"{folder / info.file}: {name} is stored as {info.dtype}; qprec reads F16, BF16, F32 and F64 weights."
            )
