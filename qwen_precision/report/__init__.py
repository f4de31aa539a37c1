"""The whole of `qprec report` but the printing: open, judge, compare, choose a format, redact, bundle.

Other folders import the names below, from here. No torch.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render.
"""

from qwen_precision.report.view import BUNDLE, NAMES, bundled, format_for, view

__all__ = ["BUNDLE", "NAMES", "bundled", "format_for", "view"]
