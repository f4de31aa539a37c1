"""Files: read within bounds; results written whole or not at all, found out beforehand where that cannot be done."""

import errno
import hashlib
import itertools
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
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
    real = _check_place(path, inputs, label, force)
    if real is None:
        return
    place = unfinished(real)
    try:  # what may be written by its permissions need not take a new file: /proc takes none
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise unwritable(f"{label} {str(path)[:60]}", error) from error
    finally:
        done_with(place)


def _check_place(path: Path, inputs: Iterable[Path] = (), label: str = "-o", force: bool = True) -> Path | None:
    """What ``check_writable`` can tell without writing; where the file will lie, or None for a pipe or a device."""
    real = Path(os.path.realpath(path))
    folder = real.parent
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            _pipe(path)
            return None
    except OSError as error:
        raise unwritable(f"{label} {str(path)[:60]}", error) from error
    if real.is_symlink():
        raise QprecError(f"{label} {path}: is a link that leads back to itself; remove it, or choose another name.")
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
    return real


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it. A link is followed.

    What is not a regular file (a pipe, ``/dev/null``) is written into, never replaced.

    Raises:
        QprecError: the file cannot be written.
    """
    real = _check_place(path)
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text  # half a character is no reason to fail
    try:
        if real is None:
            with open(_pipe(path), "wb") as file:
                del _PIPES[path]
                file.write(data)
        else:
            _replace(real, data)
    except OSError as error:
        raise unwritable(str(path), error) from error


_DO = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.ENXIO: "start what reads the pipe first",
}


def unwritable(what: str, error: OSError) -> QprecError:
    """The sentence of why something cannot be written, and what to do."""
    do = _DO.get(error.errno or 0, "choose another place")
    return QprecError(f"{what}: cannot be written ({error.strerror}); {do}.")


_numbers = itertools.count()


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


_PIPES: dict[Path, int] = {}
"""What is open already: a pipe that is closed ends its reader."""
_READER = 2.0  # seconds in which a pipe's reader may come


def _pipe(path: Path) -> int:
    """What is no regular file, open for writing; a pipe that nobody reads would be waited for, and is an error."""
    end = time.monotonic() + _READER
    while path not in _PIPES:
        try:
            _PIPES[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(_PIPES[path], True)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                raise
            time.sleep(0.02)
    return _PIPES[path]


def append(path: Path, text: str, label: str) -> None:
    """Add to the end of a file that somebody else may be writing too.

    Raises:
        QprecError: it cannot be written, or is a pipe, which might be waited for without end, or another such thing.
    """
    try:
        if path.exists() and not path.is_file():
            raise QprecError(f"{label} {path}: is no regular file; give the name of one, or unset {label}.")
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(f"{label} {path}", error) from error


def _replace(path: Path, data: bytes) -> None:
    remove_dead(path)
    name = unfinished(path)
    try:
        # As any new file: the umask decides who may read it.
        with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        done_with(name)


_UNFINISHED: set[Path] = set()
"""What this process is writing now."""
_NAME = ".qprec-partial-"


def unfinished(path: Path) -> Path:
    """A hidden place beside a file or folder to write it in: its name holds the host and the process that writes there.

    Call ``done_with`` when it was renamed, or is given up.
    """
    place = path.parent / f"{_prefix(path)}{os.getpid()}-{next(_numbers)}"
    _UNFINISHED.add(place)
    return place


def done_with(place: Path) -> None:
    """Remove what is left of an unfinished file or folder."""
    _remove(place)
    _UNFINISHED.discard(place)


def remove_unfinished() -> None:
    """Remove all that this process is writing, because it ends at once."""
    for place in list(_UNFINISHED):
        _remove(place)


def remove_dead(path: Path) -> None:
    """Remove what processes of this machine that are gone left unfinished of the same file or folder."""
    prefix = _prefix(path)
    try:
        names = [each for each in os.listdir(path.parent) if each.startswith(prefix)]
    except OSError:
        return
    for name in names:
        number = name.removeprefix(prefix).partition("-")[0]
        if number.isdigit() and not is_running(int(number)):
            _remove(path.parent / name)


def _prefix(path: Path) -> str:
    """Short, whatever the file is called: a name has 255 bytes at most."""
    what = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    host = hashlib.sha256(socket.gethostname().encode("utf-8", "replace")).hexdigest()[:8]
    return f"{_NAME}{what}-{host}-"


def is_running(process: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def _remove(place: Path) -> None:
    with suppress(OSError):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
