"""Which weights a checkpoint has, told from its files without loading it: the same on every machine."""

import hashlib
import os
from pathlib import Path

from qwen_precision.errors import QprecError

_WHOLE = 64 << 20
"""Bytes up to which a file is read whole; of a larger one beginning, end and samples are."""
_SAMPLE = 64 << 10
_SAMPLES = 256
_SUFFIXES = {".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"}
"""Of files that decide what is measured."""


def weights_id(path: Path) -> str:
    """A hash of a checkpoint: of names, sizes and contents of its weights, config, tokenizer and template.

    A file of more than 64 MiB is told by its first and last bytes and 256 samples of 64 KiB: training changes all of
    its tensors.

    Args:
        path: the folder, or the GGUF file.

    Raises:
        QprecError: a file cannot be read.
    """
    made = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(path.iterdir())
        for file in files:
            if file.suffix.lower() in _SUFFIXES and file.is_file():
                made.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "replace"))
                made.update(_content(file))
    except OSError as error:
        raise QprecError(f"{path}: cannot be read ({error.strerror}).") from error
    return made.hexdigest()[:32]


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        made = hashlib.sha256()
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            made.update(file.read(_SAMPLE))
        return made.digest()
