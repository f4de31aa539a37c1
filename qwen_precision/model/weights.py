"""Weights, kept once and in the checkpoint's own dtype: whole (resident) or a module at a time (streamed).

``WeightStore`` gives a module's tensors as they are in the files (quantised ones as float32, so that every dtype is
cast from the same numbers); the rest of the code cannot tell whether they were on the device all along or read just
now. ``Scratch`` casts them into buffers that are used again
for the next layer, and puts them into the module: three dtypes cost the memory of one layer.
"""

import copy
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from qwen_precision.errors import QprecError
from qwen_precision.model.folder import Checkpoint
from qwen_precision.model.index import FLOAT_TYPES, Packed, TensorInfo
from qwen_precision.model.shards import Memory, opened, read_rows
from qwen_precision.model.skeleton import NotLayerwise
from qwen_precision.model.upload import Upload
from qwen_precision.model.weightcheck import WeightCheck
from qwen_precision.qwen3 import EMBEDDING, HEAD, Scale

_ROWS = 16384
"""Of an embedding, read at once where only some are wanted."""

_ALL = slice(None)


class WeightStore:
    """Tensors of a checkpoint by the names of the model's parameters.

    Args:
        checkpoint: a checked checkpoint.
        model: the model on the meta device; its parameter names and shapes are what is asked for.
        device: where tensors are given out.
        resident: keep all tensors (and so read each file once), or drop them after use.
        check: the static check; sees every tensor as it is read.
        scale: a rescaling that every tensor is given out with, exactly; None for the files' own values.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        device: torch.device,
        resident: bool,
        check: WeightCheck,
        scale: Scale | None = None,
    ) -> None:
        self._scale = scale
        self._checkpoint = checkpoint
        self._upload = Upload(device)
        self._reading = 0.0
        self._resident = resident
        self._check = check
        self._kept: dict[str, Tensor] = {}
        # What goes on to another device is gone from the host's memory at once, kept or not.
        self._memory = None if resident and device.type == "cpu" else Memory()
        self._prefix = getattr(model, "base_model_prefix", "model") + "."
        self._tied: dict[str, str] = _tied_names(model, checkpoint)
        self._fused = _Fusions(model, list(checkpoint.tensors))
        self._expect_all(model)

    def checked_before(self) -> "WeightStore":
        """The same tensors, and those that are kept, for whoever runs the model again: the check sees each once."""
        other = copy.copy(self)
        other._check, other._reading = WeightCheck([]), 0.0
        return other

    def _expect_all(self, model: nn.Module) -> None:
        """Every parameter must be in the files with the shape the config asks for.

        Raises:
            NotLayerwise: one is not, under its name in the model, and the files hold tensors of other names.
            QprecError: one is missing, or of another shape.
        """
        for name, parameter in model.named_parameters():
            parts = self.parts(name)
            if not parts and name != HEAD:
                if self.unused(model):
                    raise NotLayerwise(f"its files hold no {name}, but other tensors, which transformers may rename")
                raise QprecError(
                    f"{self._checkpoint.folder}: the tensor {name} is in none of its files; "
                    "the checkpoint is incomplete or its config.json is another model's."
                )
            check_formats(self._checkpoint, parts)
            if len(parts) == 1:
                found = self._checkpoint.tensors[parts[0]].shape
                if found != tuple(parameter.shape) and not self._fused.has(name):
                    raise QprecError(
                        f"{self._checkpoint.folder}: {parts[0]} has shape {list(found)}, config.json asks for "
                        f"{list(parameter.shape)}; the two do not belong together."
                    )

    def parts(self, name: str) -> list[str]:
        """Names in the files of what makes up one parameter; empty where it is missing."""
        name = self._tied.get(name, name)
        tensors = self._checkpoint.tensors
        if name == HEAD and self._checkpoint.bare:
            return []
        if name == HEAD and self._scale is not None and self._scale.rescaling.untied:
            name = self._prefix + EMBEDDING  # whatever copy the files hold, a tied model's lm_head is its embedding
        if name in tensors:
            return [name]
        # A checkpoint saved from the bare model (embedding models are) has no "model." in front.
        if name.startswith(self._prefix) and name.removeprefix(self._prefix) in tensors:
            return [name.removeprefix(self._prefix)]
        return self._fused.parts(name)

    def unused(self, model: nn.Module) -> list[str]:
        """Tensors of the files that no parameter of the model is made of."""
        used = {part for name, _ in model.named_parameters() for part in self.parts(name)} | {*self.parts(HEAD)}
        return [name for name in self._checkpoint.tensors if name not in used and name not in self._tied]

    def module(self, module: nn.Module, path: str) -> dict[str, Tensor]:
        """All parameters of one module, in the files' dtype, on the device; keys are relative names."""
        found = {name: self._started(f"{path}.{name}") for name, _ in module.named_parameters()}
        self._upload.finish()
        return found

    def tensor(self, name: str) -> Tensor:
        """One parameter; expert weights that the model keeps fused are put together here."""
        found = self._started(name)
        self._upload.finish()
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """What was done beside the computing: reading (with the static check), and copying to a card."""
        copied = {"copied": self._upload.seconds} if self._upload.seconds else {}
        return {"read": self._reading, **copied}

    def _started(self, name: str) -> Tensor:
        name = self._tied.get(name, name)
        if name in self._kept:
            return self._kept[name]
        parts = self.parts(name)
        if self._fused.has(name):
            read = {part: self._read(part, name, self._check) for part in parts}
            tensor = self._upload.start(self._fused.join(name, read))
        else:
            tensor = self._one(parts[0], name)
        if self._resident:
            self._kept[name] = tensor
        return tensor

    def _one(self, part: str, name: str) -> Tensor:
        """A parameter that is one tensor of the files. A card checks it there: a hundred times faster, and in a few
        calls, where the many of a check on the host would wait in turn with those that feed the card."""
        info = self._checkpoint.tensors[part]
        there = self._upload.beside and self._scale is None and info.packed is None
        moved = self._upload.start(self._read(part, name, WeightCheck([]) if there else self._check))
        if there:
            self._upload.then(lambda: self._check.feed(part, info.file, moved, parameter=name))
        return moved

    def row_chunks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of a two-dimensional parameter, so that a vocabulary is never held whole."""
        if self._resident:
            whole = self.tensor(name)
            yield from ((start, whole[start : start + rows]) for start in range(0, len(whole), rows))
            return
        part = self.parts(name)[0]
        info = self._checkpoint.tensors[part]
        if info.packed is not None and not info.packed.by_rows:  # its blocks would be cut apart; it is made once
            whole = self._read(part, name, self._check)
            yield from ((start, self._upload(whole[start : start + rows])) for start in range(0, len(whole), rows))
            return
        for start in range(0, info.shape[0], rows):
            yield start, self._upload(self._read_rows(part, name, start, min(start + rows, info.shape[0])))

    def rows(self, name: str, wanted: Tensor) -> Tensor:
        """Some rows of a two-dimensional parameter, by their numbers in rising order; no more than a piece is held."""
        found = []
        for start, rows in self.row_chunks(name, _ROWS):
            here = wanted[(wanted >= start) & (wanted < start + len(rows))]
            found.append(rows[here - start].clone())
        return torch.cat(found)

    def prefetch(self, module: nn.Module, path: str) -> None:
        """Ask the system to read a module's bytes while the current one computes."""
        if self._resident or not hasattr(os, "posix_fadvise"):
            return
        for name, _ in module.named_parameters():
            for part in self.parts(f"{path}.{name}"):
                for place in self._checkpoint.tensors[part].places:
                    with opened(self._checkpoint.folder, place) as file:
                        os.posix_fadvise(file.fileno(), place.start, place.size, os.POSIX_FADV_WILLNEED)

    def _read(self, part: str, name: str, check: WeightCheck) -> Tensor:
        started = time.perf_counter()
        tensor = checked_tensor(self._checkpoint, part, check, name, self._memory)
        self._reading += time.perf_counter() - started
        return self._scaled(tensor, part if self._fused.has(name) else name)

    def _read_rows(self, part: str, name: str, start: int, stop: int) -> Tensor:
        started = time.perf_counter()
        tensor = read_tensor(self._checkpoint, part, slice(start, stop), self._memory)
        self._check.feed(part, self._checkpoint.tensors[part].file, tensor, start, self._tied.get(name, name))
        self._reading += time.perf_counter() - started
        return self._scaled(tensor, self._tied.get(name, name))

    def _scaled(self, tensor: Tensor, name: str) -> Tensor:
        factor = 0 if self._scale is None else self._scale.factor(name)
        return scaled(tensor, factor) if factor else tensor


def read_tensor(checkpoint: Checkpoint, name: str, rows: slice = _ALL, memory: Memory | None = None) -> Tensor:
    """One tensor as the files have it, a quantised weight in float32.

    Args:
        checkpoint, name: of the tensor.
        rows: those that are wanted; of a quantised weight only where ``by_rows`` says that they can be had apart.
        memory: to read into; None for fresh memory.

    Raises:
        QprecError: its shard cannot be read, or the parts of a quantised weight contradict each other.
    """
    info = checkpoint.tensors[name]
    if info.packed is None:
        return _tensor(checkpoint.folder, info, rows, memory)
    return _unpacked(checkpoint.folder, info.packed, _pieces(checkpoint.folder, info.packed, rows, memory))


def checked_tensor(
    checkpoint: Checkpoint, name: str, check: WeightCheck, parameter: str, memory: Memory | None = None
) -> Tensor:
    """One tensor as ``read_tensor`` gives it, seen by the static check, and its scales too.

    Args:
        checkpoint, name, memory: as for ``read_tensor``, which also says what is raised.
        check: sees it.
        parameter: the model's parameter it is (a part of).
    """
    info = checkpoint.tensors[name]
    if info.packed is None:
        tensor = _tensor(checkpoint.folder, info, _ALL, memory)
    else:
        pieces = _pieces(checkpoint.folder, info.packed, _ALL, memory)
        tensor = _unpacked(checkpoint.folder, info.packed, pieces)
        check.feed_scales(name, info.packed, pieces, tensor, parameter)
    check.feed(name, info.file, tensor, parameter=parameter)
    return tensor


def check_formats(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """What a parameter is made of must be numbers that can be cast; what no parameter is made of may be anything.

    Raises:
        QprecError: a tensor is not; the message names it.
    """
    for name in names:
        info = checkpoint.tensors[name]
        if info.packed is None and info.dtype not in FLOAT_TYPES:
            raise QprecError(
                f"{checkpoint.folder / info.file}: {name} is stored as {info.dtype}, and by what config.json says "
                "it is no part of a quantised weight; qprec reads F16, BF16, F32 and F64 weights."
            )


def _pieces(folder: Path, packed: Packed, rows: slice, memory: Memory | None) -> dict[str, Tensor]:
    return {role: _tensor(folder, info, rows, memory) for role, info in packed.infos.items()}


def _unpacked(folder: Path, packed: Packed, pieces: dict[str, Tensor]) -> Tensor:
    try:
        return packed.unpack(pieces)
    except ValueError as error:
        role, name = next(iter(packed.names.items()))
        raise QprecError(
            f"{folder / packed.infos[role].file}: the parts of {name} contradict each other: one {error}; "
            "download the file again."
        ) from error


def _tensor(folder: Path, info: TensorInfo, rows: slice, memory: Memory | None) -> Tensor:
    if info.read is None:
        return read_rows(folder, info, rows, memory)
    path = folder / info.file
    try:
        return info.read(path, rows)
    except OSError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror or error}); download it again.") from error


def scaled(tensor: Tensor, factor: int) -> Tensor:
    """``tensor`` times 2^factor, exactly: fp16, whose range is short, comes out as fp32."""
    wide = tensor.float() if tensor.dtype == torch.float16 else tensor
    return wide * 2.0**factor


def _tied_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Which parameter stands for which: a tied lm_head is the embedding.

    Where the files hold another lm_head beside it, transformers takes that one from version 5 on, and so do we.
    """
    if checkpoint.bare or not getattr(checkpoint.config, "tie_word_embeddings", False):
        return {}
    prefix = getattr(model, "base_model_prefix", "model") + "."
    if HEAD in checkpoint.tensors and _takes_the_files_head():
        embedding = next((name for name in (prefix + EMBEDDING, EMBEDDING) if name in checkpoint.tensors), HEAD)
        if not torch.equal(read_tensor(checkpoint, HEAD), read_tensor(checkpoint, embedding)):
            return {}
    return {HEAD: prefix + EMBEDDING}


def _takes_the_files_head() -> bool:
    return int(transformers.__version__.partition(".")[0]) >= 5


class _Fusions:
    """Parameters that transformers makes out of several tensors, by its own conversion table.

    From transformers 5 on, a MoE layer keeps its experts in one tensor where the files have one each; the
    table that says how (``transformers.conversion_mapping``) is asked, not copied. Older versions have no
    such table and need none.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._recipes: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        converters = _converters(model)
        if not converters:
            return
        known, prefix = set(names), getattr(model, "base_model_prefix", "model") + "."
        for parameter, _ in model.named_parameters():
            spellings = (parameter, parameter.removeprefix(prefix))  # a bare model's names have no prefix
            if not known.isdisjoint(spellings):
                continue
            found = ((each, _sources(name, each, names)) for name in spellings for each in converters)
            recipe = next(((converter, sources) for converter, sources in found if sources), None)
            if recipe is not None:
                self._recipes[parameter] = recipe

    def has(self, name: str) -> bool:
        """Whether this parameter is put together from several tensors."""
        return name in self._recipes

    def parts(self, name: str) -> list[str]:
        """The tensors it is made of."""
        return [part for group in self._recipes[name][1].values() for part in group] if name in self._recipes else []

    def join(self, name: str, read: dict[str, Tensor]) -> Tensor:
        """Put it together."""
        converter, sources = self._recipes[name]
        held: Any = {pattern: [read[part] for part in parts] for pattern, parts in sources.items()}
        for operation in converter.operations:
            held = operation.convert(
                held, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
            )
        (result,) = held.values()
        joined: Tensor = result[0] if isinstance(result, list) else result
        return joined


def _converters(model: nn.Module) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return []
    return [each for each in get_model_conversion_mapping(cast(Any, model)) if isinstance(each, WeightConverter)]


def _sources(parameter: str, converter: Any, names: list[str]) -> dict[str, list[str]]:
    """By source pattern: the tensors, in order of their number, that this parameter is made of."""
    for target in converter.target_patterns:
        if not parameter.endswith(target):
            continue
        head = parameter[: -len(target)]
        near = [name for name in names if name.startswith(head)]  # a MoE checkpoint has 18,000 names
        groups = {}
        for pattern in converter.source_patterns:
            shape = re.compile(re.escape(head) + re.escape(pattern).replace(r"\*", r"(\d+)") + "$")
            found = [(int(match.group(1)), name) for name in near if (match := shape.match(name)) and match.groups()]
            groups[pattern] = [name for _, name in sorted(found)]
        if all(groups.values()):
            return groups
    return {}
