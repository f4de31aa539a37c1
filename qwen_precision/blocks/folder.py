"""A folder of records: one a block, named by a hash of what it holds; a summary beside each; the plans they are of.

Processes that write into one folder never speak to each other. A file is there whole or not at all; who works on a
block holds a lock on one byte of a file, which the system takes back when the process dies, whatever it died of.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from qwen_precision.blocks.plan import Plan
from qwen_precision.blocks.summary import SUFFIX, Summary, block_of, read_summary, save_summary, summary_of
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import Unreadable, read_small, write_atomically
from qwen_precision.judge import Report, judge
from qwen_precision.record import check_count, load, read, to_json

_LOCKS = ".qprec-claims"
_PLAN = re.compile(r"plan-.*\.json")
_KNOWN = re.compile(r"weights-.*\.json")
_JSON = re.compile(r".*\.json")
_KEY = re.compile(r"[0-9a-f]{24}\.json")
"""As a record is named here; what is called otherwise may be anything."""
_MOST_KNOWN = 64 << 10
_MOST_PLAN = 128 << 20  # bytes: eight million prompts, which are all that a file of prompts can hold
_MOST_VALUES = 1_000_000  # eight a block: the same prompts in blocks of 64


class Kept(NamedTuple):
    """A plan that was begun in a folder."""

    plan: Plan
    name: str
    """Of its file."""
    when: float
    """It was written."""


class Damage(NamedTuple):
    """A file of a folder that cannot be read."""

    key: str
    """Its name, without the suffix."""
    said: str


class Known(BaseModel):
    """Which weights a checkpoint has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """As it was typed."""
    revision: str | None
    weights: str


class Folder:
    """Where records go and come from.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks: int | None = None
        self._met: dict[str, tuple[str, str, list[str]]] = {}
        """By name of a record: its weights, its settings and hashes of its prompts; read once for all checkpoints."""

    def check(self) -> None:
        """That it can be a folder.

        Raises:
            UsageError: there is a file in its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"-o {self.path}: is a file; give a folder for the records of several blocks.")

    def prepare(self) -> None:
        """Make it, if it is not there, and see that it can be written, before an hour of work.

        Raises:
            QprecError: it cannot be made or written.
            UsageError: there is a file in its place.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QprecError(f"-o {self.path}: cannot be made ({error.strerror}); choose another folder.") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise QprecError(f"-o {self.path}: cannot be written; choose a place you may write to.")

    def record(self, key: str) -> Path:
        """Path of a record."""
        return self.path / f"{key}.json"

    def keep(self, plan: Plan) -> None:
        """Write the plan; the same one, from whichever rank, is the same file.

        Raises:
            QprecError: it cannot be written.
        """
        place = self.path / plan.name
        with suppress(FileNotFoundError, Unreadable):
            if read_small(place, _MOST_PLAN) == plan.text().encode("utf-8", "replace"):
                return
        write_atomically(place, plan.text())

    def holds(self, plan: Plan) -> bool:
        """Whether a plan was begun here before."""
        return (self.path / plan.name).is_file()

    def plans(self) -> tuple[list[Kept], list[Damage]]:
        """All plans that were begun here, the oldest first, and files that should be one and cannot be read.

        Raises:
            QprecError: the folder cannot be read.
        """
        found, damaged = [], []
        for path in self._named(_PLAN):
            try:
                data = read_small(path, _MOST_PLAN)
                check_count(data, _MOST_VALUES)
                found.append(Kept(Plan.model_validate_json(data), path.name, path.stat().st_mtime))
            except (OSError, Unreadable, ValueError) as error:
                do = "run its command again with this version, or remove the file"
                damaged.append(Damage(path.stem, f"{path.name} cannot be read as a plan ({_why(error)}): {do}"))
        return sorted(found, key=lambda each: (each.when, each.name)), damaged

    def records(self) -> list[Path]:
        """Every file that may be a record, by name.

        Raises:
            QprecError: the folder cannot be read.
        """
        return [path for path in self._named(_JSON) if not path.name.startswith(("plan-", "weights-", "."))]

    def _named(self, form: "re.Pattern[str]") -> list[Path]:
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            raise QprecError(f"{self.path}: cannot be read ({error.strerror}); give a folder of records.") from error
        return [self.path / name for name in names if form.fullmatch(name)]

    def remember(self, source: str, revision: str | None, weights: str) -> None:
        """Keep which weights a checkpoint has, by the name it was given: another name may have the same.

        Raises:
            QprecError: it cannot be written.
        """
        known = Known(source=source, revision=revision, weights=weights)
        text = known.model_dump_json() + "\n"
        place = self.path / f"weights-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}.json"
        if place.is_file():
            with suppress(OSError):
                os.utime(place)  # the last that was met is what the name stands for now
        else:
            write_atomically(place, text)

    def known(self) -> dict[tuple[str, str | None], str]:
        """The weights that a name and revision stood for when they were met last."""
        found: list[tuple[float, Known]] = []
        for path in self._named(_KNOWN):
            with suppress(OSError, Unreadable, ValueError):
                told = Known.model_validate_json(read_small(path, _MOST_KNOWN))
                found.append((path.stat().st_mtime, told))
        ordered = sorted(found, key=lambda each: (each[0], each[1].weights))
        return {(each.source, each.revision): each.weights for _, each in ordered}

    def seen(self, plan: Plan, weights: str) -> set[str]:
        """Hashes of prompts that records of other plans hold, measured on these weights as this plan asks.

        Raises:
            QprecError: the folder cannot be read.
        """
        mine = {f"{plan.key(weights, block)}.json" for block in plan.blocks}
        found: set[str] = set()
        for path in self.records():
            if path.name in mine:
                continue
            if path.name not in self._met and (summary := read_summary(path) or summarised(path)) is not None:
                keys = [key for key in summary.block.keys if key not in summary.unfit]
                self._met[path.name] = summary.weights, summary.settings, keys
            theirs, settings, keys = self._met.get(path.name, ("", "", []))
            if (theirs, settings) == (weights, plan.settings_digest):
                found.update(keys)
        return found

    def is_done(self, key: str, share: tuple[int, int]) -> bool:
        """Whether a record is there and can be read; its summary is made anew where it is not up to date.

        Raises:
            QprecError: the summary cannot be written.
        """
        path = self.record(key)
        if not path.is_file():
            return False
        if read_summary(path) is not None:
            return True
        found = summarised(path, share)
        if found is None:
            return False
        save_summary(found, path)
        return True

    def save(self, key: str, report: Report, share: tuple[int, int]) -> None:
        """Write a record, then its summary.

        Raises:
            QprecError: one cannot be written.
        """
        path = self.record(key)
        data = to_json(report.run).encode("utf-8", "replace")
        with suppress(OSError):
            path.with_suffix(SUFFIX).unlink(missing_ok=True)  # it is of the record that was there before
        write_atomically(path, data)
        save_summary(summary_of(report, data, share), path)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a block: False where another process does. The system lets go of it when the process ends."""
        try:
            import fcntl
        except ImportError:  # no such locks here: shares do not overlap, and files are whole anyway
            yield True
            return
        # A hash of the name is a byte of the file, which has no length: a lock may lie behind the end.
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        try:
            if self._locks is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._locks = os.open(self.path / _LOCKS, flags, 0o666)
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            yield True
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)


def summarised(path: Path, share: tuple[int, int] = (0, 1)) -> Summary | None:
    """The summary of a record, made from the record itself; None where it is none of a folder's, or damaged."""
    try:
        return summary_of(judge(load(path)), read(path), share)
    except (QprecError, ValueError):
        return None


def damage(path: Path) -> Damage | None:
    """What is wrong with a record of which there is no summary; None where the file is not named as a folder's is."""
    if not _KEY.fullmatch(path.name):
        return None
    try:
        block_of(load(path))
    except QprecError as error:
        why = str(error).removeprefix(f"{path}: ").rstrip(".").partition(";")[0]
    except ValueError as error:
        why = _why(error)
    else:
        why = "what it says of its block cannot be used"
    return Damage(path.stem, f"{path.name} {why}: give its command again, which replaces it, or remove the file")


def _why(error: Exception) -> str:
    """Why a file is none of its kind, without a library's words."""
    return "it is damaged, or another version of qprec wrote it" if isinstance(error, ValidationError) else str(error)
