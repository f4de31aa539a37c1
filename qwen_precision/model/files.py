"""What the record says of a checkpoint; of the files with its weights their sizes and, where it is cheap, hashes."""

import re
from functools import lru_cache
from pathlib import Path

from qwen_precision.files import sha256_of
from qwen_precision.model.folder import Checkpoint
from qwen_precision.record import Model, WeightFile

HASHED_BYTES = 1 << 30
"""Files that no cache names by their hash are read for it, up to so many bytes in all: a few seconds."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


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
        hidden_size=getattr(config, "hidden_size", 0),
        vocabulary=config.vocab_size,
        parameters=checkpoint.parameters,
        weight_bytes=checkpoint.weight_bytes,
        source_dtype=checkpoint.source_dtype,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        files=weight_files(checkpoint),
    )


def weight_files(checkpoint: Checkpoint) -> list[WeightFile]:
    """Every file with weights, by name. One that cannot be read any more has a size of 0 and no hash."""
    names = sorted({place.file for info in checkpoint.tensors.values() for place in info.places})
    paths = [checkpoint.folder / name for name in names]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    known = [_named_by(path) for path in paths]
    to_read = sum(size for size, digest in zip(sizes, known, strict=True) if digest is None)
    if to_read <= HASHED_BYTES:
        known = [digest or _digest(path) for path, digest in zip(paths, known, strict=True)]
    return [
        WeightFile(name=name, bytes=size, sha256=digest) for name, size, digest in zip(names, sizes, known, strict=True)
    ]


def _named_by(path: Path) -> str | None:
    """The hash that the hub's cache names a large file by: a snapshot is links to blobs, and nothing has to be read."""
    real = path.resolve()
    in_cache = path.is_symlink() and real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return real.name if in_cache and _SHA256.fullmatch(real.name) else None


def _digest(path: Path) -> str | None:
    try:
        told = path.stat()
        return _read(path, told.st_size, told.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _read(path: Path, size: int, changed: int) -> str:
    """The hash of a file, read again only once it has another size or time: every control run asks for it."""
    return sha256_of(path)
