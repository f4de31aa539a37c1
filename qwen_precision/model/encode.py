"""Prompts of the record as the tensors a model takes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_precision.model.folder import Checkpoint
from qwen_precision.record import Prompt


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it."""

    ids: Tensor
    """``[batch, tokens]`` int64, padded on the left."""
    mask: Tensor
    """``[batch, tokens]`` int64, 1 at tokens and 0 at padding."""


def encode(prompt: Prompt, checkpoint: Checkpoint, device: torch.device) -> Encoded:
    """A prompt of the record as tensors on a device."""
    tokenizer: Any = checkpoint.tokenizer
    # Any id does at a pad position: it is masked. The tokenizer's own is what generation would use.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    pad = pad if pad < checkpoint.text_config.vocab_size else 0
    ids = torch.tensor([[pad] * row.padding + row.ids for row in prompt.rows], device=device)
    mask = torch.tensor([[0] * row.padding + [1] * len(row.ids) for row in prompt.rows], device=device)
    return Encoded(ids, mask)
