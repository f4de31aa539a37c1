"""qprec's words for number formats, and torch's."""

import torch
from torch import Tensor

from qwen_precision.dtypes import DTYPES

_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def short_name(dtype: torch.dtype) -> str:
    """qprec's word for a torch dtype; torch's own where qprec has none."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for qprec's word."""
    found: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return found


def widened(values: Tensor) -> Tensor:
    """In the widest format that the values' device computes in: float64, and float32 on Apple's GPU, which has none."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
