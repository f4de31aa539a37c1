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


def massive_numbers(hidden: Tensor, valid: Tensor) -> Tensor:
    """The median magnitude, then magnitudes, channels and places of the largest hidden states, on the device.

    Args:
        hidden: ``[batch, tokens, hidden]``.
        valid: ``[batch, tokens]`` bool, False at padding.
    """
    size = hidden.abs().float()
    counts = valid[..., None] & torch.isfinite(size)
    median = torch.where(valid[..., None], torch.where(counts, size, 0.0), torch.nan).flatten().nanmedian()
    values, places = torch.where(counts, size, 0.0).flatten(0, 1).max(dim=0)
    top = values.topk(min(_CHANNELS, len(values)))
    return torch.cat([widened(each) for each in (median[None], top.values, top.indices, places[top.indices])])


def massive(numbers: list[float], tokens: int, layer: int) -> list[Massive]:
    """The largest hidden state of each channel that has a massive one, at real tokens; of few channels, the largest.

    Args:
        numbers: of ``massive_numbers``, on the host.
        tokens: of a row.
        layer: after which it is.
    """
    median, count = numbers[0], len(numbers) // 3
    found = []
    for value, channel, place in zip(*(numbers[1 + n * count : 1 + (n + 1) * count] for n in range(3)), strict=True):
        if value <= max(MASSIVE, _TIMES * median):
            break
        row, position = divmod(int(place), tokens)
        found.append(
            Massive(
                layer=layer,
                row=row,
                position=position,
                channel=int(channel),
                value=rounded(value),
                median=rounded(median),
            )
        )
    return found


def distance(ours: Tensor, wanted: Tensor, own: Tensor) -> Tensor:
    """Norm of the difference over the norm, without dimensions and on the device; NaN where nothing is compared.

    Args:
        ours, wanted: ``[batch, tokens, hidden]``.
        own: ``[batch, tokens]`` bool, what is compared.
    """
    nothing = torch.zeros((), device=own.device)
    apart = torch.where(own[..., None], widened(ours) - widened(wanted), nothing)
    found: Tensor = apart.norm() / torch.where(own[..., None], widened(wanted), nothing).norm()
    return found


def as_error(value: float) -> float | None:
    """A ``distance`` as it goes into the record: None where there was nothing finite to compare."""
    return rounded(value) if math.isfinite(value) else None
