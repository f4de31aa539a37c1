"""Of many sequences that go through a model together, the largest magnitude that each one made, and where.

The first axis of an operation's output tells whose it is: a sequence, a token or a head of one. Experts work on rows
picked from the tokens; the picking is seen and followed. What cannot be told apart is noted, never left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_precision.qwen3 import row_of
from qwen_precision.watcher.mode import Onlooker, Seen
from qwen_precision.watcher.readings import Spot


class Sequences(Onlooker):
    """An onlooker that keeps the largest magnitude of every sequence; what is not finite is larger than anything.

    Args:
        count: of sequences.
        tokens: of each.
        device: where they compute.
        counts: whether a finite magnitude at a place counts; one that is not finite does anywhere.
    """

    def __init__(self, count: int, tokens: int, device: torch.device, counts: Callable[[Spot], bool]) -> None:
        self._count, self._tokens, self._counts = count, tokens, counts
        self.value = torch.zeros(count, device=device)
        self.site = torch.zeros(count, dtype=torch.long, device=device)
        """Index into ``sites``."""
        self.channel = torch.zeros(count, dtype=torch.long, device=device)
        self.sites: list[Spot] = []
        self.mixed = torch.zeros((), device=device)
        """The largest magnitude of what belongs to no sequence that could be told."""
        self.shift = 0
        """Of an operation that is run in slices of its channels, the first one."""
        self._source = 0
        self._picked: Tensor | None = None

    def __call__(self, seen: Seen) -> None:
        """Look at one operation."""
        out = seen.out.detach() if seen.keep is None else torch.where(seen.keep, seen.out, 0.0)
        size = out.abs().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
        site = (seen.path, seen.op, seen.call)
        if row_of(*site).role in ("scores", "router"):
            # A softmax makes nothing of -inf; where that does harm, NaN follows.
            size = torch.where(out == -torch.inf, 0.0, size)
        if not self._counts(site):
            size = torch.where(torch.isinf(size), size, 0.0)
        width = size.shape[-1] if size.dim() > 1 else 1
        if self._count == 1:
            size = size.reshape(1, -1)
        owner = self._owner(seen.path, len(size) if size.dim() else 0)
        if owner is None:
            self.mixed = torch.maximum(self.mixed, size.max())
            return
        largest, place = size.flatten(1).max(dim=1) if size.dim() > 1 else (size, torch.zeros_like(owner))
        self._keep(owner, largest, place % width + self.shift, site)

    def note_index(self, args: tuple[Any, ...]) -> None:
        """Follow rows that are picked from the tokens, or from rows that were picked before."""
        source = args[0]
        if source.dim() < 2:
            return  # weights or numbers of experts, put into the order of rows: no rows themselves
        for axis, index in enumerate(args[1]):
            if index is None or index.dim() != 1 or index.dtype == torch.bool:
                continue
            again = self._picked is not None and source.data_ptr() != self._source
            if again and self._picked is not None and source.shape[axis] == len(self._picked):
                self._picked = self._picked[index]
            elif source.shape[axis] == self._count * self._tokens:
                self._picked, self._source = index, source.data_ptr()

    def enter(self) -> None:
        """Another part of the model begins: no rows are picked yet."""
        self._picked = None

    def _owner(self, path: str, rows: int) -> Tensor | None:
        """The sequence that each row of an output belongs to, or None where that cannot be told."""
        device = self.value.device
        if self._count == 1:
            return torch.zeros(1, dtype=torch.long, device=device)
        in_experts = "experts" in path
        if in_experts and self._picked is not None and len(self._picked) == rows:
            return self._picked // self._tokens
        if rows and rows % self._count == 0 and (not in_experts or rows == self._count * self._tokens):
            return torch.arange(rows, device=device) // (rows // self._count)
        return None

    def _keep(self, owner: Tensor, largest: Tensor, channel: Tensor, site: Spot) -> None:
        """Of each sequence the best row of this operation, where it is more than the best so far."""
        mine = torch.zeros_like(self.value).scatter_reduce_(0, owner, largest, "amax")
        first = torch.full_like(self.channel, len(owner))
        rows = torch.arange(len(owner), device=owner.device)
        first.scatter_reduce_(0, owner, torch.where(largest == mine[owner], rows, len(owner)), "amin")
        more = mine > self.value
        self.sites.append(site)
        self.value = torch.where(more, mine, self.value)
        self.site = torch.where(more, len(self.sites) - 1, self.site)
        self.channel = torch.where(more, channel[first.clamp(max=len(owner) - 1)], self.channel)
