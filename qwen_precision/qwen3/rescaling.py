"""What an exact rescaling is: powers of two for tensors, and what they do to every operation. No torch.

Everything that writes the residual stream is multiplied by 2^-k. Each RMSNorm divides it out again, exactly, if its
eps is multiplied by 2^-2k; Qwen3 has one eps for all norms, so q_proj and k_proj, whose outputs are normed too, take
the same factor. Within a layer a further factor can move from one tensor to another that is linear in it: from up_proj
to down_proj, from v_proj to o_proj, from a norm's weight to what reads it. A product with a power of two rounds
nothing, so in fp32 the logits keep every bit.
"""

import re

from qwen_precision.qwen3.names import expert_of, layer_of
from qwen_precision.qwen3.op import row_of
from qwen_precision.record import Rescaling

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
        power = row_of(module, op, call, sparse).power
        if power is None:
            return 0
        found = self.power(power, layer_of(module), expert_of(module))
        return found if power == "final_norm" else -found
