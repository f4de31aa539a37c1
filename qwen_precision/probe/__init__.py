"""Measures a checkpoint: all dtypes through the layers together, every operation watched. Nothing is judged here.

Other folders import the names below, from here.
May import: record, qwen3, settings, judge, model, watcher.
"""

from qwen_precision.probe.collect import Collector
from qwen_precision.probe.run import Job, encoded, job_for, measure, prepare, probe, vocabulary_rows
from qwen_precision.probe.shadow import Shadow
from qwen_precision.probe.task import Task

__all__ = ["Collector", "Job", "Shadow", "Task", "encoded", "job_for", "measure", "prepare", "probe", "vocabulary_rows"]
