"""Ctrl-C, and SIGTERM, which CI servers, Slurm and Docker send: the first ends the work and keeps what there is.

The second ends the program at once, with what it was writing taken away again.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from qwen_precision import parents
from qwen_precision.cli import terminal
from qwen_precision.files import remove_unfinished

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAID = b"\ninterrupted: finishing with what there is; Ctrl-C again leaves at once\n"
_CURSOR = b"\x1b[?25h"
"""Shows the cursor, which a progress bar hides."""
_groups: set[int] = set()
"""Process groups that end when this process ends at once."""


@contextmanager
def interruptible(ends: bool) -> Iterator[None]:
    """Within it the first of the signals raises KeyboardInterrupt in the main thread, the second is exit code 3.

    Args:
        ends: nothing but the end of the process follows: a signal that comes then changes no exit code any more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    met: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if met:
            _at_once()
        met.append(number)
        if not terminal.quiet() and not parents.follows():
            _tell(_SAID)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, signal.SIG_IGN if ends else old if old is not None else signal.SIG_DFL)


@contextmanager
def taking_along(group: int) -> Iterator[None]:
    """Within it a process group, which a terminal's signals do not reach, is killed when this process ends at once."""
    _groups.add(group)
    try:
        yield
    finally:
        _groups.discard(group)


def follow_launcher() -> None:
    """Where another process of ours launched this one as a rank: end at once when that is gone."""
    parents.follow(_at_once)


def _at_once() -> NoReturn:
    for group in _groups:
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    remove_unfinished()
    if os.isatty(2):
        _tell(_CURSOR)
    os._exit(3)  # a thread that computes would be waited for


def _tell(said: bytes) -> None:
    """Without the lock of a console, for which a handler may not wait."""
    try:
        os.write(2, said)
    except OSError:
        return
