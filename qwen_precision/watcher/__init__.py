"""Every operation of a forward, whatever runs it: where it ran, how large, who started a NaN; a row of logits.

Other folders import the names below, from here.
May import: record, qwen3, settings.
"""

from qwen_precision.watcher.arithmetic import computing
from qwen_precision.watcher.block import Readings, watch
from qwen_precision.watcher.inspector import Clamp, Inspector, Located, storages
from qwen_precision.watcher.look import Look, bound, clamped, look, may_repair, nearly_uniform
from qwen_precision.watcher.mode import Onlooker, Seen, Watcher, attached
from qwen_precision.watcher.readings import Aside, Reading, Spot, bring, spell_out
from qwen_precision.watcher.sequences import Sequences

__all__ = [
    "Aside",
    "Clamp",
    "Inspector",
    "Located",
    "Look",
    "Onlooker",
    "Reading",
    "Readings",
    "Seen",
    "Sequences",
    "Spot",
    "Watcher",
    "attached",
    "bound",
    "bring",
    "clamped",
    "computing",
    "look",
    "may_repair",
    "nearly_uniform",
    "spell_out",
    "storages",
    "watch",
]
