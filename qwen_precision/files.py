"""Files: read within bounds; results written whole or not at all, found out beforehand where that cannot be done."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qwen_precision.errors import QprecError, UsageError


def check_writable(path: Path, inputs: Iterable[Path] = (), label: str = "-o", force: bool = True) -> None:
    """Fail before an hour of work, not after it, when the output cannot be written.

    Args:
        path: the file to write; an existing one is replaced.
        inputs: what the command reads; writing over it, or into a checkpoint's folder, is refused.
        label: the option's name, for the sentence.
        force: whether an existing file may be replaced.

    Raises:
        QprecError: the folder is missing or not writable, or the path is a folder or an input.
        UsageError: there is a file already that may not be replaced.
    """
    real = Path(os.path.realpath(path))
    folder = real.parent
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            os.close(_pipe(path))
            return
    except OSError as error:
        raise QprecError(f"{label} {str(path)[:60]}: cannot be written ({error.strerror}).") from error
    if real.is_dir():
        raise QprecError(f"{label} {path}: is a folder; give the name of a file to write.")
    if not folder.is_dir():
        raise QprecError(f"{label} {path}: the folder {folder} does not exist; create it or choose another.")
    if not os.access(folder, os.W_OK) or (real.exists() and not os.access(real, os.W_OK)):
        raise QprecError(f"{label} {path}: cannot be written; choose a place you may write to.")
    for each in inputs:
        source = Path(os.path.realpath(each))
        if real == source or (os.path.exists(source / "config.json") and source in real.parents):
            raise QprecError(f"{label} {path}: would write over what is read ({each}); choose another name.")
    if real.is_file() and not force:
        raise UsageError(f"{label} {path}: is there already; add --force to replace it.")


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it. A link is followed.

    What is not a regular file (a pipe, ``/dev/null``) is written into, never replaced.

    Raises:
        QprecError: the file cannot be written.
    """
    check_writable(path)
    real = Path(os.path.realpath(path))
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text  # half a character is no reason to fail
    try:
        if path.exists() and not path.is_file():
            with open(_pipe(path), "wb") as file:
                file.write(data)
        else:
            _replace(real, data)
    except OSError as error:
        raise QprecError(f"{path}: cannot be written ({error.strerror}).") from error


class Unreadable(Exception):
    """Why a file cannot be read, as a part of a sentence."""


def read_small(path: Path, most: int) -> bytes:
    """All of a regular file. A device has no end and a pipe may have no writer, so both are refused unread.

    Args:
        path: of the file; a link is followed.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is something else, larger, or cannot be read; the text says which.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(number, "rb") as file:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise Unreadable("is no regular file")
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        raise Unreadable(_why(error)) from error
    if len(data) > most:
        raise Unreadable(f"is larger than {most >> 20} MiB")
    return data


def read_text(path: Path, most: int, label: str, expected: str) -> str:
    """A text file that an option names.

    Args:
        path, most: as for ``read_small``.
        label: the option's name, for the sentence.
        expected: what the file should be, for the sentence.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_small(path, most).decode("utf-8-sig")
    except FileNotFoundError as error:
        why: object = error.strerror
    except Unreadable as error:
        why = error
    except UnicodeDecodeError:
        why = "not UTF-8 text"
    raise UsageError(f"{label}: cannot read {path} ({why}); expected {expected}.")


def _why(error: OSError | ValueError) -> str:
    """ "Permission denied", or what the error says of itself."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def is_whole(text: str) -> bool:
    """Whether a text holds no half characters (lone surrogates), which no file could be written with."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as the hub shows it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pipe(path: Path) -> int:
    """What is no regular file, opened for writing; a pipe that nobody reads would be waited for, and is an error."""
    number = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(number, True)
    return number


def append(path: Path, text: str, label: str) -> None:
    """Add to the end of a file that somebody else may be writing too.

    Raises:
        QprecError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise QprecError(f"{label} {path}: cannot be written ({error.strerror}).") from error


def _replace(path: Path, data: bytes) -> None:
    name = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".qprec-", delete=False) as file:
            name = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private (0600); a result has the permissions any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        if name is not None and os.path.exists(name):
            os.unlink(name)
