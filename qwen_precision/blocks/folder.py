"""A folder of records: one a block, named by a hash of what it holds; a summary beside each; the plans they are of.

Processes that write into one folder never speak to each other. A file is there whole or not at all; who works on a
block holds a lock on one byte of a file, which the system takes back when the process dies, whatever it died of.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_precision.blocks.plan import Plan
from qwen_precision.blocks.summary import SUFFIX, Summary, read_summary, save_summary, summary_of
from qwen_precision.errors import QprecError, UsageError
from qwen_precision.files import Unreadable, read_small, write_atomically
from qwen_precision.judge import Report, judge
from qwen_precision.record import check_count, load, read, to_json

_LOCKS = ".qprec-claims"
_PLANS = "plan-*.json"
_MOST_PLAN = 128 << 20  # bytes: eight million prompts, which are all that a file of prompts can hold
_MOST_VALUES = 1_000_000  # eight a block: the same prompts in blocks of 64


class Folder:
    """Where records go and come from.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks: int | None = None

    def prepare(self) -> None:
        """Make it, if it is not there, and see that it can be written, before an hour of work.

        Raises:
            QprecError: it cannot be made or written.
            UsageError: there is a file in its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"-o {self.path}: is a file; give a folder for the records of several blocks.")
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

    def plans(self) -> list[Plan]:
        """All plans that were begun here, by name; what is none is left alone."""
        found = []
        for path in sorted(self.path.glob(_PLANS)):
            with suppress(OSError, Unreadable, ValueError):
                data = read_small(path, _MOST_PLAN)
                check_count(data, _MOST_VALUES)
                found.append(Plan.model_validate_json(data))
        return found

    def records(self) -> list[Path]:
        """Every file that may be a record, by name.

        Raises:
            QprecError: the folder cannot be read.
        """
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            raise QprecError(f"{self.path}: cannot be read ({error.strerror}); give a folder of records.") from error
        return [self.path / name for name in names if name.endswith(".json") and not name.startswith(("plan-", "."))]

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
