"""A judged Run as text or bytes, a file a format. Nothing is measured, printed or written here.

Other folders import the names below, from here. No torch.
May import: record, qwen3, settings, judge, model, watcher.
"""

from qwen_precision.render.formats import FORMATS, Format
from qwen_precision.render.text import count, safe
from qwen_precision.render.view import View, one
from qwen_precision.render.words.rescue import why_none

__all__ = ["FORMATS", "Format", "View", "count", "one", "safe", "why_none"]
