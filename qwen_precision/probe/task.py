"""What a run is given: prompts as the model takes them; for a shadow run, dtypes and how to go about it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Task:
    """What a shadow run shall do."""

    dtypes: list[str]
    """Passes in order; the reference, if it is among them, first."""
    near: float
    """Locate an operation whose headroom is below this."""
    vocabulary_rows: int
    """Rows of the vocabulary that lm_head takes at once; 0 for all."""
    arithmetic: str = "native"
    """How products of 16-bit operands are computed; of ``settings.ARITHMETIC``."""
    local: bool = False
    """Run every layer on the reference's hidden states, too, for the error that it makes by itself."""


FinalHook = Callable[[str, int, Tensor, Tensor | None], None]
"""Called with dtype, prompt, ``[batch, tokens, hidden]`` final hidden states, and logits: of all positions where they
were computed whole, else of the last ones up to the end; None where there is no lm_head."""
