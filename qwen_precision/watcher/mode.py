"""The dispatch mode that watches every operation of a model's forward: how large it was, and where it ran.

The idea: module hooks tell *where* (the path of the module whose forward is running), a dispatch mode sees
*what* (each operation and its output), so residual adds, products and the insides of norms are seen as well
as module outputs, for any architecture. One fused ``aminmax`` looks at a tensor; it carries NaN and infinity
through. Its two results stay on the device until somebody asks; nothing else is kept, no tensor outlives its
operation. Watched and unwatched outputs are bit-identical: the mode runs the very operation it was given.

Intended extremes are not readings. A tensor that was filled, whole or in part, with the dtype's minimum or an
infinity is an additive mask; scores that one was added to are judged on their unmasked entries.

What it does not see: values inside a fused kernel (the scores of ``scaled_dot_product_attention``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qwen_precision.watcher.aten import OUTPUTS, Kind, Rule, rule_for
from qwen_precision.watcher.masks import FLOATS, Masks
from qwen_precision.watcher.readings import Aside, Raw, Reading, Slots

_READ, _MOVE = Kind.READ, Kind.MOVE  # looked up for every operation


@dataclass(frozen=True)
class Seen:
    """One operation as an inspector sees it, before its output is let go."""

    path: str
    op: str
    call: int
    args: tuple[Any, ...]
    out: Tensor
    keep: Tensor | None
    """Entries that are not masked on purpose (broadcastable bool), or None for all."""
    spoiled: Tensor | None = None
    """Of an operation in place: where the tensor it writes into was bad before."""
    masked: Tensor | None = None
    """Where the first operand is extreme on purpose (broadcastable bool), or None where it is nowhere."""


class Onlooker(ABC):
    """Takes a close second look at operations while they run."""

    @abstractmethod
    def __call__(self, seen: Seen) -> None:
        """Look at one operation."""

    def bad(self, tensor: Tensor) -> Tensor:
        """What of a tensor counts as not finite; bool, of its shape."""
        return ~torch.isfinite(tensor)

    def note_sort(self, values: Tensor) -> None:  # noqa: B027  # most do not ask
        """See the result of a sort: fused experts order their rows by expert."""

    def note_index(self, args: tuple[Any, ...]) -> None:  # noqa: B027
        """See an indexing: experts pick their rows from the tokens by one."""


_RULES: dict[Any, Rule] = {}


def _rule_for(func: Any) -> Rule:
    rule = _RULES[func] = rule_for(func)
    return rule


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """The dispatch mode and the path stack; use through ``watch`` (``block.py``) or ``attached``.

    ``inspect``, where it is set, is called on every watched output after its reading was taken.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every dispatch to keep torch.compile out of it, which costs more than the reading.
        # Nothing is compiled inside: each operation is run as it came.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path = ""
        self.inspect: Onlooker | None = None
        self.slots = Slots()
        self._stack: list[str] = []
        self._calls: dict[tuple[str, str], int] = {}
        # The output read last, and its slot: a cast or a square of it need not be read. It is held until the
        # next reading, so its memory cannot become another tensor's meanwhile.
        self._last: Tensor | None = None
        self._last_slot = 0
        self.masks = Masks()
        self._spoiled: Tensor | None = None

    # -- where: the path of the running module -------------------------------------------------------------

    def enter_module(self, path: str) -> None:
        """Enter the forward of the module at ``path``."""
        self._stack.append(self.path)
        self.path = path

    def enter_call(self, path: str, kwargs: dict[str, Any]) -> None:
        """Enter a layer that is run by its forward, past its own hooks, and declare the additive masks it is given."""
        self.enter_module(path)
        for value in kwargs.values():
            if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
                self.masks.mark(value)

    def leave_module(self) -> None:
        """Leave it again."""
        if self._stack:
            self.path = self._stack.pop()

    @property
    def inside(self) -> bool:
        """Whether the forward of a module is running."""
        return bool(self._stack)

    def forget(self) -> None:
        """Drop what is known of memory and masks; call between forwards."""
        self._last = None
        self.masks.clear()
        self._calls.clear()
        self._stack.clear()
        self.path = ""

    def take(self) -> list[Reading]:
        """The readings since the last call, in order: one transfer per dtype and device."""
        self.forget()
        return self.slots.take()

    def set_aside(self) -> Aside:
        """The same, not brought to the host yet."""
        self.forget()
        return self.slots.set_aside()

    def so_far(self) -> Raw:
        """What was read since the last call; a forward that is under way goes on as if nobody had asked."""
        self._last = None  # its slot is about to go
        with unwatched():
            return self.slots.bring()

    # -- what: every operation -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is and take the reading of what it gave."""
        rule = _RULES.get(func) or _rule_for(func)
        if rule.writes and rule.kind is _READ:
            return self._run_and_read_written(func, rule, args, kwargs)
        if self.inspect is not None:
            self._spoiled = self._bad_before(args[0]) if rule.mutates else None
        out = self.run(func, args, kwargs)
        if (rule.may_mask or self.masks) and self._read_masked(func, rule, args, kwargs, out):
            return out
        kind = rule.kind
        if args and out is args[0] and not rule.mutates:
            return out  # a type_as of what has that type: nothing was done
        if kind is _READ:
            if type(out) is Tensor:
                self._read(rule, args, out, None)
            else:
                self._read_first(rule, args, out)
        elif kind is _MOVE:
            if self.inspect is not None and rule.op == "index":
                self.inspect.note_index(args)
        elif kind is Kind.EXACT:
            self._read_exact(rule, args, out)
        elif kind is Kind.SORT and self.inspect is not None:
            self.inspect.note_sort(out[0])
        if rule.mutates:
            self._last = None  # what was read last may just have been written over, through whatever view
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """The operation itself, as it came."""
        return func(*args, **kwargs) if kwargs else func(*args)

    def _bad_before(self, target: Any) -> Tensor | None:
        """Where a tensor that is about to be written over is bad already."""
        if self.inspect is None or not isinstance(target, Tensor) or not target.is_floating_point():
            return None
        return self.inspect.bad(target)

    def _read(self, rule: Rule, args: tuple[Any, ...], out: Tensor, keep: Tensor | None) -> None:
        """Take the reading of one output, of its entries in ``keep`` if that is given."""
        if out.dtype not in FLOATS or not out.numel():
            return
        flat = out
        if keep is not None:
            flat = torch.where(keep, out, torch.zeros((), dtype=out.dtype, device=out.device))
        elif not out.is_contiguous() and out.dim() == 4:
            # [batch, heads, tokens, dim] lies in memory as [batch, tokens, heads, dim]: look at it that way,
            # because looking across the grain costs three times as much.
            swapped = out.transpose(1, 2)
            flat = swapped if swapped.is_contiguous() else out
        self._last_slot = self.slots.read(self.path, rule.op, flat)
        self._last = out
        if self.inspect is not None:
            self._inspect(rule, args, out, keep)

    def _read_first(self, rule: Rule, args: tuple[Any, ...], out: Any) -> None:
        """Of several outputs the first is the result; the others (log-sum-exp, seeds, indices) are bookkeeping."""
        items = out if isinstance(out, (tuple, list)) else (out,)
        first = next((item for item in items if isinstance(item, Tensor)), None)
        if first is not None:
            self._read(rule, args, first, None)

    def _run_and_read_written(
        self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> None:
        """An engine's kernel gives nothing and writes into what it was given: that is its output, and no input.

        What is read before it is written over (a fused add and norm) may reach every channel of its token in all of
        them; where it is only an output, by its name, what lies there before is nobody's.
        """
        named = [(name, each) for name, each in rule.written(func, args, kwargs) if isinstance(each, Tensor)]
        written = [each for _, each in named]
        bad = [None if name in OUTPUTS else self._bad_before(each) for name, each in named]
        rows = [each.any(dim=-1, keepdim=True) for each in bad if each is not None and each.dim()]
        spoiled = [_any_of(each, rows) for each in bad]
        self.run(func, args, kwargs)
        given = (*args, *(kwargs or {}).values())
        inputs = tuple(each for each in given if not any(each is one for one in written))
        for each, before in zip(written, spoiled, strict=True):
            self._spoiled = before
            self._read(rule, inputs, each, None)
        self._last = None

    def _read_exact(self, rule: Rule, args: tuple[Any, ...], out: Tensor) -> None:
        """A cast or a power: derived where it is of the output read last, else read."""
        source, last = args[0], self._last
        if out is source:
            return  # a cast to the dtype it has already
        if (
            last is not None
            and isinstance(source, Tensor)
            and source.data_ptr() == last.data_ptr()
            and source.numel() == last.numel()
            and source.dtype == last.dtype
            and out.dtype in FLOATS
            and (rule.op == "cast" or args[1] == 2)
        ):
            self._last_slot = self.slots.derive(self.path, rule.op, self._last_slot, out.dtype)
            self._last = out
            if self.inspect is not None:
                self._inspect(rule, args, out, None)
        else:
            self._read(rule, args, out, None)

    def _inspect(self, rule: Rule, args: tuple[Any, ...], out: Tensor, keep: Tensor | None) -> None:
        call = self._calls.get((self.path, rule.op), 0)
        self._calls[self.path, rule.op] = call + 1
        assert self.inspect is not None
        masked = self.masks.of(args[0]) if args else None
        self.inspect(Seen(self.path, rule.op, call, args, out, keep, self._spoiled, masked))

    def _read_masked(
        self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any
    ) -> bool:
        """Whether an argument is a mask or masked and so is ``out``; then it has been read where unmasked."""
        keep = self.masks.after(func, rule, args, kwargs, out)
        if keep is None:
            return False
        if rule.kind is Kind.READ or (rule.kind is Kind.EXACT and out is not args[0]):
            self._read(rule, args, out, keep)
        if rule.mutates:
            self._last = None
        return True


def _any_of(bad: Tensor | None, rows: list[Tensor]) -> Tensor | None:
    """Where a tensor or the same token of another was bad; None for what nobody reads."""
    if bad is None:
        return None
    for each in rows:
        if each.shape[:-1] == bad.shape[:-1]:
            bad = bad | each
    return bad


def unwatched() -> AbstractContextManager[Any]:
    """In it, what is done to bring numbers or to spell them out is not measured too."""
    made: AbstractContextManager[Any] = _disable_current_modes()
    return made


Hook = Callable[..., None]


@contextmanager
def attached(model: nn.Module, watcher: Watcher, around: Callable[[Hook], Hook] = lambda hook: hook) -> Iterator[None]:
    """Hook every submodule of ``model`` for its path; unhook on the way out, whatever happened.

    The second hook runs even when a forward raises (``always_call``), so that the stack stays true. A module that
    several others share (an engine's rotary embedding) runs under the one that calls it. ``around`` is put around
    each hook.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        watcher.leave_module()

    handles = []
    try:
        for module, paths in names.items():
            handles.append(module.register_forward_pre_hook(around(_entering(watcher, paths))))
            handles.append(module.register_forward_hook(around(leave), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        watcher.forget()


def _entering(watcher: Watcher, names: list[str]) -> Callable[[nn.Module, Any], None]:
    first, shared = names[0], len(names) > 1

    def enter(module: nn.Module, args: Any) -> None:
        if not watcher.inside:
            watcher.slots.begin()
        watcher.enter_module(_under(watcher.path, names) if shared else first)

    return enter


def _under(path: str, names: list[str]) -> str:
    """Of a shared module's paths the one in the module that runs; the first if there is none."""
    inside = f"{path}." if path else ""
    return next((each for each in names if each.startswith(inside)), names[0])
