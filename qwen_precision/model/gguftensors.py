"""The tensors of a GGUF file by the names of the model's parameters: which one becomes which, and how.

Names and the changes that llama.cpp made (rows of q and k in another order, one added to Gemma's norms) are taken back
by transformers' own table; a format becomes float32 by the library ``gguf``, as transformers does it. What keeps its
order can be read a few rows at a time.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from qwen_precision.errors import QprecError, in_one_line
from qwen_precision.model.ggufheader import Header, Stored
from qwen_precision.model.ggufmodel import Told
from qwen_precision.model.index import Packed, TensorInfo
from qwen_precision.model.skeleton import outline
from qwen_precision.qwen3 import HEAD

_PLAIN = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
"""Formats that are numbers already, by ggml's number."""


@dataclass(frozen=True)
class _Format:
    name: str
    block: int
    """Numbers that are kept together."""
    size: int
    """Bytes of a block."""

    def row(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.block * self.size


def read_tensors(
    header: Header, config: PretrainedConfig, told: Told, path: Path
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The index, and the names of tensors that no parameter is made of.

    Raises:
        QprecError: a format is not known, a parameter is missing or of another shape, or the file is shorter than its
            header says.
    """
    formats = {stored.name: _format(stored, path) for stored in header.tensors}
    for stored in header.tensors:
        _check_place(stored, formats[stored.name], header, path)
    try:
        model = outline(config, None)
    except QprecError as error:
        raise QprecError(f"{path}: its keys are no model: {str(error).removeprefix('config.json: ')}") from error
    change = _Change(header.architecture, told, model, path)
    groups: dict[str, list[Stored]] = {}
    unused = []
    for stored in header.tensors:
        parameter = change.parameter(stored.name)
        if parameter is None:
            unused.append(stored.name)
        else:
            groups.setdefault(parameter, []).append(stored)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    index = {name: _info(name, group, formats, change, shapes[name]) for name, group in groups.items()}
    _check_parameters(model, {name: (groups[name][0].name, info.shape) for name, info in index.items()}, path)
    return index, unused


def _check_parameters(model: nn.Module, found: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Every parameter must be there, in its shape; ``found`` has its name in the file and the shape by its own name."""
    tied = {HEAD} if getattr(model.config, "tie_word_embeddings", False) else set()
    for name, parameter in model.named_parameters():
        if name not in found and name not in tied:
            raise QprecError(
                f"{path}: no tensor becomes {name}; the file is incomplete, or its keys are another model's."
            )
        stored, shape = found.get(name, ("", tuple(parameter.shape)))
        if shape != tuple(parameter.shape):
            raise QprecError(
                f"{path}: {stored} has shape {list(shape)}, its keys ask for {list(parameter.shape)}; the two do not "
                "belong together."
            )


def _format(stored: Stored, path: Path) -> _Format:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(stored.kind)
        block, size = GGML_QUANT_SIZES[kind]
        if stored.kind not in _PLAIN:
            dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise QprecError(
            f"{path.with_name(stored.file)}: {stored.name} is in a format (ggml's number {stored.kind}) that the "
            "installed gguf cannot read; try a newer one (pip install --upgrade gguf)."
        ) from error
    return _Format(kind.name, block, size)


def _check_place(stored: Stored, form: _Format, header: Header, path: Path) -> None:
    end, total = stored.start + _bytes(stored, form), header.sizes[stored.file]
    if stored.shape[-1] % form.block or 0 in stored.shape or end > total:
        raise QprecError(
            f"{path.with_name(stored.file)}: truncated or broken: its header promises {end} bytes for {stored.name}, "
            f"the file has {total}; download it again."
        )


def _bytes(stored: Stored, form: _Format) -> int:
    return math.prod(stored.shape[:-1]) * form.row(stored.shape[-1])


class _Names:
    """A model as far as transformers' map of names looks at it; it would ask every module of it, for minutes.

    Args:
        module: the model or a part of it.
        deep: how far down its parts are shown: some files have the names of the model without its lm_head.
    """

    def __init__(self, module: Any, deep: int) -> None:
        self.config, self.state_dict, self._module, self._deep = module.config, module.state_dict, module, deep

    def named_children(self) -> list[tuple[str, "_Names"]]:
        """Its parts that have a config, as models have."""
        parts = self._module.named_children() if self._deep else ()
        return [(name, _Names(part, self._deep - 1)) for name, part in parts if hasattr(part, "config")]


class _Change:
    """What transformers does to a tensor of the file before it is a parameter.

    Args:
        architecture: in llama.cpp's words.
        told: settings of the config, as read from the file.
        model: on the meta device.
        path: the file, for messages.
    """

    def __init__(self, architecture: str, told: Told, model: nn.Module, path: Path) -> None:
        self.path = path
        made: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor: Any = made(config=told)
        ask: Any = get_gguf_hf_weights_map
        takes = (self._processor,) if "processor" in inspect.signature(ask).parameters else ()
        self._names: dict[str, str] = ask(_Names(model, 1), *takes)
        self._known = set(model.state_dict())

    def parameter(self, name: str) -> str | None:
        """The parameter that a tensor becomes, or a part of; None where it becomes none."""
        found = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
        return found if found in self._known else None

    def none(self, stored: Stored) -> bool:
        """Whether the tensor stays as it is, row by row."""
        probe = np.zeros((1,) * len(stored.shape), dtype=np.float32)
        try:
            return self._process(stored, probe, {}).weights is probe
        except Exception:  # what sorts heads cannot do it to one number
            return False

    def apply(self, parameter: str, parts: Sequence[tuple[Stored, np.ndarray]]) -> Tensor:
        """A parameter in float32 from its tensors in float32."""
        held: dict[str, Tensor] = {}  # what is made of several comes out here
        out: Any = None
        for stored, weights in parts:
            out = self._process(stored, weights, held)
        return held[parameter] if parameter in held else torch.from_numpy(np.ascontiguousarray(out.weights))

    def _process(self, stored: Stored, weights: np.ndarray, held: dict[str, Tensor]) -> Any:
        return self._processor.process(
            weights=weights,
            name=stored.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": held},
        )


def _info(
    parameter: str, group: list[Stored], formats: Mapping[str, _Format], change: _Change, shape: tuple[int, ...]
) -> TensorInfo:
    """One parameter; its shape is checked against the file's here, or where it is made."""
    first, same = group[0], len(group) == 1 and change.none(group[0])
    counted = sum(math.prod(stored.shape) for stored in group) == math.prod(shape)
    shape = first.shape if same or not counted else shape
    size = sum(_bytes(stored, formats[stored.name]) for stored in group)
    packed = [formats[stored.name].name for stored in group if stored.kind not in _PLAIN]
    if not packed and len(group) == 1:
        name, dtype = _PLAIN[first.kind]
        keep = None if same else partial(_changed, parameter, first, change, shape)
        return TensorInfo(first.file, name, shape, first.start, size, read=partial(_plain, first, dtype, keep))
    infos = {
        stored.name: TensorInfo(
            stored.file,
            "U8",
            (*stored.shape[:-1], formats[stored.name].row(stored.shape[-1])),
            stored.start,
            _bytes(stored, formats[stored.name]),
            read=partial(_raw, stored, formats[stored.name]),
        )
        for stored in group
    }
    name = packed[0] if packed else "F32"
    unpack = partial(_unpacked, parameter, group, None if same else change, shape)
    how = Packed(f"GGUF {name}", {each: each for each in infos}, infos, unpack, (), False, by_rows=same)
    return TensorInfo(first.file, name, shape, first.start, size, packed=how)


def _raw(stored: Stored, form: _Format, path: Path, rows: slice) -> Tensor:
    """Bytes of some rows: ``[rows, ..., bytes of a row]``."""
    inner = (*stored.shape[1:-1], form.row(stored.shape[-1])) if len(stored.shape) > 1 else ()
    whole = stored.shape[0] if inner else form.row(stored.shape[0])
    begin, end, _ = rows.indices(whole)
    each = math.prod(inner)
    data = np.fromfile(path, dtype=np.uint8, count=(end - begin) * each, offset=stored.start + begin * each)
    if len(data) < (end - begin) * each:
        raise OSError(f"it ends within {stored.name}")
    return torch.from_numpy(data).reshape(end - begin, *inner)


def _plain(stored: Stored, dtype: torch.dtype, change: Any, path: Path, rows: slice) -> Tensor:
    """Some rows of a tensor that is numbers already; one that is changed is changed whole."""
    form = _Format("", 1, dtype.itemsize)
    if len(stored.shape) == 1:
        whole = _raw(stored, form, path, slice(None)).view(dtype)
        return (whole if change is None else change(whole))[rows]
    tensor = _raw(stored, form, path, slice(None) if change else rows).view(dtype)
    return tensor if change is None else change(tensor)[rows]


def _changed(parameter: str, stored: Stored, change: _Change, shape: tuple[int, ...], kept: Tensor) -> Tensor:
    """What transformers makes of it, in the format it is kept in where that holds it, else in float32."""
    wide = _checked(parameter, change, [(stored, kept.float().numpy())], shape)
    narrow = wide.to(kept.dtype)
    return narrow if torch.equal(narrow.float(), wide) else wide


def _unpacked(
    parameter: str, group: list[Stored], change: _Change | None, shape: tuple[int, ...], pieces: Mapping[str, Tensor]
) -> Tensor:
    """A parameter in float32 from the bytes of its tensors."""
    parts = [(stored, _dequantised(stored.kind, pieces[stored.name])) for stored in group]
    return torch.from_numpy(parts[0][1]) if change is None else _checked(parameter, change, parts, shape)


def _dequantised(kind: int, data: Tensor) -> np.ndarray:
    from gguf import GGMLQuantizationType, dequantize

    if kind in _PLAIN:
        return data.view(_PLAIN[kind][1]).float().numpy()
    with np.errstate(all="ignore"):  # a scale may be infinite: what it makes is found by the check of weights
        return np.asarray(dequantize(data.numpy(), GGMLQuantizationType(kind)), dtype=np.float32)


def _checked(
    parameter: str, change: _Change, parts: Sequence[tuple[Stored, np.ndarray]], shape: tuple[int, ...]
) -> Tensor:
    names = ", ".join(stored.name for stored, _ in parts)
    try:
        tensor = change.apply(parameter, parts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a broken number of heads leads to
        raise QprecError(
            f"{change.path}: transformers makes no {parameter} of {names}: {in_one_line(error)}"
        ) from error
    if tuple(tensor.shape) != shape:
        raise QprecError(
            f"{change.path}: {names} make {parameter} of shape {list(tensor.shape)}, {list(shape)} is expected."
        )
    return tensor
