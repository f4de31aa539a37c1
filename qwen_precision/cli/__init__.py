"""The command line."""

from qwen_precision.cli.app import main

__all__ = ["main"]
