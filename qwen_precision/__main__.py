"""``qprec`` and ``python -m qwen_precision``: the program, with signals caught from the first import to the end.

What is slow about Python is before and after our own code, and a signal is met there as likely as anywhere.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from qwen_precision.parents import follows


def run() -> NoReturn:
    """Entry point of the ``qprec`` script."""
    listen()
    try:
        from qwen_precision.cli import main

        code = main(ends=True)
    except KeyboardInterrupt:
        code = _said("interrupted.")
    except (ImportError, OSError) as error:  # before the program is there: too few files allowed, a broken library
        code = _said(f"cannot start ({error}); check the installation, and that `ulimit -n` is 256 or more.")
    _end(code)


def listen() -> None:
    """Until the command line has handlers of its own, a signal is the end, for there is nothing to be kept."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _at_start)


def _at_start(number: int, frame: object) -> NoReturn:
    """At once: an exception in the middle of an import can be taken for a broken library, or be swallowed."""
    with suppress(OSError):
        os.write(2, b"" if follows() else b"qprec: interrupted; nothing was saved.\n")
    os._exit(3)


def _said(sentence: str) -> int:
    """The exit code of what could not be run, said as far as it can be."""
    with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
        sys.stderr.write(f"qprec: {sentence}\n")
    return 3


def _end(code: int) -> NoReturn:
    """Without Python's own end: torch takes long over it, and a signal that comes then would be the exit code."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    atexit._run_exitfuncs()  # libraries remove their temporary folders there
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
