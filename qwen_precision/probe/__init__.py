"""Measures a checkpoint, every operation watched: all dtypes layer by layer, or the whole model in one after another.

Other folders import the names below, from here.
May import: record, qwen3, settings, judge, model, watcher.
"""

from qwen_precision.probe.collect import Collector
from qwen_precision.probe.dryrun import Load, dry_run
from qwen_precision.probe.run import (
    OUT_OF_MEMORY,
    Job,
    encoded,
    job_for,
    measure,
    opened,
    prepare,
    prepared,
    probe,
    vocabulary_rows,
)
from qwen_precision.probe.shadow import Shadow
from qwen_precision.probe.softmax import largest, rounded_chances
from qwen_precision.probe.task import Task
from qwen_precision.probe.whole import forward

__all__ = [
    "OUT_OF_MEMORY",
    "Collector",
    "Job",
    "Load",
    "Shadow",
    "Task",
    "dry_run",
    "encoded",
    "forward",
    "job_for",
    "largest",
    "measure",
    "opened",
    "prepare",
    "prepared",
    "probe",
    "rounded_chances",
    "vocabulary_rows",
]
