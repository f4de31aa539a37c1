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


def half_a_sum(model: Any) -> None:
    """down_proj adds 64 products of 1,280 and takes 64 such away: the sum is next to nothing, half of it 81,920."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 8.0, 8.0)
    mlp = model.model.layers[1].mlp
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight[:, 3] = 8.0 / SIZE
    half = mlp.down_proj.weight.shape[1] // 2
    mlp.down_proj.weight[9, :half], mlp.down_proj.weight[9, half:] = 20.0, -20.0


def residual_add(model: Any) -> None:
    """Two finite parts of 40,000 each: the stream brings one, down_proj adds the other."""
    one_channel(model, 9, 40000.0)
    one_unit(model, 1, 9, 8.0, 1.0)
    model.model.layers[1].mlp.down_proj.weight[9, 0] = 5000.0


def swiglu_product(model: Any) -> None:
    """Two finite factors of 400 each, whose product is beyond 65504."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 400.0, 400.0)


def o_proj_and_product(model: Any) -> None:
    """Attention's output and, behind it in the same layer, the SwiGLU product."""
    swiglu_product(model)
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:, 3] = 10.0
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[3, 0] = 2000.0


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
        silence(model)
        block = model.model.layers[1]
        block.self_attn.q_norm.weight.zero_()  # all scores equal: the plain average
        block.self_attn.v_proj.weight.zero_()
        block.self_attn.v_proj.weight[0, 2] = 1.0
        block.self_attn.o_proj.weight[4, 0] = 12.5
        for part, channel, size in ((block.mlp.gate_proj, 4, 400.0), (block.mlp.up_proj, 3, gain)):
            part.weight.zero_()
            part.weight[0, channel] = size

    return plant


def gate_too_large(model: Any) -> None:
    """The gate's output is beyond the range; SiLU and the product only carry it on."""
    one_channel(model, 3, 100.0)
    one_unit(model, 1, 3, 80000.0, 1.0)


def expert_output_too_large(model: Any) -> None:
    """One expert's down projection; the product with the routing weight and the sum only carry it on."""
    _, _, down = one_expert(model, 8.0)
    down[9, 0] = 2000.0


def query_norm_too_large(model: Any) -> None:
    """q points along one channel, which q_norm's weight makes too large; the rest of rotary only carries it on."""
    model.model.embed_tokens.weight[:, 1] = 10.0
    attention, width = model.model.layers[1].self_attn, model.config.head_dim
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[width // 2 - 1 :: width, 1] = 1.0
    attention.q_norm.weight.fill_(60000.0)
    attention.k_norm.weight.fill_(1e-3)


def silence(model: Any) -> None:
    """No layer adds anything to the stream."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        mlps = [layer.mlp] if hasattr(layer.mlp, "down_proj") else layer.mlp.experts
        for part in [mlps] if hasattr(mlps, "down_proj") else mlps:
            getattr(part.down_proj, "weight", part.down_proj).zero_()


def two_units(model: Any, size: float) -> tuple[Any, Any, Any]:
    """The mlp of layer 1, empty: "Y" is 100 in channel 5, "Z" is ``size`` in channel 6. Gives gate, up and down."""
    (early,), (late,) = ids_of("Y"), ids_of("Z")
    embed = model.model.embed_tokens.weight
    embed.zero_()
    embed[:, 0] = 100.0
    embed[early, 5], embed[late, 6] = 100.0, size
    silence(model)
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.zero_()
    block.post_attention_layernorm.weight[5:7] = 1.0
    gate, up, down = (getattr(block.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    gate.zero_()
    up.zero_()
    return gate, up, down


def two_tokens(model: Any) -> None:
    """In one layer "Y" overflows in the SwiGLU product, "Z" only in down_proj, which "Y" never reaches alive."""
    gate, up, down = two_units(model, 100.0)
    gate[0, 5] = up[0, 5] = 80.0
    gate[1, 6] = up[1, 6] = 8.0
    down[9, 1] = 60.0


def product_and_sum(model: Any) -> None:
    """In one layer "Y" overflows in down_proj, and "Z" in the residual add after it: 40,000 and 40,000."""
    gate, up, down = two_units(model, 40_000.0)
    gate[0, 5] = up[0, 5] = gate[1, 6] = up[1, 6] = 1.0
    down[11, 0], down[6, 1] = 4000.0, 625.0


def empty(model: Any) -> None:
    """Nothing in the stream but 100 in channel 0, which the layers pass on as it is."""
    embed = model.model.embed_tokens.weight
    embed.zero_()
    embed[:, 0] = 100.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            part.weight.zero_()


def mark(model: Any, text: str, channel: int, size: float = 100.0) -> None:
    """One token's embedding has a channel of its own."""
    model.model.embed_tokens.weight[ids_of(text)[0], channel] = size


def unit(model: Any, layer: int, number: int, channel: int, size: float, out: float = 0.0) -> None:
    """A unit of an mlp: gate and up read one channel, and its product goes to channel 9."""
    block = model.model.layers[layer].mlp
    block.gate_proj.weight[number, channel] = block.up_proj.weight[number, channel] = size
    block.down_proj.weight[9, number] = out


def averaging(model: Any, layer: int, source: int, target: int, gain: float) -> None:
    """Attention of a layer writes the plain average of one channel over the tokens so far into another."""
    attention = model.model.layers[layer].self_attn
    attention.q_norm.weight.zero_()
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[0, source] = 1.0
    attention.o_proj.weight[target, 0] = gain


def loud_scores(size: float) -> Callable[[Any], None]:
    """q and k of layer 1 so large that their product, before it is scaled, leaves fp16's range (or just does not)."""

    def plant(model: Any) -> None:
        attention = model.model.layers[1].self_attn
        attention.q_norm.weight.fill_(size)
        attention.k_norm.weight.fill_(size)

    return plant


def low_score(size: float, token: str = "Z") -> Callable[[Any], None]:
    """In layer 1 every query meets the key of one token with minus ``size``, every other key with next to nothing."""

    def plant(model: Any) -> None:
        (mark,) = ids_of(token)
        config = model.config
        width, slow = config.head_dim, config.head_dim // 2 - 1  # the pair of channels that rotary turns least
        embed = model.model.embed_tokens.weight
        embed.zero_()
        embed[:, 1] = 10.0
        embed[:, 2], embed[mark, 2], embed[mark, 3] = 10.0, 0.0, 10.0
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        for head in range(config.num_attention_heads):
            attention.q_proj.weight[head * width + slow, 1] = 1.0
        for head in range(config.num_key_value_heads):
            attention.k_proj.weight[head * width + slow, 3] = -1.0
            attention.k_proj.weight[head * width + slow - 1, 2] = 1.0
        weight = (abs(size) / width) ** 0.5
        attention.q_norm.weight.fill_(weight)
        attention.k_norm.weight.fill_(weight if size > 0 else -weight)

    return plant
