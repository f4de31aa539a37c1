"""A softmax in a dtype against one in float32, on the very same logits.

In the dtype means what the kernels of a graphics card do, and so the least error that any code in the dtype has: sums
in float32, every result rounded once (torch's ``PersistentSoftmax.cuh`` and ``NLLLoss2d.cu``, with ``acc_type``). Its
CPU kernels round in between, too: those of ``log_softmax`` the logarithm of the sum, those of ``nll_loss`` partial sums
over the tokens. What is called by hand is ``exp(x - max)`` over its sum, every step a tensor of the dtype, as an export
or a kernel without wider results has it; there the sum of more than 65,504 equal logits is infinite in fp16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen_precision.torch_dtypes import widened

TOP = 10
"""Likeliest tokens whose ranks are compared."""


def of_tokens(logprobs: Tensor, real: Tensor, dtype: torch.dtype) -> Tensor:
    """What the dtype makes of the log-probabilities of a prompt's own tokens.

    Args:
        logprobs: ``[batch, tokens - 1]`` float32, nats.
        real: of the same shape, bool: whether a token and the one before it are no padding.
        dtype: in which a log-softmax would have given them.

    Returns:
        ``[batch, 8]``: tokens that are finite in float32, of these the largest error and its root mean square (nats),
        the cross-entropy (nats a token), that in the dtype, how far the two are apart, tokens that are infinite in the
        dtype, and those whose probability is zero. On the device, in the widest format that it has.
    """
    fine = real & torch.isfinite(logprobs)
    held = logprobs.to(dtype)
    good = fine & torch.isfinite(held)
    apart = torch.where(good, widened(held) - widened(logprobs), 0.0)
    count = fine.sum(dim=1)
    loss, kept = (-torch.where(fine, widened(each), 0.0).sum(dim=1) / count for each in (logprobs, held))
    chance = logprobs.exp()
    lost = fine & (chance > 0) & (chance.to(dtype) == 0)
    numbers = [
        count,
        apart.abs().amax(dim=1) if apart.shape[1] else torch.zeros_like(loss),
        (apart.square().sum(dim=1) / good.sum(dim=1)).sqrt(),
        loss,
        kept.to(dtype),
        (widened(kept.to(dtype)) - loss).abs(),
        (fine & ~good).sum(dim=1),
        lost.sum(dim=1),
    ]
    return torch.stack([widened(each) for each in numbers], dim=1)


class Rounded(NamedTuple):
    """Distributions in a dtype; a number a position, on the device."""

    mass_lost: Tensor
    ranks: Tensor
    changed: Tensor


def rounded_chances(chances: Tensor, logits: Tensor, values: Tensor, ids: Tensor) -> Rounded:
    """What is left of distributions that were rounded to a dtype.

    A token's rank is how many tokens are strictly likelier, so two that became equal share one. As rounding turns no
    order round, only that changes ranks: two logits that the dtype tells apart, and one probability for both. Logits
    that are one number in the dtype (equal, or nearer than its steps) are a tie in whatever the softmax is computed,
    and change nothing. Of equal ones the likeliest token is that with the lowest id, as ``argmax`` takes it.

    Args:
        chances: ``[positions, vocabulary]`` probabilities in the dtype.
        logits: of the same shape, that they were made of.
        values, ids: ``[positions, 10]`` largest logits and their tokens.
    """
    theirs, held = chances.gather(-1, ids).float(), values.to(chances.dtype)
    apart = held[..., None, :] != held[..., :, None]
    ranks = (_ranks(theirs, apart) != _ranks(values, apart)).sum(dim=-1)
    # Of the whole vocabulary: in a flat one more than ten may have become equal. In 16 bits a CPU takes five times as
    # long to find it.
    likeliest = chances.float().argmax(dim=-1, keepdim=True)
    changed = logits.gather(-1, likeliest)[:, 0].to(chances.dtype) != held[:, 0]
    return Rounded(1 - chances.sum(dim=-1, dtype=torch.float32), ranks, changed)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The ten largest of ``[positions, vocabulary]`` logits, and their tokens; of a smaller vocabulary all."""
    found = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return found.values.float(), found.indices


def of_positions(logits: Tensor) -> Tensor:
    """What a softmax in the dtype of ``[positions, vocabulary]`` logits does to whole distributions.

    Returns:
        ``[positions, 6]`` float32 on the device: whether it is finite in float32 (all else means nothing where it is
        not), the mass that is lost, how many of the ten likeliest change rank, whether the likeliest is another, the
        mass that is lost by hand, and whether exp of the largest logit overflows.
    """
    top = logits.amax(dim=-1, keepdim=True)
    rounded = rounded_chances(torch.softmax(logits, dim=-1), logits, *largest(logits))
    parts = (logits - top).exp()
    by_hand = 1 - (parts / parts.sum(dim=-1, keepdim=True)).sum(dim=-1, dtype=torch.float32)
    fine = torch.isfinite(torch.logsumexp(logits.float(), dim=-1))
    numbers = [fine, *rounded, by_hand, torch.isinf(top[:, 0].exp())]
    return torch.stack([each.float() for each in numbers], dim=1)


def _ranks(values: Tensor, apart: Tensor) -> Tensor:
    """Of each, how many are larger, of those that it is told apart from."""
    return ((values[..., None, :] > values[..., :, None]) & apart).sum(dim=-1)
