"""Hidden states after a layer, measured: how far from the reference's, and which of them dwarf the others."""

import math

import torch
from torch import Tensor

from qwen_precision.record import Massive, rounded
from qwen_precision.torch_dtypes import widened

_CHANNELS = 4
"""Channels with massive activations that are kept of a layer."""
MASSIVE, _TIMES = 100.0, 1000.0
"""A massive activation is above both: the magnitude, and so many times the median (arXiv 2402.17762, section 2)."""


def massive(hidden: Tensor, valid: Tensor, layer: int) -> list[Massive]:
    """The largest hidden state of each channel that has a massive one, at real tokens; of few channels, the largest.

    Args:
        hidden: ``[batch, tokens, hidden]``.
        valid: ``[batch, tokens]`` bool, False at padding.
        layer: after which it is.
    """
    size = hidden.abs().float()
    size = torch.where(valid[..., None] & torch.isfinite(size), size, torch.zeros_like(size))
    median = float(size[valid].median())
    values, places = size.flatten(0, 1).max(dim=0)
    found = []
    for channel in values.topk(min(_CHANNELS, len(values))).indices.tolist():
        value = float(values[channel])
        if value <= max(MASSIVE, _TIMES * median):
            break
        row, position = divmod(int(places[channel]), size.shape[1])
        found.append(
            Massive(
                layer=layer, row=row, position=position, channel=channel, value=rounded(value), median=rounded(median)
            )
        )
    return found


def relative_error(ours: Tensor, wanted: Tensor) -> float | None:
    """Norm of the difference over the norm, or None where there is nothing finite to compare."""
    if not len(wanted):
        return None
    error = float((widened(ours) - widened(wanted)).norm() / widened(wanted).norm())
    return rounded(error) if math.isfinite(error) else None
