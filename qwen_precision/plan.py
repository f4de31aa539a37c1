"""What a shadow run is given: prompts as the model takes them, dtypes, and how to go about it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it."""

    ids: Tensor
    """``[batch, tokens]`` int64, padded on the left."""
    mask: Tensor
    """``[batch, tokens]`` int64, 1 at tokens and 0 at padding."""


@dataclass(frozen=True)
class Plan:
    """What a shadow run shall do."""

    dtypes: list[str]
    """Passes in order; the reference, if it is among them, first."""
    near: float
    """Locate an operation whose headroom is below this."""
    vocabulary_rows: int
    """Rows of the vocabulary that lm_head takes at once; 0 for all."""


FinalHook = Callable[[str, int, Tensor, Tensor | None], None]
"""Called with dtype, prompt, final hidden states and (if computed whole) logits; for tests and comparisons."""
