"""Every operation of a forward, whatever engine runs it: where it ran, how large it was, who started a NaN.

Other folders import the names below, from here.
May import: record, qwen3, settings.
"""

from qwen_precision.watcher.arithmetic import computing
from qwen_precision.watcher.block import Readings, watch
from qwen_precision.watcher.inspector import Clamp, Inspector, Located, storages
from qwen_precision.watcher.mode import Onlooker, Seen, Watcher, attached
from qwen_precision.watcher.readings import Aside, Reading, Spot, bring, spell_out
from qwen_precision.watcher.sequences import Sequences

__all__ = [
    "Aside",
    "Clamp",
    "Inspector",
    "Located",
    "Onlooker",
    "Reading",
    "Readings",
    "Seen",
    "Sequences",
    "Spot",
    "Watcher",
    "attached",
    "bring",
    "computing",
    "spell_out",
    "storages",
    "watch",
]
