"""The whole of `qprec probe`: measure, run the controls that causes are told by, search for triggers, rescue.

Other folders import the names below, from here.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render, rescue, report.
"""

from qwen_precision.diagnose.python import from_python
from qwen_precision.diagnose.run import diagnose
from qwen_precision.diagnose.share import Done, cards, check_there, measured_share, share_told

__all__ = ["Done", "cards", "check_there", "diagnose", "from_python", "measured_share", "share_told"]
