"""``python -m qwen_precision`` is ``qprec``."""

from qwen_precision.cli import run

run()
