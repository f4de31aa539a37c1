"""What an exact rescaling is: powers of two for tensors, and what they do to every operation. No torch.

Everything that writes the residual stream is multiplied by 2^-k. Each RMSNorm divides it out again, exactly, if its
eps is multiplied by 2^-2k. A model has one eps for all norms: where q and k are normed too (Qwen3), q_proj and k_proj
take the same factor; where they are not (Qwen2, Llama, Mistral), they keep their size, and what one of them takes the
other gives back: rotary embedding is linear, and attention sees only their products. Within a layer a further factor
can move from one tensor to another that is linear in it: from up_proj to down_proj, from v_proj to o_proj, from a
norm's weight to what reads it. A bias goes with the output it is added to. A product with a power of two rounds
nothing, so in fp32 the logits keep every bit.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from qwen_precision.qwen3.names import expert_of, layer_of
from qwen_precision.qwen3.op import row_of
from qwen_precision.record import Rescaling

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""The two tensors that may be one; the embedding's name without the model's prefix."""


FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE", "llama": "Llama", "mistral": "Mistral"}
"""By ``model_type``: the models that the tables here and in ``op.py`` describe."""

ONE_PLUS = (
    *("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma", "recurrent_gemma"),
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
)
"""``model_type`` of models whose norms multiply by one plus their weight, which no power of two can be put into."""


def why_not(family: str) -> str | None:
    """Why no model of a family can be rescaled exactly; None where its tables are here."""
    if family in FAMILIES:
        return None
    if family in ONE_PLUS:
        return f"the norms of {family!r} multiply by 1 + weight, which cannot take a power of two exactly"
    *most, last = FAMILIES.values()
    return f"only {', '.join(most)} and {last} can be rescaled exactly, this is {family!r}"


class _Tensor(NamedTuple):
    """One kind of tensor: the end of its name, and which powers, with which sign, are in its factor."""

    name: str
    powers: dict[str, int]
    unnormed: dict[str, int] | None = None
    """The powers instead, where q and k have no norms of their own."""


_TENSORS: tuple[_Tensor, ...] = (
    # the first that fits wins
    _Tensor(r"embed_tokens\.weight$", {"stream": -1}),
    _Tensor(r"lm_head\.weight$", {"final_norm": -1}),
    _Tensor(r"input_layernorm\.weight$", {"input_norm": -1}),
    _Tensor(r"post_attention_layernorm\.weight$", {"post_norm": -1}),
    _Tensor(r"self_attn\.q_proj\.weight$", {"input_norm": 1, "stream": -1}, {"input_norm": 1, "query": -1}),
    _Tensor(r"self_attn\.k_proj\.weight$", {"input_norm": 1, "stream": -1}, {"input_norm": 1, "key": -1}),
    _Tensor(r"self_attn\.v_proj\.weight$", {"input_norm": 1, "value": -1}),
    _Tensor(r"self_attn\.o_proj\.weight$", {"value": 1, "stream": -1}),
    _Tensor(r"self_attn\.q_proj\.bias$", {"stream": -1}, {"query": -1}),
    _Tensor(r"self_attn\.k_proj\.bias$", {"stream": -1}, {"key": -1}),
    _Tensor(r"self_attn\.v_proj\.bias$", {"value": -1}),
    _Tensor(r"self_attn\.o_proj\.bias$", {"stream": -1}),
    _Tensor(r"self_attn\.[qk]_norm\.weight$", {}),
    _Tensor(r"\.gate(_proj)?\.weight$", {"post_norm": 1}),
    _Tensor(r"\.up_proj\.weight$", {"post_norm": 1, "product": -1}),
    _Tensor(r"\.down_proj\.weight$", {"product": 1, "stream": -1}),
    _Tensor(r"\.gate_proj\.bias$", {}),
    _Tensor(r"\.up_proj\.bias$", {"product": -1}),
    _Tensor(r"\.down_proj\.bias$", {"stream": -1}),
    _Tensor(r"^(.*\.)?norm\.weight$", {"final_norm": 1}),
)


def powers_of(tensor: str, qk_norm: bool) -> dict[str, int] | None:
    """Which powers, with which sign, are in the factor of a tensor; None where the name is not known."""
    row = next((row for row in _TENSORS if re.search(row.name, tensor)), None)
    if row is None:
        return None
    return row.powers if qk_norm or row.unnormed is None else row.unnormed


def has_qk_norm(names: Iterable[str]) -> bool:
    """Whether q and k have norms of their own, by the paths of a model's tensors or modules."""
    return any(re.search(r"(^|\.)[qk]_norm(\.|$)", name) for name in names)


class Scale:
    """A rescaling, looked up by tensor and by operation."""

    def __init__(self, rescaling: Rescaling) -> None:
        self.rescaling = rescaling
        self._layers = {each.layer: each for each in rescaling.layers}

    def power(self, name: str, layer: int | None = None, expert: int | None = None) -> int:
        """One power; ``product`` of a MoE layer without an expert is the least of all its experts."""
        if name in ("stream", "final_norm"):
            return int(getattr(self.rescaling, name))
        if name == "key":
            return -self.power("query", layer)
        here = self._layers.get(layer) if layer is not None else None
        if here is None:
            return 0
        if name == "product":
            return min(here.product) if expert is None else here.product[expert if expert < len(here.product) else 0]
        return int(getattr(here, name))

    def factor(self, tensor: str) -> int:
        """The tensor is multiplied by two to this."""
        layer, expert = layer_of(tensor), expert_of(tensor)
        powers = powers_of(tensor, self.rescaling.qk_norm) or {}
        return sum(sign * self.power(name, layer, expert) for name, sign in powers.items())

    def output(self, module: str, op: str, call: int, sparse: bool) -> int:
        """An operation's output is multiplied by two to this; 0 where nothing moves it."""
        power = row_of(module, op, call, sparse).mover(self.rescaling.qk_norm)
        if power is None:
            return 0
        found = self.power(power, layer_of(module), expert_of(module))
        return found if power == "final_norm" else -found
