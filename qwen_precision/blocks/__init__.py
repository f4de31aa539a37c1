"""Many records as one: which blocks of work there are and whose, a folder that holds a record each, their merging.

Other folders import the names below, from here. No torch.
May import: record, qwen3, settings, judge, model, watcher.
"""

from qwen_precision.blocks.folder import Folder
from qwen_precision.blocks.merge import reports
from qwen_precision.blocks.plan import Block, Item, Plan, plan_for
from qwen_precision.blocks.summary import Told, for_block
from qwen_precision.blocks.weights import weights_id

__all__ = ["Block", "Folder", "Item", "Plan", "Told", "for_block", "plan_for", "reports", "weights_id"]
