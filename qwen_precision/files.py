"""Writing results: whole or not at all, and found out beforehand where it cannot be done."""

import os
import tempfile
from pathlib import Path

from qwen_precision.errors import QprecError


def check_writable(path: Path, label: str = "-o") -> None:
    """Fail before an hour of work, not after it, when the output cannot be written.

    Raises:
        QprecError: the folder is missing or not writable, or the path is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise QprecError(f"{label} {path}: is a folder; give the name of a file to write.")
    if not folder.is_dir():
        raise QprecError(f"{label} {path}: the folder {folder} does not exist; create it or choose another.")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise QprecError(f"{label} {path}: cannot be written; choose a place you may write to.")


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it.

    Raises:
        QprecError: the file cannot be written.
    """
    check_writable(path)
    name = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            name = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private (0600); a result has the permissions any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except OSError as error:
        raise QprecError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        if name is not None and os.path.exists(name):
            os.unlink(name)
