"""A checkpoint that always says the same token, which is more than fp16 holds as soon as it is read again."""

from collections.abc import Callable
from typing import Any

from support.plants import one_unit


def says(token: int, size: float = 40_000.0) -> Callable[[Any], None]:
    """The likeliest next token is always this one; once it stands in the context, layer 1 adds as much again to its
    large embedding: their sum is too much (or, with a smaller size, is not)."""

    def plant(model: Any) -> None:
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, 5], embed[:, 9] = 100.0, 0.0
        embed[token, 9] = size
        head.zero_()
        head[token, 5] = 10.0
        head[token, 9] = 10.0
        one_unit(model, 1, 9, 8.0, 1.0)
        model.model.layers[1].mlp.down_proj.weight[9, 0] = size / 8

    return plant
