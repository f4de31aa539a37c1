"""Extremes that are meant: additive masks, and the scores they were added to.

A tensor into which ``where`` or ``masked_fill`` has put the dtype's minimum or an infinity is a mask (or is
masked). Elementwise operations and views hand that on; softmax ends it. Such tensors are judged on the
entries that are not masked: an overflow there is still one.
"""

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from qwen_precision.watcher.aten import COMBINES_WITH_MASK, Kind

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Formats whose magnitudes are watched."""


class Masks:
    """Tensors that hold intended extremes, and which of their entries do not."""

    def __init__(self) -> None:
        # id -> (the tensor, weakly, so that scores die in time; entries to keep)
        self._held: dict[int, tuple[ReferenceType[Tensor], Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    def mark(self, mask: Tensor) -> None:
        """Declare an additive float mask that was made elsewhere."""
        if mask.dtype in FLOATS:
            self._remember(mask, mask > torch.finfo(mask.dtype).min / 2)

    def note_fill(self, op: str, args: tuple[Any, ...], out: Any) -> None:
        """See a fill; if what it filled in is an extreme, its output is a mask or masked."""
        keep = _kept_by_fill(op, args, out)
        if keep is not None:
            self._remember(out, keep)

    def after(
        self, func: Any, kind: Kind, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any
    ) -> Tensor | None:
        """The unmasked entries of an operation's output (broadcastable bool), or None if it is not masked."""
        keep = self._joined(args, kwargs) if op == "cat" else self._of_arguments(args)
        if keep is None or not isinstance(out, Tensor):
            return None
        if op == "cat":
            pass  # it is as long as the output already
        elif kind is Kind.MOVE:
            keep = keep if out.shape == args[0].shape else _moved(func, args, kwargs, keep)
        elif op not in COMBINES_WITH_MASK or out.dim() < args[0].dim():
            return None
        elif kind is Kind.FILL:
            more = _kept_by_fill(op, args, out)
            keep = keep if more is None else keep & more
        if keep is None or out.dtype not in FLOATS or not out.numel():
            return None
        self._remember(out, keep)
        return keep

    def _of_arguments(self, args: tuple[Any, ...]) -> Tensor | None:
        keep: Tensor | None = None
        for arg in args[:3]:
            held = self._held.get(id(arg)) if isinstance(arg, Tensor) else None
            if held is not None and held[0]() is arg:
                keep = held[1] if keep is None else keep & held[1]
        return keep

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tensor | None:
        """What to keep of tensors that are put together, masked scores and attention sinks say."""
        parts = [self._of_arguments((each,)) for each in args[0]]
        if all(part is None for part in parts):
            return None
        dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
        whole = [
            torch.ones(each.shape, dtype=torch.bool, device=each.device) if part is None else part.expand(each.shape)
            for each, part in zip(args[0], parts, strict=True)
        ]
        return torch.cat(whole, dim=dim)

    def _remember(self, tensor: Tensor, keep: Tensor) -> None:
        key = id(tensor)
        self._held[key] = (ref(tensor, lambda _: self._held.pop(key, None)), keep)


def _kept_by_fill(op: str, args: tuple[Any, ...], out: Any) -> Tensor | None:
    """Where a fill left the values alone, if what it filled in is an extreme on purpose."""
    if not isinstance(out, Tensor) or out.dtype not in FLOATS or len(args) < 3:
        return None
    mask = args[0] if op == "where" else args[1]
    if not isinstance(mask, Tensor):
        return None
    limit = torch.finfo(out.dtype).max
    if _is_extreme(args[2], limit):
        return mask if op == "where" else ~mask
    if op == "where" and _is_extreme(args[1], limit):
        return ~mask
    return None


def _is_extreme(value: Any, limit: float) -> bool:
    """Whether a fill value (a number, or the 0-d tensor that autograd's path makes of one) is at the limit."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.is_floating_point() and abs(float(value)) >= limit
    return isinstance(value, (int, float)) and abs(value) >= limit


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, keep: Tensor) -> Tensor | None:
    """What a slice or an expansion of a mask keeps: the same operation done to the bools."""
    try:
        moved = func(keep.expand(args[0].shape), *args[1:], **(kwargs or {}))
    except (RuntimeError, TypeError):
        return None
    return moved if isinstance(moved, Tensor) else None
