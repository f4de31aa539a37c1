"""What an exact rescaling is: powers of two for tensors, and what they do to every operation. No torch.

Everything that writes the residual stream is multiplied by 2^-k. Each RMSNorm divides it out again, exactly, if its
eps is multiplied by 2^-2k; Qwen3 has one eps for all norms, so q_proj and k_proj, whose outputs are normed too, take
the same factor. Within a layer a further factor can move from one tensor to another that is linear in it: from up_proj
to down_proj, from v_proj to o_proj, from a norm's weight to what reads it. A product with a power of two rounds
nothing, so in fp32 the logits keep every bit.
"""

import re
from typing import Annotated

from pydantic import Field

from qwen_precision.qwen3.names import layer_of
from qwen_precision.record.parts import Number, Part

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""The two tensors that may be one; the embedding's name without the model's prefix."""

Power = Annotated[int, Field(ge=-120, le=120)]
"""An exponent of two; fp32 has no more than that."""


class LayerPowers(Part):
    """Powers taken out of one layer: what is named comes out 2^-n as large as it was."""

    layer: Annotated[int, Field(ge=0)]
    input_norm: Power
    """Output of input_layernorm; q, k and v_proj make up for it."""
    value: Power
    """Output of v_proj and so of attention; o_proj makes up for it."""
    post_norm: Power
    """Output of post_attention_layernorm; gate, up_proj and the router make up for it."""
    product: Annotated[list[Power], Field(min_length=1)]
    """Output of up_proj and so the SwiGLU product; down_proj makes up for it. One number, or one an expert."""


class Rescaling(Part):
    """All powers of one checkpoint."""

    stream: Power
    """The residual stream, and outputs of q_proj and k_proj, come out 2^-stream as large."""
    final_norm: Power
    """The final norm's weight is multiplied by 2^final_norm, lm_head by its inverse."""
    untied: bool
    """Whether lm_head, tied to the embedding before, becomes a tensor of its own."""
    eps: Number
    """``rms_norm_eps`` as config.json has it now; it is multiplied by 2^(-2 stream)."""
    layers: list[LayerPowers]
    """Those in which a power is not 0."""

    @property
    def new_eps(self) -> float:
        """``rms_norm_eps`` of the rescaled checkpoint."""
        return float(self.eps) * 2.0 ** (-2 * self.stream)

    @property
    def changes_nothing(self) -> bool:
        """Whether every power is 0."""
        return not (self.stream or self.final_norm or self.untied or self.layers)


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
