"""Which kernels this torch has: bounds that hold for today's are kept as they are, and wider for the oldest's alone."""

import torch

OLDEST = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7)
"""Torch 2.6, the lower bound of pyproject.toml: it sums fp16 in fp16 where a CPU can, and writes some attention out."""
