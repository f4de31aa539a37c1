"""``qprec`` and ``python -m qwen_precision``: the program, with Ctrl-C caught from the first import on."""

import os
import sys
from contextlib import suppress


def run() -> None:
    """Entry point of the ``qprec`` script."""
    try:
        from qwen_precision.cli import main

        code = main()
    except KeyboardInterrupt:
        code = _said("interrupted.")
    except (ImportError, OSError) as error:  # before the program is there: too few files allowed, a broken library
        code = _said(f"cannot start ({error}); check the installation, and that `ulimit -n` is 256 or more.")
    sys.exit(_flushed(code))


def _said(sentence: str) -> int:
    """The exit code of what could not be run, said as far as it can be."""
    with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
        sys.stderr.write(f"qprec: {sentence}\n")
    return 3


def _flushed(code: int) -> int:
    """What is still held back is written now: Python would end with 120 where it cannot be, and a traceback."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return code


if __name__ == "__main__":
    run()
