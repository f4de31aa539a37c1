"""The tensors of a checkpoint folder: names, formats, shapes and places, from its files' headers; no weight is read.

Everything comes from strangers, so it is checked before it is used: safetensors only (a pickle can run code when it
is loaded, so it is refused), every shard present and as long as its header says, every tensor the index names in its
shard.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_precision.errors import QprecError
from qwen_precision.files import Unreadable, is_whole, read_small
from qwen_precision.record import check_count

FLOAT_TYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
"""Weight formats that can be probed, by safetensors' name."""

MAX_JSON = 64 * 1024 * 1024
"""Bytes of a JSON file of a checkpoint; an index of 18,000 tensors has two millions."""

MAX_VALUES = 2_000_000
"""Values of such a file, and of a header: nine a tensor, of which the largest mixtures have 100,000."""

_WIDTHS = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    6: "F6_E2M3 F6_E3M2",
    4: "F4",
}
BITS = {name: bits for bits, names in _WIDTHS.items() for name in names.split()}
"""Of one number, by safetensors' name of its format."""

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
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale of the first role, where the last of them may be cut short."""
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
    stamp: tuple[int, int] | None = None
    """Bytes and time (ns) of the file when its header was read: with others it is another file."""

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


def read_json(path: Path, why: str, most: int = MAX_JSON, values: int = MAX_VALUES) -> dict[str, Any]:
    """A JSON object from a file of the folder, of so many bytes and values at most.

    Raises:
        QprecError: it is missing (``why`` says what that means) or is no JSON object.
    """
    try:
        text = read_small(path, most)
        _check_values(path, text, values)
        data = json.loads(text)
    except FileNotFoundError as error:
        raise QprecError(f"{path}: missing; {why}") from error
    except Unreadable as error:
        raise QprecError(f"{path}: {error}; download the checkpoint again.") from error
    except (ValueError, RecursionError) as error:
        raise QprecError(f"{path}: is not readable JSON; download the checkpoint again.") from error
    if not isinstance(data, dict):
        raise QprecError(f"{path}: should hold a JSON object; download the checkpoint again.")
    return data


def _check_values(path: Path, text: bytes, most: int) -> None:
    """Each takes up to a hundred bytes once it is an object."""
    try:
        check_count(text, most)
    except ValueError as error:
        raise QprecError(f"{path}: holds {error}, more than {most:,}; download the checkpoint again.") from error


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder, from the index file or the single file.

    Raises:
        QprecError: there is none, or a file is missing, truncated or at odds with the index; the message names it.
    """
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # transformers takes the single file where both are there
        return read_header(single)
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
        if Path(file).name != file or "\0" in file or not is_whole(file):
            raise QprecError(f"{index_path}: names the shard {file!r} outside its folder; this is refused.")
        if len(os.fsencode(file)) > 255 or not (folder / file).is_file():
            raise QprecError(f"{folder / file}: this shard is missing; download the checkpoint again.")
        headers[file] = read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise QprecError(
                f"{index_path}: puts the tensor {name} into {file}, which does not hold it; download both again."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file (8 bytes of length, JSON, data), checked against the file's size.

    Format: https://github.com/huggingface/safetensors#format

    Raises:
        QprecError: it is no such file, or says what cannot be true of it.
    """
    broken = f"{path}: truncated or not a safetensors file; download it again."
    try:
        with path.open("rb") as file:
            told = os.fstat(file.fileno())
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, told.st_size):
                raise QprecError(broken)
            text = file.read(length)
        _check_values(path, text, MAX_VALUES)
        header = json.loads(text)
        header.pop("__metadata__", None)
        begin, stamp = 8 + length, (told.st_size, told.st_mtime_ns)
        infos = {name: _info(path.name, entry, begin, stamp) for name, entry in header.items()}
    except OSError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QprecError(broken) from error
    _check_places(path, infos, begin, told.st_size)
    return infos


def _info(file: str, entry: dict[str, Any], begin: int, stamp: tuple[int, int]) -> TensorInfo:
    """One tensor of a header; raises ValueError, KeyError or TypeError where it is none."""
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(each) is int and 0 <= each < 2**63 for each in (start, end, *shape)):
        raise ValueError
    return TensorInfo(file, str(entry["dtype"]), shape, begin + start, end - start, stamp=stamp)


def _check_places(path: Path, infos: dict[str, TensorInfo], begin: int, total: int) -> None:
    """Each tensor has the bytes that its shape asks for, and they lie one behind the other, up to the file's end."""
    end = begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].size)):
        bits = BITS.get(info.dtype)
        if bits is not None and info.elements * bits != 8 * info.size:
            raise QprecError(
                f"{path}: {name} is {info.dtype} of shape {list(info.shape)} in {info.size} bytes, which it does not "
                "fit; download it again."
            )
        if info.start != end:
            raise QprecError(f"{path}: {name} does not begin where the tensor before it ends; download it again.")
        end += info.size
    if end > total:
        raise QprecError(
            f"{path}: truncated: its header promises {end} bytes, the file has {total}; download it again."
        )
    if end < total:
        raise QprecError(f"{path}: has {total - end} bytes more than its header tells of; download it again.")
