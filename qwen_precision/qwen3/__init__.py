"""All that is known of a model family: names and roles of operations, which tensor takes which factor.

Other folders import the names below, from here. No torch.
May import: record.
"""

from qwen_precision.qwen3.names import expert_of, layer_of, placed
from qwen_precision.qwen3.op import GATE_AND_UP, name_of, row_of
from qwen_precision.qwen3.rescaling import EMBEDDING, HEAD, Scale, has_qk_norm, powers_of, why_not

__all__ = [
    "EMBEDDING",
    "GATE_AND_UP",
    "HEAD",
    "Scale",
    "expert_of",
    "has_qk_norm",
    "layer_of",
    "name_of",
    "placed",
    "powers_of",
    "row_of",
    "why_not",
]
