"""``qprec`` and ``python -m qwen_precision``: the program, with Ctrl-C caught from the first import on."""

import sys


def run() -> None:
    """Entry point of the ``qprec`` script."""
    try:
        from qwen_precision.cli import main

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("qprec: interrupted.\n")
        code = 3
    sys.exit(code)


if __name__ == "__main__":
    run()
