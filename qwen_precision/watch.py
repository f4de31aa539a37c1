"""Watch every operation of a model's forward: the largest magnitude each one produced, and where it ran.

    with qwen_precision.watch(model) as readings:
        model(**inputs)
    print(readings.worst(5))

The idea: module hooks tell *where* (the path of the module whose forward is running), a dispatch mode sees
*what* (each operation and its output), so residual adds, products and the insides of norms are seen as well
as module outputs, for any architecture. One fused ``aminmax`` looks at a tensor; it carries NaN and infinity
through. Its two results stay on the device until somebody asks; nothing else is kept, no tensor outlives its
operation. Watched and unwatched outputs are bit-identical: the mode runs the very operation it was given.

Intended extremes are not readings. A tensor into which ``where`` or ``masked_fill`` has put the dtype's
minimum or an infinity is an additive mask; scores that one was added to are judged on their unmasked entries.

What it does not see: values inside a fused kernel (the scores of ``scaled_dot_product_attention``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_precision.operations import (
    COMBINES_WITH_MASK,
    Kind,
    kind_of,
    name_of_operator,
    writes_in_place,
)
from qwen_precision.readings import Reading, Readings, Slots

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


@dataclass(frozen=True)
class Seen:
    """One operation as an inspector sees it, before its output is let go."""

    path: str
    op: str
    call: int
    func: Any
    args: tuple[Any, ...]
    out: Tensor
    keep: Tensor | None
    """Entries that are not masked on purpose (broadcastable bool), or None for all."""


class Inspector(Protocol):
    """Takes a close second look at operations while they run."""

    def __call__(self, seen: Seen) -> None:
        """Look at one operation."""

    def note_sort(self, values: Tensor, indices: Tensor) -> None:
        """See a sort: fused experts order their rows by one."""


@dataclass(frozen=True)
class _Rule:
    """What the mode does with one operator; looked up once, then cached."""

    kind: Kind
    op: str
    mutates: bool


_RULES: dict[Any, _Rule] = {}


def _rule_for(func: Any) -> _Rule:
    rule = _RULES[func] = _Rule(kind_of(func), name_of_operator(func), writes_in_place(func))
    return rule


class Watcher(TorchDispatchMode):
    """The dispatch mode and the path stack; use through ``watch`` or ``attached``.

    Args:
        inspect: called on every watched output after its reading was taken; for a close second look.
    """

    def __init__(self, inspect: Inspector | None = None) -> None:
        super().__init__()
        self.path = ""
        self.inspect = inspect
        self.slots = Slots()
        self._stack: list[str] = []
        self._calls: dict[tuple[str, str], int] = {}
        # Where a reading lives: data pointer -> (elements, dtype, slot). Valid because the mode sees every
        # operation that gives out memory, and forgets the entry when that memory gets other values.
        self._known: dict[int, tuple[int, torch.dtype, int]] = {}
        # Tensors that hold intended extremes: id -> (the tensor, weakly, so that scores die in time; keep).
        self._masks: dict[int, tuple[ReferenceType[Tensor], Tensor]] = {}

    # -- where: the path of the running module -------------------------------------------------------------

    def push(self, path: str) -> None:
        """Enter the forward of the module at ``path``."""
        self._stack.append(self.path)
        self.path = path

    def pop(self) -> None:
        """Leave it again."""
        if self._stack:
            self.path = self._stack.pop()

    def forget(self) -> None:
        """Drop what is known of memory and masks; call between forwards."""
        self._known.clear()
        self._masks.clear()
        self._calls.clear()
        self._stack.clear()
        self.path = ""

    def take(self) -> list[Reading]:
        """The readings since the last call, in order: one transfer per dtype and device."""
        self.forget()
        return self.slots.take()

    def mark_mask(self, mask: Tensor) -> None:
        """Declare an additive float mask that was made elsewhere: its extremes are intended."""
        if mask.dtype in _FLOATS:
            self._remember_mask(mask, mask > torch.finfo(mask.dtype).min / 2)

    def _remember_mask(self, tensor: Tensor, keep: Tensor) -> None:
        key = id(tensor)
        self._masks[key] = (ref(tensor, lambda _: self._masks.pop(key, None)), keep)

    # -- what: every operation -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is and take the reading of what it gave."""
        out = func(*args, **kwargs) if kwargs else func(*args)
        rule = _RULES.get(func) or _rule_for(func)
        if rule.mutates:
            self._known.clear()  # a write through a view changes what any pointer into it stands for
        if self._masks:
            keep = self._masked(func, rule, args, kwargs, out)
            if keep is not None:
                if rule.kind is not Kind.MOVE:
                    self._read(func, rule, args, out, keep)
                return out
        kind = rule.kind
        if kind is Kind.READ or kind is Kind.EXACT:
            if isinstance(out, Tensor):
                self._seen(func, rule, args, out)
            else:
                for item in out if isinstance(out, (tuple, list)) else ():
                    if isinstance(item, Tensor):
                        self._seen(func, rule, args, item)
                        break  # further outputs are bookkeeping: log-sum-exp, seeds, indices
        elif kind is Kind.MOVE:
            self._moved(args, out)
        elif kind is Kind.FILL:
            self._filled(func, rule, args, out)
        else:
            if self.inspect is not None and rule.op == "sort":
                self.inspect.note_sort(out[0], out[1])
            self._lost(out)
        return out

    def _seen(self, func: Any, rule: _Rule, args: tuple[Any, ...], out: Tensor) -> None:
        if out.dtype not in _FLOATS or not out.numel():
            self._lost(out)
            return
        if rule.kind is Kind.EXACT:
            source = args[0]
            if out is source:
                return  # a cast to the dtype it has already
            known = self._known.get(source.data_ptr())
            if (
                known is not None
                and known[0] == out.numel()
                and known[1] == source.dtype
                and (rule.op == "cast" or args[1] == 2)
            ):
                slot = self.slots.derive(self._key(rule), known[2], out.dtype, rule.op)
                self._known[out.data_ptr()] = (out.numel(), out.dtype, slot)
                if self.inspect is not None:
                    self._inspect(func, rule, args, out, None)
                return
        self._read(func, rule, args, out, None)

    def _read(self, func: Any, rule: _Rule, args: tuple[Any, ...], out: Any, keep: Tensor | None) -> None:
        if not isinstance(out, Tensor) or out.dtype not in _FLOATS or not out.numel():
            return
        flat = out if keep is None else torch.where(keep, out, torch.zeros((), dtype=out.dtype, device=out.device))
        if not flat.is_contiguous():
            flat = _dense(flat)
        slot = self.slots.read(self._key(rule), flat)
        self._known[out.data_ptr()] = (out.numel(), out.dtype, slot)
        if self.inspect is not None:
            self._inspect(func, rule, args, out, keep)

    def _key(self, rule: _Rule) -> tuple[str, str]:
        return (self.path, rule.op)

    def _inspect(self, func: Any, rule: _Rule, args: tuple[Any, ...], out: Tensor, keep: Tensor | None) -> None:
        call = self._calls.get((self.path, rule.op), 0)
        self._calls[self.path, rule.op] = call + 1
        assert self.inspect is not None
        self.inspect(Seen(self.path, rule.op, call, func, args, out, keep))

    def _moved(self, args: tuple[Any, ...], out: Any) -> None:
        """A view or a copy: all of it has the input's reading; a part of it, or a mixture, has none."""
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is None or not isinstance(out, Tensor):
            self._lost(out)
            return
        pointer = out.data_ptr()
        if pointer == source.data_ptr():
            return
        known = self._known.get(source.data_ptr())
        if known is not None and known[0] == out.numel() == source.numel() and known[1] == out.dtype:
            self._known[pointer] = known
        else:
            self._known.pop(pointer, None)

    def _lost(self, out: Any) -> None:
        """New values at this memory that nobody looked at."""
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self._known.pop(item.data_ptr(), None)

    # -- intended extremes -----------------------------------------------------------------------------------

    def _filled(self, func: Any, rule: _Rule, args: tuple[Any, ...], out: Any) -> None:
        keep = _kept_by_fill(rule.op, args, out)
        if keep is not None:
            self._remember_mask(out, keep)
        self._lost(out)

    def _masked(
        self, func: Any, rule: _Rule, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any
    ) -> Tensor | None:
        """The unmasked entries of ``out`` if one of the arguments is a mask or masked, else None."""
        if not isinstance(out, Tensor):
            return None
        keep: Tensor | None = None
        for arg in args[:3]:
            held = self._masks.get(id(arg)) if isinstance(arg, Tensor) else None
            if held is not None and held[0]() is arg:
                keep = held[1] if keep is None else keep & held[1]
        if keep is None:
            return None
        if rule.kind is Kind.MOVE and out.shape != args[0].shape:
            keep = _moved_mask(func, args, kwargs, keep)
        elif rule.kind is not Kind.MOVE and rule.op not in COMBINES_WITH_MASK:
            return None
        if keep is None:
            return None
        if rule.kind is Kind.FILL:
            more = _kept_by_fill(rule.op, args, out)
            keep = keep if more is None else keep & more
        self._remember_mask(out, keep)
        return keep


def _dense(tensor: Tensor) -> Tensor:
    """The same elements in memory order: a transposed tensor needs no copy to be looked at."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    return tensor.permute(order)


def _kept_by_fill(op: str, args: tuple[Any, ...], out: Any) -> Tensor | None:
    """Where a fill left the values alone, if what it filled in is an extreme on purpose."""
    if not isinstance(out, Tensor) or out.dtype not in _FLOATS or len(args) < 3:
        return None
    limit = torch.finfo(out.dtype).max
    if op == "where" and isinstance(args[2], (int, float)) and abs(args[2]) >= limit:
        return args[0] if isinstance(args[0], Tensor) else None
    if op == "where" and isinstance(args[1], (int, float)) and abs(args[1]) >= limit:
        return ~args[0] if isinstance(args[0], Tensor) else None
    if op in {"masked_fill", "masked_fill_"} and isinstance(args[2], (int, float)) and abs(args[2]) >= limit:
        return ~args[1]
    return None


def _moved_mask(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, keep: Tensor) -> Tensor | None:
    """What a slice or an expansion of a mask keeps: the same operation done to the bools."""
    try:
        moved = func(keep.expand(args[0].shape), *args[1:], **(kwargs or {}))
    except (RuntimeError, TypeError):
        return None
    return moved if isinstance(moved, Tensor) else None


@contextmanager
def attached(model: nn.Module, watcher: Watcher, prefix: str = "") -> Iterator[None]:
    """Hook every submodule of ``model`` for its path; unhook on the way out, whatever happened.

    The hooks run even when a forward raises (``always_call``), so the stack stays true.
    """
    handles = []
    try:
        for name, module in model.named_modules(prefix=prefix):
            handles.append(module.register_forward_pre_hook(_entering(watcher, name)))
            handles.append(module.register_forward_hook(_leaving(watcher), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        watcher.forget()


def _entering(watcher: Watcher, name: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: Any) -> None:
        watcher.push(name)

    return enter


def _leaving(watcher: Watcher) -> Callable[..., None]:
    def leave(module: nn.Module, args: Any, out: Any) -> None:
        watcher.pop()

    return leave


@contextmanager
def watch(model: nn.Module) -> Iterator[Readings]:
    """Watch every operation of whatever runs in the block.

    Args:
        model: any loaded module; its outputs are bit-identical with and without watching.

    Yields:
        Readings: empty until the block ends (or ``readings.refresh()`` is called), then one reading an
        operation, in the order they ran.
    """
    watcher = Watcher()
    readings = Readings(watcher.slots)
    with attached(model, watcher):
        try:
            with watcher:
                yield readings
        finally:
            readings.refresh()
