"""Buffers that a module's weights are cast into, so that three dtypes cost the memory of one layer.

Everything a module computes with starts at a multiple of 64 bytes, as what torch allocates does. What is mapped from a
file starts where the file's header ends: a product of one row then adds up in another order and differs in its last
bit from the same product with a fresh copy, and nothing could be compared bit for bit.
"""

import torch
from torch import Tensor, nn

_ALIGNED = 64
"""Bytes: where torch's own allocations on a CPU begin; on a GPU they begin at multiples of more."""


class Scratch:
    """Buffers a module's weights are cast into, used again for the next layer of the same shapes."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.Size], Tensor] = {}
        self._original: list[tuple[nn.Module, str, nn.Parameter]] = []

    def place(self, module: nn.Module, sources: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Give ``module`` its weights in ``dtype``; in that dtype and aligned already, they are used as they are."""
        for name, source in sources.items():
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            if source.dtype == dtype and source.data_ptr() % _ALIGNED == 0 and source.is_contiguous():
                tensor = source
            else:
                key = (name, dtype, source.shape)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(source.shape, dtype=dtype, device=source.device)
                tensor = self._buffers[key].copy_(source)
            self._keep_original(part, leaf)
            part._parameters[leaf] = tensor  # type: ignore[assignment]  # a plain tensor: no autograd here

    def _keep_original(self, part: nn.Module, leaf: str) -> None:
        current = part._parameters[leaf]
        if isinstance(current, nn.Parameter):
            self._original.append((part, leaf, current))

    def clear(self) -> None:
        """Give every module back what it had, and drop the buffers."""
        self.release()
        self._buffers.clear()

    def release(self) -> None:
        """Give the modules back what they had, but keep the buffers for the next layer."""
        for part, leaf, parameter in self._original:
            part._parameters[leaf] = parameter
        self._original.clear()
