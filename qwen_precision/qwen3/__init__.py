"""All that is known of a model family: names and roles of operations, which tensor takes which factor.

Other folders import the names below, from here. No torch.
May import: record.
"""

from qwen_precision.qwen3.names import expert_of, layer_of, placed
from qwen_precision.qwen3.op import CACHED, GATE_AND_UP, name_of, row_of
from qwen_precision.qwen3.reads import is_product, operands
from qwen_precision.qwen3.rescaling import EMBEDDING, HEAD, Scale, has_qk_norm, powers_of, why_not

__all__ = [
    "CACHED",
    "EMBEDDING",
    "GATE_AND_UP",
    "HEAD",
    "Scale",
    "expert_of",
    "has_qk_norm",
    "is_product",
    "layer_of",
    "name_of",
    "operands",
    "placed",
    "powers_of",
    "row_of",
    "why_not",
]
