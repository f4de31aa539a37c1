"""The tensors of a checkpoint folder: names, formats, shapes and places, from its files' headers; no weight is read.

Everything comes from strangers, so it is checked before it is used: safetensors only (a pickle can run code when it
is loaded, so it is refused), every shard present and as long as its header says, every tensor the index names in its
shard.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_precision.errors import QprecError

FLOAT_TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
"""Weight formats that can be probed, by safetensors' name."""

_MAX_HEADER = 100_000_000  # safetensors' own bound on its header


@dataclass(frozen=True)
class Packed:
    """One weight that the files keep as several tensors: quantised numbers, their scales and more."""

    what: str
    """The scheme in words."""
    names: dict[str, str]
    """By role: the tensor's name in the files."""
    infos: "dict[str, TensorInfo]"
    """By role: where it lies."""
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    """From its parts by role to the weight in float32; raises ValueError where they contradict each other."""
    scales: tuple[str, ...]
    """Roles that are scales; the first is the one of the blocks."""
    turned: bool
    """Whether scales are ``[across, down]`` of the weight."""
    by_rows: bool = False
    """Whether rows of its parts make the same rows of the weight."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; of a quantised weight, where the tensor does that stands in its place."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    size: int
    """Bytes, of a quantised weight those of all its parts."""
    packed: Packed | None = None
    """How a quantised weight is kept; its shape is then that of the weight."""
    read: Callable[[Path, slice], Tensor] | None = None
    """Reads some of its rows from the file, where that is no safetensors."""

    @property
    def places(self) -> "list[TensorInfo]":
        """Where the bytes lie."""
        return [self] if self.packed is None else list(self.packed.infos.values())

    @property
    def given_out(self) -> int:
        """Bytes that it takes once it is read: a quantised weight becomes float32."""
        return self.size if self.packed is None else 4 * self.elements

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file of the folder.

    Raises:
        QprecError: it is missing (``why`` says what that means) or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QprecError(f"{path}: missing; {why}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise QprecError(f"{path}: is not readable JSON; download the checkpoint again.") from error
    if not isinstance(data, dict):
        raise QprecError(f"{path}: should hold a JSON object; download the checkpoint again.")
    return data


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder, from the index file or the single file.

    Raises:
        QprecError: there is none, or a file is missing, truncated or at odds with the index; the message names it.
    """
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # transformers takes the single file where both are there
        return _read_header(single)
    if index_path.is_file():
        weight_map = read_json(index_path, "").get("weight_map")
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
