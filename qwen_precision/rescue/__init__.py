"""An exact rescaling that makes a checkpoint safe in fp16: planned, proven, written, probed again.

Other folders import the names below, from here.
May import: record, qwen3, settings, judge, model, watcher, probe, blocks, render.
"""

from qwen_precision.rescue.deliver import delivered
from qwen_precision.rescue.export import check_folder
from qwen_precision.rescue.plan import can_plan, unsupported, wanted, with_plan
from qwen_precision.rescue.proof import Finals, rescaled_store

__all__ = [
    "Finals",
    "can_plan",
    "check_folder",
    "delivered",
    "rescaled_store",
    "unsupported",
    "wanted",
    "with_plan",
]
