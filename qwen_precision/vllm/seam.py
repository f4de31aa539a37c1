"""Between an engine and who watches it: a fault of ours ends the watching, and never reaches the engine.

Nothing heavy: every vLLM beside this package loads it.
"""

import logging
from collections.abc import Callable
from typing import Any


class Seam:
    """Everything of a watcher that an engine calls is called through here.

    After the first fault nothing is called any more, and the engine goes on with what it is given instead. What ends a
    process (KeyboardInterrupt, SystemExit) passes.
    """

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        """``ended`` is called when it ends."""
        self._ended = ended
        self.step = 0
        """How many steps of the engine were watched to their end."""
        self.stopped = ""
        """Why the watching ended, as a record says it; empty while it goes on."""

    def call(self, ours: Callable[..., Any], *args: Any, instead: Any = None, always: bool = False) -> Any:
        """What ours gives, or ``instead``.

        Args:
            ours: what may have a fault.
            instead: what the engine goes on with then.
            always: whether it is called after the watching ended, too: it tidies up.
        """
        if self.stopped and not always:
            return instead
        try:
            return ours(*args)
        except Exception as error:  # whatever it is: nobody's answer may depend on who watches
            self.end(error)
            return instead

    def end(self, error: Exception) -> None:
        """End the watching; of several faults the first is told, in one line of the log."""
        if not self.stopped:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.stopped = f"watching stopped after step {self.step}: {why}"
            logging.getLogger(__name__).warning("qprec: %s; the engine goes on unwatched.", self.stopped)
            self.call(self._ended, always=True)
