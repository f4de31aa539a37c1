"""Faults whose place is known by construction, planted into the fp32 model before it is saved."""

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from support.checkpoints import DEMO

SIZE = 8.0
"""One channel that dwarfs the others leaves a norm (weight 1) as sqrt(hidden_size) = 8."""


def one_channel(model: Any, channel: int, size: float) -> None:
    """Every token's stream is ``size`` in one channel and next to nothing elsewhere."""
    model.model.embed_tokens.weight[:, channel] = size


def one_unit(model: Any, layer: int, channel: int, gate: float, up: float) -> None:
    """The mlp of one layer has one unit, driven by one channel: gate and up come out as given."""
    block = model.model.layers[layer]
    block.post_attention_layernorm.weight.zero_()
    block.post_attention_layernorm.weight[channel] = 1.0
    for part, size in ((block.mlp.gate_proj, gate), (block.mlp.up_proj, up)):
        part.weight.zero_()
        part.weight[0, channel] = size / SIZE
    block.mlp.down_proj.weight.zero_()


def down_proj_output(model: Any) -> None:
    """A product of about 64 and a weight of 2,000: finite inputs, finite weights, an output beyond 65504."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 8.0, 8.0)
    model.model.layers[1].mlp.down_proj.weight[9, 0] = 2000.0


def residual_add(model: Any) -> None:
    """Two finite parts of 40,000 each: the stream brings one, down_proj adds the other."""
    one_channel(model, 9, 40000.0)
    one_unit(model, 1, 9, 8.0, 1.0)
    model.model.layers[1].mlp.down_proj.weight[9, 0] = 5000.0


def swiglu_product(model: Any) -> None:
    """Two finite factors of 400 each, whose product is beyond 65504."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 400.0, 400.0)


def lm_head_output(model: Any) -> None:
    """A logit beyond 65504 from finite hidden states."""
    one_channel(model, 3, 100.0)
    model.model.norm.weight.zero_()
    model.model.norm.weight[3] = 100.0
    model.lm_head.weight.zero_()
    model.lm_head.weight[77, 3] = 10000.0


def one_expert(model: Any, factor: float) -> tuple[Any, Any, Any]:
    """The router of layer 1 sends every token to expert 5, whose gate and up come out as ``factor`` each.

    Gives its gate, up and down weights.
    """
    one_channel(model, 3, 100.0)
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.zero_()
    block.post_attention_layernorm.weight[3] = 1.0
    block.mlp.gate.weight.zero_()
    block.mlp.gate.weight[5, 3] = 10.0
    experts = block.mlp.experts
    if hasattr(experts, "gate_up_proj"):  # transformers 5 keeps all experts in one tensor
        half = experts.gate_up_proj.shape[1] // 2
        gate, up, down = experts.gate_up_proj[5, :half], experts.gate_up_proj[5, half:], experts.down_proj[5]
    else:
        gate, up, down = (getattr(experts[5], name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    for part in (gate, up, down):
        part.zero_()
    gate[0, 3] = up[0, 3] = factor / SIZE
    return gate, up, down


def expert_product(model: Any) -> None:
    """One expert's SwiGLU product; the router sends every token there."""
    one_expert(model, 400.0)


def ids_of(text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])


def loud_token(text: str, size: float) -> Callable[[Any], None]:
    """One token has a large embedding in a channel, and layer 1 adds as much again: their sum is too much."""

    def plant(model: Any) -> None:
        (token,) = ids_of(text)
        model.model.embed_tokens.weight[:, 9] = 0.0
        model.model.embed_tokens.weight[token, 9] = size
        one_unit(model, 1, 9, 8.0, 1.0)
        model.model.layers[1].mlp.down_proj.weight[9, 0] = size / 8

    return plant


def enough_of_them(gain: float) -> Callable[[Any], None]:
    """Attention of layer 1 averages a channel that is +1 everywhere and -1 at the token "Z"; an MLP unit multiplies the
    average with a channel that only "Z" has. So "Z" is large only after enough other tokens."""

    def plant(model: Any) -> None:
        (mark,) = ids_of("Z")
        embed = model.model.embed_tokens.weight
        embed.zero_()
        embed[:, 1] = 100.0  # what every norm divides by: sqrt(64) / 100
        embed[:, 2], embed[mark, 2] = 12.5, -12.5
        embed[mark, 3] = 12.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        block = model.model.layers[1]
        block.self_attn.q_norm.weight.zero_()  # all scores equal: the plain average
        block.self_attn.v_proj.weight.zero_()
        block.self_attn.v_proj.weight[0, 2] = 1.0
        block.self_attn.o_proj.weight[4, 0] = 12.5
        for part, channel, size in ((block.mlp.gate_proj, 4, 400.0), (block.mlp.up_proj, 3, gain)):
            part.weight.zero_()
            part.weight[0, channel] = size

    return plant
