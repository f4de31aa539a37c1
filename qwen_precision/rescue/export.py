"""A rescaled checkpoint on disk: the same shards with every tensor times its factor, written a piece at a time.

Everything goes into a hidden folder beside the wanted one, which is renamed at the very end: what is killed half-way
leaves nothing that looks finished.
"""

import hashlib
import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import done_with, remove_dead, sha256_of, unfinished, unwritable
from qwen_precision.model import FLOAT_TYPES, Checkpoint, TensorInfo, fill, opened
from qwen_precision.progress import Progress
from qwen_precision.qwen3 import EMBEDDING, HEAD, Scale
from qwen_precision.record import Rescaling
from qwen_precision.torch_dtypes import torch_dtype

NOTE = "qprec-rescue.json"
"""What was done, in the exported folder."""

_FORMATS = {"fp16": "F16", "bf16": "BF16"}
"""safetensors' names of the formats that weights can be written in; else each tensor keeps its own."""

_PIECE = 1 << 19  # elements cast at once: they stay in the cache
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")
_SINKS = ("write", "hash", "flush")
_UNDER_WAY = 16  # jobs of a megabyte each
_FLUSH = 128 << 20  # bytes written before the disk is asked to begin
_INDEX = "model.safetensors.index.json"
_SPARE = 64 << 20  # bytes of the disk that are left for the small files
_MOST_COPIED = 256 << 20  # bytes of a tokenizer's file; nothing else is that large


def check_folder(folder: Path, source: Path | None, force: bool) -> None:
    """Fail before the work where the folder cannot be written.

    Args:
        folder: asked for.
        source: the checkpoint's folder, where it is known.
        force: whether an earlier export may be replaced.

    Raises:
        UsageError: it is there already, or is the checkpoint itself (or inside it, or around it).
        QprecError: the folder it shall be in is missing or not writable.
    """
    real = Path(os.path.realpath(folder))
    try:
        real.exists()
        if real.parent.is_dir():
            _put_back(real)
            remove_dead(real)
            place = unfinished(real)
            place.mkdir()
            done_with(place)
    except OSError as error:
        raise unwritable(f"--rescue-to {str(folder)[:60]}", error) from error
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise QprecError(f"--rescue-to {folder}: {real.parent} is no folder to write in; create it or choose another.")
    if source is not None:
        read = Path(os.path.realpath(source))
        if real == read or read in real.parents or real in read.parents:
            raise UsageError(f"--rescue-to {folder}: would write over what is read ({source}); choose another folder.")
    if not real.exists() or (real.is_dir() and not any(real.iterdir())):
        return
    if not (real / NOTE).is_file():
        raise UsageError(f"--rescue-to {folder}: is there already and was not written by qprec; choose another name.")
    if not force:
        raise UsageError(f"--rescue-to {folder}: is there already; add --force to replace it, or choose another name.")


def _earlier(real: Path) -> Path:
    """Where an earlier export stands while the new one takes its place."""
    return real.with_name(f".qprec-earlier-{hashlib.sha256(os.fsencode(real.name)).hexdigest()[:12]}")


def _put_back(real: Path) -> None:
    """An earlier export goes back where the new one did not come, whoever was killed in between; else it goes."""
    old = _earlier(real)
    if old.exists() and not real.exists():
        old.rename(real)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def beside(folder: Path, force: bool) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A hidden folder to write into, and what renames it into place; without that call it is removed again.

    Raises:
        QprecError: something cannot be written.
    """
    real = Path(os.path.realpath(folder))
    made = unfinished(real)
    try:
        made.mkdir()
    except OSError as error:
        done_with(made)
        raise unwritable(f"--rescue-to {folder}", error) from error

    def finish() -> None:
        check_folder(folder, None, force)  # much may have happened since it was looked at first
        old = _earlier(real)
        try:
            if real.exists():
                real.rename(old)
            made.rename(real)
        finally:
            _put_back(real)

    try:
        yield made, finish
    except OSError as error:
        raise unwritable(f"--rescue-to {folder}", error) from error
    finally:
        done_with(made)


class Exporter:
    """Writes one rescaled checkpoint.

    Args:
        checkpoint: the original.
        rescaling: what is done to it.
        dtype: of ``config.RESCUE_DTYPES``.
        tell: called with (bytes written, bytes in all, what is being done).
    """

    def __init__(self, checkpoint: Checkpoint, rescaling: Rescaling, dtype: str, tell: Progress) -> None:
        self._checkpoint, self._rescaling, self._dtype, self._tell = checkpoint, rescaling, dtype, tell
        self._scale = Scale(rescaling)
        self._shards = self._layout()
        self.bytes = sum(self._size(info) for shard in self._shards.values() for info in shard.values())
        self._done = 0

    def _layout(self) -> dict[str, dict[str, TensorInfo]]:
        """By file: its tensors in their order, each with where its source lies."""
        shards: dict[str, dict[str, TensorInfo]] = {}
        for name, info in sorted(self._checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].start)):
            shards.setdefault(info.file, {})[name] = info
        if self._rescaling.untied:
            info = next(info for name, info in self._checkpoint.tensors.items() if name.endswith(EMBEDDING))
            held = self._checkpoint.tensors.get(HEAD, info).file
            shards[held][HEAD] = info  # whatever copy the files hold, a tied model's lm_head is its embedding
        return shards

    def _format(self, info: TensorInfo) -> str:
        return _FORMATS.get(self._dtype, info.dtype)

    def _size(self, info: TensorInfo) -> int:
        return info.elements * _torch_dtype(self._format(info)).itemsize

    def write(self, folder: Path) -> dict[str, dict[str, str]]:
        """Write everything; gives the SHA-256 of every file, of the source's shards and of what was written.

        Raises:
            QprecError: no room on the disk, or a file cannot be read or written.
        """
        free = shutil.disk_usage(folder).free
        if free < self.bytes + _SPARE:
            unit, size = ("GiB", 2**30) if self.bytes >= 2**30 else ("MiB", 2**20)
            need = (self.bytes + _SPARE) / size
            raise QprecError(
                f"--rescue-to: {need:.1f} {unit} are needed on this disk, {free / size:.1f} {unit} are free; "
                "make room or choose another place."
            )
        try:
            with _one_thread(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="qprec-hash") as pool:
                # The sources are hashed beside the work.
                sources = {file: pool.submit(sha256_of, self._checkpoint.folder / file) for file in self._shards}
                written = {file: self._shard(folder / file, shard) for file, shard in self._shards.items()}
                before = {file: each.result() for file, each in sources.items()}
            written |= self._others(folder)
        except OSError as error:
            raise QprecError(f"--rescue-to: {error.filename or folder.name}: {error.strerror}.") from error
        return {"source": before, "written": dict(sorted(written.items()))}

    def _shard(self, path: Path, shard: dict[str, TensorInfo]) -> str:
        """One safetensors file (https://github.com/huggingface/safetensors#format); gives its hash."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in shard.items():
            start, end = end, end + self._size(info)
            header[name] = {"dtype": self._format(info), "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb", buffering=0) as file, _Sink(file) as sink:
            sink.put(memoryview(struct.pack("<Q", len(text)) + text))
            for name, info in shard.items():
                for piece in self._pieces(name, info):
                    sink.put(piece)
                self._done += self._size(info)
                self._tell(self._done, self.bytes, f"writing {path.name}")
            return sink.finish()

    def _pieces(self, name: str, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor times its factor in the format asked for, a piece at a time, as bytes."""
        source, target = _torch_dtype(info.dtype), _torch_dtype(self._format(info))
        factor = 2.0 ** self._scale.factor(name)
        # fp32 holds a bf16 or fp16 number times any factor exactly, so there is one rounding: the last cast.
        wide = torch.empty(_PIECE, dtype=torch.float64 if source == torch.float64 else torch.float32)
        with opened(self._checkpoint.folder, info) as file:
            for start in range(0, info.elements, _PIECE):
                count = min(_PIECE, info.elements - start)
                held = _read(file, info.start + start * source.itemsize, count, source)
                numbers = wide[:count].copy_(held)
                if factor != 1.0:
                    numbers.mul_(factor)
                yield _bytes(numbers.to(target, copy=True))

    def _others(self, folder: Path) -> dict[str, str]:
        """config.json, generation config, tokenizer, licence, index: what a runtime needs beside the weights."""
        source = self._checkpoint.folder
        for pattern in _COPIED:
            for path in sorted(source.glob(pattern)):
                if path.is_file() and path.name != "config.json" and _travels(path):
                    shutil.copyfile(path, folder / path.name)
        if (source / _INDEX).is_file():
            weight_map = {name: file for file, shard in self._shards.items() for name in shard}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        hashes = {path.name: sha256_of(path) for path in folder.iterdir() if path.name not in self._shards}
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["rms_norm_eps"] = self._rescaling.new_eps
        if self._rescaling.untied:
            config["tie_word_embeddings"] = False
        if self._checkpoint.bare:
            # Nothing makes up for the embedding's factor in an lm_head that was tied to it: none shall be made of it.
            config["tie_word_embeddings"] = False
        if self._dtype in _FORMATS:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(_torch_dtype(_FORMATS[self._dtype])).removeprefix("torch.")
        # The last of all: without it nothing loads a folder that was left half-way.
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return {**hashes, "config.json": sha256_of(folder / "config.json")}


def _travels(path: Path) -> bool:
    """Whether a runtime may need it: not the indices of weights that are not here, nor what qprec wrote before."""
    if path.name == NOTE or path.name.endswith(".index.json") or path.stat().st_size > _MOST_COPIED:
        return False
    with path.open("rb") as file:
        return not file.read(64).startswith(b'{"schema":')


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch casts in one thread: its others would wait busily on the cores that hash and write (1.6x slower)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Sink:
    """A file that is written, hashed and flushed by threads of their own, while the next piece is made."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._waiting = file, hashlib.sha256(), 0
        self._writer, self._hasher, self._flusher = (ThreadPoolExecutor(1, f"qprec-{each}") for each in _SINKS)
        self._jobs: deque[Future[Any]] = deque()
        self._flushing: Future[None] | None = None

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._writer, self._hasher, self._flusher):
            pool.shutdown(wait=True, cancel_futures=True)

    def put(self, piece: memoryview) -> None:
        """Take one piece; waits where too many are under way."""
        self._jobs += (self._writer.submit(self._write, piece), self._hasher.submit(self._digest.update, piece))
        while len(self._jobs) > _UNDER_WAY:
            self._jobs.popleft().result()
        self._waiting += len(piece)
        # Begun early, the disk is at work while the rest is made.
        if self._waiting > _FLUSH and (self._flushing is None or self._flushing.done()):
            self._flushing, self._waiting = self._flusher.submit(os.fsync, self._file.fileno()), 0

    def _write(self, piece: memoryview) -> None:
        while piece:  # an unbuffered file may take a part
            piece = piece[self._file.write(piece) :]

    def finish(self) -> str:
        """Everything on the disk; gives the hash."""
        for job in [*self._jobs, *([self._flushing] if self._flushing is not None else [])]:
            job.result()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def _torch_dtype(name: str) -> torch.dtype:
    return torch.float64 if name == "F64" else torch_dtype(FLOAT_TYPES[name])


def _read(file: BinaryIO, start: int, count: int, dtype: torch.dtype) -> Tensor:
    data = bytearray(count * dtype.itemsize)
    fill(file, start, memoryview(data))
    return torch.frombuffer(data, dtype=dtype)


def _bytes(tensor: Tensor) -> memoryview:
    same_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array: np.ndarray[Any, Any] = tensor.view(same_width).numpy()
    return array.data.cast("B")
