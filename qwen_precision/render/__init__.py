"""Renderers: a judged Run to text, one file a format. None of them measures, prints or writes.

A new format is a file here and a row in ``RENDERERS``; the command line and its help read the table.
"""

from collections.abc import Callable

from qwen_precision.render.json import render_json
from qwen_precision.render.table import render_table

RENDERERS: dict[str, Callable[..., str]] = {
    "table": render_table,
    "json": render_json,
}

__all__ = ["RENDERERS"]
