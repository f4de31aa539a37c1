"""What may be done to a row of logits, and what it looks like: pure functions of one ``[vocabulary]`` tensor.

Rules, from the threads where they were learned: clamp, never zero (vllm#14126); a row that is partly NaN may be
repaired, one that is wholly NaN must stop or be computed again (sglang#33263), because sanitised it is a uniform
distribution and gives random text without any error (sglang#33187); clamp not to ``finfo.max``, because dividing by
the temperature overflows again (SGLang uses 1e30). A row that nothing is wrong with is never touched.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_precision.record import BadKind
from qwen_precision.settings import Clamp, Watch


@dataclass(frozen=True)
class Look:
    """What one row of logits holds."""

    nan: int
    inf: int
    """+inf; -inf beside finite numbers is how filters and vocabulary masks say never, and is not bad."""
    negative_inf: int
    elements: int
    flat: bool
    """All finite numbers are the same: what a sanitised NaN row, or a norm that divided to zero, looks like."""

    @property
    def finite(self) -> int:
        """How many are finite."""
        return self.elements - self.nan - self.inf - self.negative_inf

    @property
    def kind(self) -> BadKind | None:
        """In the words of a trip, or None for a row that can be used."""
        if self.finite == 0:
            return "wholly bad"
        if self.nan or self.inf:
            return "partly bad"
        return "flat" if self.flat else None

    @property
    def bad_share(self) -> float:
        """Share of the row that is NaN or +inf."""
        return (self.nan + self.inf) / self.elements

    def numbers(self) -> dict[str, float]:
        """For the record."""
        return {"nan": self.nan, "inf": self.inf, "-inf": self.negative_inf, "elements": self.elements}


def look(row: Tensor, settings: Watch) -> Look:
    """Look closely at one row; for rows whose cheap numbers were already bad.

    Args:
        row: ``[vocabulary]`` raw logits.
        settings: how near to uniform a flat row must be.
    """
    finite = row[torch.isfinite(row)]
    flat = settings.flat > 0 and finite.numel() > 2 and bool(finite.min() == finite.max())
    return Look(
        int(torch.isnan(row).sum()), int(torch.isposinf(row).sum()), int(torch.isneginf(row).sum()), row.numel(), flat
    )


def bound(settings: Clamp, dtype: torch.dtype, temperature: float, penalty: float) -> float:
    """The largest magnitude that a clamped logit may have.

    A repetition penalty multiplies or divides a logit, then the temperature divides it; what comes out must
    still be finite. 4 eps are kept free for the rounding on the way.

    Args:
        settings: has the bound that is used where nothing would overflow it.
        dtype: of the logits.
        temperature: of the sampler, 1 where there is none.
        penalty: the repetition penalty, 1 where there is none.
    """
    info = torch.finfo(dtype)
    grows = max(1.0, penalty, 1 / penalty) * max(1.0, 1 / temperature)
    limit = min(settings.bound, info.max * (1 - 4 * info.eps) / grows)
    held = torch.tensor(limit, dtype=dtype)
    # Rounded down: near the smallest numbers of fp16, rounding up would be more than 4 eps.
    return float(held if float(held) <= limit else torch.nextafter(held, torch.zeros_like(held)))


def clamped(row: Tensor, limit: float) -> Tensor:
    """A partly bad row, repaired: NaN can no longer be chosen, +inf is the largest, nothing is beyond the limit."""
    return row.nan_to_num(nan=-limit, posinf=limit, neginf=-limit).clamp_(-limit, limit)


def may_repair(seen: Look, settings: Clamp, repaired_before: int) -> bool:
    """Whether ``clamp`` may repair such a row: some of it is bad, not too much, and not again and again."""
    return seen.kind == "partly bad" and seen.bad_share <= settings.share and repaired_before < settings.most


def nearly_uniform(entropy: float, top1: float, settings: Watch) -> bool:
    """Whether a row's numbers are those of equal logits, -inf aside; then it is worth a closer look.

    The entropy is never less than -ln(top-1 probability), and equal to it only where all that is possible is
    equally likely.
    """
    return entropy + math.log(top1) <= settings.flat
