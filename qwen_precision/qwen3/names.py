"""Operation names in Qwen3's own words: a table from (module, operation, call) to what a person calls it.

What is not in the table keeps its path and operation name, so an unknown architecture needs no row. The call
number counts the same operation within one forward of the same module, from 0.
"""

import re

_ATTENTION = r"self_attn$"
_EXPERTS = r"mlp\.experts(\.\d+)?$"

NAMES: tuple[tuple[str, str, int | None, str], ...] = (
    # (module pattern, operation, call or None for any, name); the first row that fits wins
    (r"layers\.\d+$", "add", 0, "residual add after attention"),
    (r"layers\.\d+$", "add", 1, "residual add after mlp"),
    (_ATTENTION, "mul", 0, "rotary embedding: q times cos"),
    (_ATTENTION, "mul", 1, "rotary embedding: rotated q times sin"),
    (_ATTENTION, "add", 0, "rotary embedding of q"),
    (_ATTENTION, "mul", 2, "rotary embedding: k times cos"),
    (_ATTENTION, "mul", 3, "rotary embedding: rotated k times sin"),
    (_ATTENTION, "add", 1, "rotary embedding of k"),
    (_ATTENTION, "matmul", 0, "attention scores"),
    (_ATTENTION, "mul", 4, "scaled attention scores"),
    (_ATTENTION, "add", 2, "masked attention scores"),
    (_ATTENTION, "softmax", None, "attention softmax"),
    (_ATTENTION, "cast", 0, "attention weights"),
    (_ATTENTION, "matmul", 1, "attention output"),
    (_ATTENTION, "scaled_dot_product_attention", None, "attention output"),
    (r"mlp$", "mul", 0, "SwiGLU product"),
    (r"act_fn$", "silu", None, "SiLU of the gate"),
    (r"mlp\.gate$", "linear", None, "router logits"),
    (r"mlp\.gate$", "softmax", None, "router softmax"),
    (r"mlp\.experts\.\d+$", "mul", 0, "SwiGLU product of an expert"),
    (_EXPERTS, "grouped_mm", 0, "gate and up projection of the experts"),
    (_EXPERTS, "grouped_mm", 1, "down projection of the experts"),
    (_EXPERTS, "mul", 0, "SwiGLU product of the experts"),
    (_EXPERTS, "mul", 1, "expert output times routing weight"),
    (_EXPERTS, "sum", None, "sum over the experts"),
    (r"norm$", "pow", None, "square"),
    (r"norm$", "mean", None, "mean square"),
    (r"norm$", "add", 0, "mean square plus eps"),
    (r"norm$", "rsqrt", None, "reciprocal root"),
    (r"norm$", "mul", 0, "normalised values"),
    (r"norm$", "mul", 1, "output"),
    (r"embed_tokens$", "embedding", None, "token embedding"),
    (r"lm_head$", "linear", None, "logits"),
)

_COMPILED = tuple((re.compile(pattern), op, call, name) for pattern, op, call, name in NAMES)
_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)(?:\.(.*))?$")
_SELF_NAMED = ("norm", "layernorm")


def layer_of(module: str) -> int | None:
    """The decoder layer a module path lies in, or None outside the layers."""
    found = _LAYER.match(module)
    return int(found.group(1)) if found else None


def name_of(module: str, op: str, call: int) -> str:
    """What a person calls this operation, for a sentence: "SwiGLU product", "down_proj output".

    An operation outside the table keeps its own name and, beyond the first, its number.
    """
    short = module.rsplit(".", 1)[-1]
    for pattern, wanted, number, name in _COMPILED:
        if op == wanted and (number is None or number == call) and pattern.search(module):
            return f"{short} {name}" if short.endswith(_SELF_NAMED) else name
    if op == "linear":
        return f"{short} output"
    if op == "cast":
        return f"{short} cast" + (f" {call + 1}" if call else "")
    return f"{op} in {short}" + (f", call {call + 1}" if call else "")


def placed(layer: int | None, name: str) -> str:
    """An operation and its layer, if it lies in one: ``layer 3, down_proj output``."""
    return f"layer {layer}, {name}" if layer is not None else name
