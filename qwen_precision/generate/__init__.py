"""Decodes text with the guards on: watch, repair a row of logits, recover a row of the batch.

Other folders import the names below, from here.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render, rescue, report.
"""

from qwen_precision.generate.run import generate

__all__ = ["generate"]
