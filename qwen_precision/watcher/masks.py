"""Extremes that are meant: additive masks, and the scores they were added to.

A tensor that was filled with the dtype's minimum or an infinity, whole or in part, is a mask (or is masked). Beside
every such tensor lies one of bools, true where it holds such an extreme on purpose. What moves, overwrites or cuts the
values does the same to the bools, in place too and through views; elementwise operations hand them on; softmax ends it.
Such tensors are judged on their other entries: an overflow there is still one.

What it does not see: an extreme written through a view into a tensor that held none.
"""

from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from qwen_precision.watcher.aten import AS_VALUES, COMBINES_WITH_MASK, CONSTANT, Kind, Rule

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""Formats whose magnitudes are watched."""

_LIMITS = frozenset((float("inf"), *(torch.finfo(dtype).max for dtype in FLOATS)))
"""An extreme may be another format's: a mask is made in fp32 of fp16's minimum, and cast."""


class _Held(NamedTuple):
    tensor: ReferenceType[Tensor]
    """Weakly, so that scores die in time."""
    masked: Tensor
    """Where it is extreme on purpose; bool, broadcastable to it. It shares memory with another's only as the tensors
    themselves do, so that what is written into one is seen in the other."""


class Masks:
    """Tensors that hold intended extremes, and where."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    def mark(self, mask: Tensor) -> None:
        """Declare an additive float mask that was made elsewhere."""
        if mask.dtype in FLOATS:
            self._remember(mask, mask <= torch.finfo(mask.dtype).min / 2)

    def of(self, value: Any) -> Tensor | None:
        """Where a tensor is extreme on purpose, broadcastable to it; None where it is nowhere."""
        return self._held[id(value)].masked if self._is_held(value) else None

    def after(
        self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any
    ) -> Tensor | None:
        """The entries of an operation's output that are not extreme on purpose.

        Returns:
            bool, broadcastable to the output; None if nothing in it is.
        """
        if not isinstance(out, Tensor):
            return None
        if rule.mutates and kwargs and kwargs.get("out") is out:
            self._held.pop(id(out), None)  # whatever was there is gone
        extreme = rule.may_mask and _fills_in_extreme(rule, args, out)
        if not extreme and not self._is_any_held(args):
            return None
        masked = None
        if out.dtype in FLOATS and out.dim() and out.numel():
            masked = self._masked(func, rule, args, kwargs or {}, out, extreme)
        if masked is None:
            if rule.mutates:
                self._held.pop(id(out), None)  # written over by something unknown: what is there now is read
            return None
        if rule.mutates or out is not args[0]:
            self._remember(out, masked)
        return ~masked

    def _masked(
        self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, extreme: bool
    ) -> Tensor | None:
        """Where an output is extreme on purpose; None if the operation ends it.

        Args:
            extreme: whether the operation puts such a constant in.
        """
        base = rule.base
        if base in CONSTANT:
            return torch.ones(out.shape, dtype=torch.bool, device=out.device) if extreme else None
        if base == "mul" and extreme:
            return torch.eq(out, args[1])  # of ones and zeros; any other product is no extreme on purpose
        if base in COMBINES_WITH_MASK:
            return None if out.dim() < args[0].dim() else self._combined(rule, args, out)
        if base == "where":
            first, second = (self._alike(each, out, whole=False) for each in args[1:3])
            return torch.where(args[0], first, second)
        if base == "masked_fill" and not self._is_held(args[0]):
            mask: Tensor = args[1]
            return mask.clone()  # as it is, not as large as the scores
        if base == "neg":
            return self._known(args[0]).clone()
        if rule.kind is Kind.MOVE or base in AS_VALUES:
            return self._done_alike(func, base, args, kwargs, out)
        return None

    def _combined(self, rule: Rule, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Of an elementwise operation."""
        first, second = self._known(args[0]), self._known(args[1] if len(args) > 1 else None)
        pair = len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() > 0
        if pair and rule.base in ("max", "maximum"):  # both may be masks: whichever it was taken from
            masked = torch.where(out == args[1], second, first)
        else:
            masked = first | second
        if pair and rule.base == "mul":
            masked = masked & (out != 0)
        return self._own(out).copy_(masked) if rule.mutates and self._is_held(out) else masked

    def _done_alike(
        self, func: Any, base: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """The same operation done to the bools: a view of them is a view again, what is written is written."""
        places = AS_VALUES.get(base, (0,))
        alike = [self._alike(each, out, whole=True) if at in places else each for at, each in enumerate(args)]
        try:
            masked = func(*alike, **kwargs)
        except (RuntimeError, TypeError):
            return None
        return masked if isinstance(masked, Tensor) else None

    def _alike(self, value: Any, out: Tensor, whole: bool) -> Any:
        """Where a value that an operation puts into ``out`` is extreme on purpose; of a list, a list.

        Args:
            whole: in the shape of a tensor, as viewing and writing in place need it, and a bool of a number; else
                a tensor that is broadcastable to it.
        """
        if isinstance(value, (list, tuple)):
            return [self._alike(each, out, whole) for each in value]
        if self._is_held(value):
            return self._own(value) if whole else self._known(value)
        extreme = _is_extreme(value, out.dtype)
        if isinstance(value, Tensor):
            return torch.full(value.shape if whole else (), extreme, dtype=torch.bool, device=value.device)
        return extreme if whole else torch.tensor(extreme, device=out.device)

    def _known(self, value: Any) -> Tensor:
        """Where an operand is extreme on purpose, broadcastable to it."""
        masked = self.of(value)
        return masked if masked is not None else torch.zeros((), dtype=torch.bool)

    def _own(self, tensor: Tensor) -> Tensor:
        """The bools of a held tensor in its own shape."""
        masked = self._held[id(tensor)].masked
        if masked.shape != tensor.shape:
            masked = masked.expand(tensor.shape).clone()
            self._remember(tensor, masked)
        return masked

    def _is_held(self, value: Any) -> bool:
        held = self._held.get(id(value)) if isinstance(value, Tensor) else None
        return held is not None and held.tensor() is value

    def _is_any_held(self, args: tuple[Any, ...]) -> bool:
        if not self._held:
            return False
        return any(any(map(self._is_held, each)) if type(each) is list else self._is_held(each) for each in args[:4])

    def _remember(self, tensor: Tensor, masked: Tensor) -> None:
        key = id(tensor)
        self._held[key] = _Held(ref(tensor, lambda _: self._held.pop(key, None)), masked)


def _fills_in_extreme(rule: Rule, args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether an operation puts a constant that is an extreme into its output."""
    if out.dtype not in FLOATS:
        return False
    if rule.base == "mul":
        return type(args[1]) is float and abs(args[1]) in _LIMITS
    return any(_is_extreme(args[at], out.dtype) for at in AS_VALUES[rule.base] if at < len(args))


def _is_extreme(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value that is put in (a number, or the 0-d tensor that torch makes of one) is at a limit."""
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            return False
        value = float(value)
    return isinstance(value, (int, float)) and (abs(value) in _LIMITS or abs(value) >= torch.finfo(dtype).max)
