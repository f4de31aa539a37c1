"""A process that ends with the one that started it, also where that was killed and could tell nobody."""

import os
import threading
import time
from collections.abc import Callable

PARENT = "QPREC_PARENT"
"""The variable that has the number of the process to end with."""
_LOOK = 0.2  # seconds between two looks


def follows() -> bool:
    """Whether this process was started by another of ours, which speaks to the user for it."""
    return os.environ.get(PARENT, "").isdigit()


def follow(gone: Callable[[], object]) -> None:
    """Call ``gone``, in a thread, once the process to end with is this one's parent no more; never where there is none.

    It is looked for, not waited for: torchrun passes no open pipe on, and puts every rank into a session of its own.
    """
    if not follows():
        return
    parent = int(os.environ[PARENT])

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        gone()

    threading.Thread(target=look, daemon=True, name="qprec-parent").start()
