"""What an exact rescaling is: powers of two for tensors, and what they do to every operation. No torch.

Everything that writes the residual stream is multiplied by 2^-k. Each RMSNorm divides it out again, exactly, if its
eps is multiplied by 2^-2k; Qwen3 has one eps for all norms, so q_proj and k_proj, whose outputs are normed too, take
the same factor. Within a layer a further factor can move from one tensor to another that is linear in it: from up_proj
to down_proj, from v_proj to o_proj, from a norm's weight to what reads it. A product with a power of two rounds
nothing, so in fp32 the logits keep every bit.
"""

import re

from qwen_precision.qwen3.names import layer_of
from qwen_precision.record.rescue import Rescaling

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""The two tensors that may be one; the embedding's name without the model's prefix."""


_TENSORS: tuple[tuple[str, dict[str, int]], ...] = (
    # (end of the name, which powers its factor has); the first that fits wins
    (r"embed_tokens\.weight$", {"stream": -1}),
    (r"lm_head\.weight$", {"final_norm": -1}),
    (r"input_layernorm\.weight$", {"input_norm": -1}),
    (r"post_attention_layernorm\.weight$", {"post_norm": -1}),
    (r"self_attn\.[qk]_proj\.weight$", {"input_norm": 1, "stream": -1}),
    (r"self_attn\.v_proj\.weight$", {"input_norm": 1, "value": -1}),
    (r"self_attn\.o_proj\.weight$", {"value": 1, "stream": -1}),
    (r"self_attn\.v_proj\.bias$", {"value": -1}),
    (r"self_attn\.[qko]_proj\.bias$", {"stream": -1}),
    (r"self_attn\.[qk]_norm\.weight$", {}),
    (r"\.gate(_proj)?\.weight$", {"post_norm": 1}),
    (r"\.up_proj\.weight$", {"post_norm": 1, "product": -1}),
    (r"\.down_proj\.weight$", {"product": 1, "stream": -1}),
    (r"^(.*\.)?norm\.weight$", {"final_norm": 1}),
)

_OUTPUTS: tuple[tuple[str, str, int | None, str], ...] = (
    # (module, operation, call or None for any, the power that moves it); what is in no row cannot be moved
    (r"embed_tokens$", "embedding", None, "stream"),
    (r"layers\.\d+$", "add", None, "stream"),
    (r"([qko]|down)_proj$", "linear", None, "stream"),
    (r"v_proj$", "linear", None, "value"),
    (r"self_attn$", "scaled_dot_product_attention", None, "value"),
    (r"self_attn$", "matmul", 1, "value"),
    (r"input_layernorm$", "mul", 1, "input_norm"),
    (r"post_attention_layernorm$", "mul", 1, "post_norm"),
    (r"up_proj$", "linear", None, "product"),
    (r"experts\.\d+$", "mul", 0, "product"),
    (r"experts$", "mul", 0, "product"),
    (r"experts$", "grouped_mm", 0, "product"),
    (r"experts$", "grouped_mm", 1, "stream"),
    (r"experts$", "mul", 1, "stream"),
    (r"experts$", "sum", None, "stream"),
    (r"^(.*\.)?norm$", "mul", 1, "final_norm"),
)
_DENSE = ((r"mlp$", "mul", 0, "product"),)
_SPARSE = (
    # where experts are modules of their own, the block around them weighs and adds what they give
    (r"mlp$", "mul", None, "stream"),
    (r"mlp$", "index_add_", None, "stream"),
)
GATE_AND_UP = ("grouped_mm", 0)
"""Operation and call of the product whose first half of the channels is the gate, which no power moves."""

_EXPERT = re.compile(r"\.experts\.(\d+)(?:\.|$)")


def expert_of(name: str) -> int | None:
    """The expert that a tensor or module belongs to, or None."""
    found = _EXPERT.search(name)
    return int(found.group(1)) if found else None


def moved_by(module: str, op: str, call: int, sparse: bool) -> str | None:
    """The power that an operation's output goes with, or None: nothing exact moves it.

    Args:
        module, op, call: of the operation, as in a ``Site``.
        sparse: whether its layer has experts.
    """
    rules: tuple[tuple[str, str, int | None, str], ...] = (*_OUTPUTS, *(_SPARSE if sparse else _DENSE))
    for pattern, wanted, number, power in rules:
        if wanted == op and number in (None, call) and re.search(pattern, module):
            return power
    return None


def powers_of(tensor: str) -> dict[str, int] | None:
    """Which powers, with which sign, are in the factor of a tensor; None where the name is not known."""
    return next((powers for pattern, powers in _TENSORS if re.search(pattern, tensor)), None)


class Scale:
    """A rescaling, looked up by tensor and by operation."""

    def __init__(self, rescaling: Rescaling) -> None:
        self.rescaling = rescaling
        self._layers = {each.layer: each for each in rescaling.layers}

    def power(self, name: str, layer: int | None = None, expert: int | None = None) -> int:
        """One power; ``product`` of a MoE layer without an expert is the least of all its experts."""
        if name in ("stream", "final_norm"):
            return int(getattr(self.rescaling, name))
        here = self._layers.get(layer) if layer is not None else None
        if here is None:
            return 0
        if name == "product":
            return min(here.product) if expert is None else here.product[expert if expert < len(here.product) else 0]
        return int(getattr(here, name))

    def factor(self, tensor: str) -> int:
        """The tensor is multiplied by two to this."""
        layer, expert = layer_of(tensor), expert_of(tensor)
        return sum(sign * self.power(name, layer, expert) for name, sign in (powers_of(tensor) or {}).items())

    def output(self, module: str, op: str, call: int, sparse: bool) -> int:
        """An operation's output is multiplied by two to this; 0 where nothing moves it."""
        power = moved_by(module, op, call, sparse)
        if power is None:
            return 0
        found = self.power(power, layer_of(module), expert_of(module))
        return found if power == "final_norm" else -found
