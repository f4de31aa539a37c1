"""The close second look: which elements of an operation's output are bad, at which token, and who started it.

The first pass keeps one number an operation. Only when one is not finite or near a limit is the layer run
again (a forward is deterministic, so it does the same) with an ``Inspector`` that counts, finds the extreme
element, and asks of every operation whether what went *in* was finite: that tells an origin from what merely
passes a NaN on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen_precision.qwen3 import row_of
from qwen_precision.record import Event
from qwen_precision.watcher.aten import ELEMENTWISE, WITHIN_A_TOKEN
from qwen_precision.watcher.closeup import closeup
from qwen_precision.watcher.mode import Onlooker, Seen
from qwen_precision.watcher.readings import Spot


@dataclass(frozen=True)
class Located:
    """A close look at one operation."""

    path: str
    op: str
    call: int
    event: Event
    """As it goes into the record, but for the number of its site."""
    index: tuple[int, ...] = ()
    """Of the element that is named, in the output as the operation gave it."""
    infinite: bool = False
    """Whether all that is bad is infinite, and nothing NaN."""

    @property
    def spot(self) -> Spot:
        """Which operation it is."""
        return self.path, self.op, self.call

    def shifted(self, position: int, channel: int) -> "Located":
        """A place within a slice as a place in the whole."""
        event = self.event
        moved = {
            "position": None if event.position is None else event.position + position,
            "channel": None if event.channel is None else event.channel + channel,
        }
        return replace(self, event=event.model_copy(update=moved))


@dataclass
class Inspector(Onlooker):
    """Collects a ``Located`` for every operation that is not finite or comes near its format's limit.

    Args:
        valid: ``[batch, tokens]`` bool on the compute device, False at pad positions.
        ratio: locate a finite output too when its headroom is below this.
        weights: what ``storages`` gives; all tensors that lie elsewhere are activations.
        limit: in a pass that is finite, what a narrower dtype would not hold counts as not finite: magnitudes from
            here on.
        prefer: by operation, the elements to name before others that are as bad.
        strict: of an unknown family: where sizes allow two readings of an output's axes, none is taken.
        places: of an engine's batch, in which the tokens of all rows lie behind each other and ``valid`` is
            ``[1, tokens]``: each token's row, and its position in it.
    """

    valid: Tensor
    ratio: float
    weights: dict[int, int | None]
    limit: float | None = None
    prefer: Mapping[Spot, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    strict: bool = False
    places: Sequence[tuple[int, int]] | None = None
    found: list[Located] = field(default_factory=list)
    # Experts work on rows picked from the tokens: by index, and where they are fused, sorted by expert.
    _picked: Tensor | None = None
    _experts: Tensor | None = None
    # Where a Python loop runs one expert after the other: the one whose slice of the weights went in last.
    _expert: int | None = None
    _step: int = 0

    def __call__(self, seen: Seen) -> None:
        """Look at one operation."""
        self._step += 1
        self._note_slice(seen)
        out = seen.out
        bad = self.bad(out) if seen.keep is None else self.bad(out) & seen.keep
        failed = bool(bad.any())
        magnitude = out.abs() if seen.keep is None else torch.where(seen.keep, out, torch.zeros_like(out)).abs()
        near = self.limit is None and float(magnitude.max()) * self.ratio >= torch.finfo(out.dtype).max
        if not failed and not near:
            return
        own = bad & self._clean(seen)
        own = own if seen.spoiled is None else own & ~seen.spoiled
        clean = not failed or bool(own.any())
        hits = (own if clean else bad) if failed else magnitude == magnitude.max()
        fine = self._fine_weights(seen)
        # A bad weight is no excuse for what another one of the same tensor makes.
        parts = [(hits & fine, True), (hits & ~fine, False)] if failed and clean else [(hits, bool(fine.all()))]
        for part, clean_weights in parts:
            for mine in self._apart(part, seen) if failed and clean else [part]:
                infinite = failed and bool(torch.isinf(out[mine]).all())
                event, index = self._event(seen, mine, failed, clean)
                event = event.model_copy(update={"clean_weights": clean_weights})
                self.found.append(Located(seen.path, seen.op, seen.call, event, index, infinite))

    def _apart(self, hits: Tensor, seen: Seen) -> list[Tensor]:
        """Hits of each row of the batch, and of each expert, that has any: none must hide behind another."""
        rows, length = self.valid.shape
        layout, dims, device = self._layout(seen), seen.out.dim(), seen.out.device
        tokens = torch.arange(rows * length, device=device) if layout == "flat" else self._picked
        if not bool(hits.any()):
            return []
        if layout == "unknown" or (tokens is None and layout not in _REST):
            return [hits]
        numbers = torch.arange(rows, device=device) if layout in _REST or tokens is None else self._owners(tokens)
        if layout == "picked" and self._experts is not None and self._experts.shape == numbers.shape:
            numbers = numbers * (int(self._experts.max()) + 1) + self._experts
        some = torch.unique(numbers[hits.flatten(1).any(dim=1) if dims > 1 else hits])
        which = numbers.view(-1, *[1] * (dims - 1))
        return [hits & (which == number) for number in some]

    def _owners(self, tokens: Tensor) -> Tensor:
        """Row of each token, by its number in the flattened batch."""
        if self.places is None:
            return tokens // self.valid.shape[1]
        return torch.tensor([row for row, _ in self.places], device=tokens.device)[tokens]

    def _event(self, seen: Seen, hits: Tensor, failed: bool, clean: bool) -> tuple[Event, tuple[int, ...]]:
        """What is to be told of an operation whose elements ``hits`` are the ones that count; and the one it names."""
        out = seen.out
        infinite = failed and self.limit is None
        nan, count = int((torch.isnan(out) & hits).sum()), int(hits.sum()) if infinite else 0
        index, in_padding = self._extreme(_harmful(hits, seen), seen)
        row, position, channel, head, expert = self._place(index, seen)
        look = None
        if infinite and clean:
            inputs = [(arg, self._is_weight(arg)) for arg in _tensors(seen.args) if arg.is_floating_point()]
            look = closeup(inputs, out, seen.op, index, expert)
        extreme = float(out[tuple(index)].abs()) if out.dim() else float(out.abs())
        event = Event(
            site=0,
            step=self._step,
            nan=nan if infinite else 0,
            inf=count - nan if infinite else 0,
            elements=out.numel(),
            value=(math.nan if nan else math.inf) if infinite else extreme,
            clean_inputs=clean,
            clean_weights=True,
            row=row,
            position=position,
            channel=channel,
            head=head,
            expert=expert,
            in_padding=in_padding,
            harmless=None,
            closeup=look,
        )
        return event, tuple(index)

    def note_sort(self, values: Tensor) -> None:
        """Remember which expert each row goes to, where fused experts sort their rows."""
        self._experts = values

    def note_index(self, args: tuple[Any, ...]) -> None:
        """Remember which token each row is, where rows are picked from all tokens, and in which order they stand."""
        source, indices = args[0], args[1]
        self._note_order(source, indices)
        for axis, index in enumerate(indices):
            if index is not None and index.dim() == 1 and source.shape[axis] == self.valid.numel():
                self._picked = index
                return  # the routing weights' second axis may be as long

    def _note_order(self, source: Tensor, indices: Any) -> None:
        """Early transformers 5 picks rows in the order of the tokens, then brings both experts and rows into another.

        The numbers of the experts are the one list of integers that is reordered; rows are as wide as the model.
        """
        index = indices[0]
        if index is None or len(indices) != 1 or index.dim() != 1 or source.shape[0] != index.shape[0]:
            return
        rows = source.dim() == 2 and source.shape[1] > 1 and source.shape[0] != self.valid.numel()
        if source.dim() == 1 and not source.is_floating_point():
            self._experts = source[index]
        elif rows and self._picked is not None and self._picked.shape == index.shape:
            self._picked = self._picked[index]

    def _note_slice(self, seen: Seen) -> None:
        """Remember which expert is at work, where each has its own slice of a weight that holds all of them."""
        for arg in _tensors(seen.args):
            start = self.weights.get(arg.untyped_storage().data_ptr())
            if start is not None and arg.dim() == 2:
                self._expert = (arg.storage_offset() - start) // arg.numel()

    def bad(self, tensor: Tensor) -> Tensor:
        """What is not finite, or, with a limit, what the narrower dtype would not hold."""
        return ~torch.isfinite(tensor) if self.limit is None else ~(tensor.abs() < self.limit)

    def _clean(self, seen: Seen) -> Tensor:
        """Where all that went in was fine, broadcastable to the output: whatever is bad there began here.

        One token's NaN does not excuse another's overflow, where an operation stays within a token; of all others the
        leading index counts (a row of the batch, an expert's row). An input that is not split in the same way (a
        position table, a score of all) counts for all of them.
        """
        out, layout = seen.out, self._layout(seen)
        if seen.op in ELEMENTWISE and layout in _REST:
            reduce = partial(_over, shape=out.shape, axes=[axis for axis in _REST[layout] if axis < out.dim()])
        else:
            depth = min(out.dim(), 2 if seen.op in WITHIN_A_TOKEN and layout == "btx" else 1)
            reduce = partial(_split_alike, lead=out.shape[:depth], dims=out.dim(), strict=self.strict)
        clean = torch.ones([1] * out.dim(), dtype=torch.bool, device=out.device)
        for arg in _tensors(seen.args):
            if not arg.is_floating_point() or arg is out or self._is_weight(arg):
                continue
            # Infinities in a mask or in masked scores are intended.
            fine = ~self.bad(arg if seen.keep is None else _only(arg, seen.keep))
            if seen.masked is not None and arg is seen.args[0]:
                fine = fine | (seen.masked & (arg == -math.inf))  # what ends a mask: a row of nothing else begins here
            clean = clean & reduce(fine)
        return clean

    def _fine_weights(self, seen: Seen) -> Tensor:
        """Where the weights that went in were finite in this dtype, broadcastable to the output.

        Told apart by output channel, where each has its own; of fused experts, those that had any row count.
        """
        channels = seen.out.shape[-1] if seen.out.dim() else 1
        fine = torch.ones(1, dtype=torch.bool, device=seen.out.device)
        for arg in _tensors(seen.args):
            if not (arg.is_floating_point() and self._is_weight(arg)):
                continue
            hit = torch.unique(self._experts) if arg.dim() == 3 and self._experts is not None else None
            used = arg[hit] if hit is not None and int(hit.max()) < len(arg) else arg
            own = ~self.bad(used)
            if own.shape == (channels,):
                fine = fine & own
            elif seen.op == "linear" and own.dim() == 2 and channels in own.shape:
                transposed = own.shape[0] != channels or (own.shape[1] == channels and arg.stride(0) == 1)
                fine = fine & own.all(dim=0 if transposed else 1)
            else:
                fine = fine & own.all()
        return fine

    def _is_weight(self, arg: Tensor) -> bool:
        return arg.untyped_storage().data_ptr() in self.weights

    def _extreme(self, hits: Tensor, seen: Seen) -> tuple[list[int], bool]:
        """The hit to name, at a real token if there is one; and whether all are padding."""
        real = self._real(seen)
        if real is not None:
            at_tokens = hits & real
            if bool(at_tokens.any()):
                return self._named(at_tokens, seen), False
        return self._named(hits, seen), real is not None

    def _named(self, hits: Tensor, seen: Seen) -> list[int]:
        """Of hits, the preferred one; else the first, or the largest where all are finite."""
        for index in self.prefer.get((seen.path, seen.op, seen.call), ()):
            inside = len(index) == hits.dim() and all(k < n for k, n in zip(index, hits.shape, strict=True))
            if inside and bool(hits[index]):
                return list(index)
        if self.limit is not None:
            magnitude = seen.out.abs()
            hits = hits & (magnitude == magnitude[hits].max())
        return _first(hits)

    def _real(self, seen: Seen) -> Tensor | None:
        """Which entries belong to real tokens, broadcastable to the output; None where that cannot be told."""
        layout, dims = self._layout(seen), seen.out.dim()
        if layout == "btx":
            return self.valid.view(*self.valid.shape, *[1] * (dims - 2))
        if layout == "bhtx":
            return self.valid[:, None, :, None]
        flat = self.valid.flatten()
        if layout == "picked" and self._picked is not None:
            flat = flat[self._picked]
        elif layout != "flat":
            return None
        return flat.view(-1, *[1] * (dims - 1))

    def _token(self, index: list[int], layout: str) -> tuple[int, int] | None:
        """(row, position) of one element, from how the tensor it lies in is laid out."""
        length = self.valid.shape[1]
        if layout == "btx":
            return index[0], index[1]
        if layout == "bhtx":
            return index[0], index[2]
        if layout == "flat":
            return divmod(index[0], length) if self.places is None else self.places[index[0]]
        if layout == "picked" and self._picked is not None:
            return divmod(int(self._picked[index[0]]), length)
        return None

    def _layout(self, seen: Seen) -> str:
        """How rows and tokens lie in the output's axes."""
        shape, (rows, length) = tuple(seen.out.shape), self.valid.shape
        if self.places is not None:
            return "flat" if shape[:1] == (length,) else "unknown"
        if self.strict and _ambiguous(shape, rows, length):
            return "unknown"
        if len(shape) == 4 and shape[0] == rows:
            # [batch, heads, tokens, …] after the transpose, [batch, tokens, heads, …] in q_norm and k_norm.
            in_norm = seen.path.endswith("norm")
            if shape[2] == length and not (in_norm and shape[1] == length):
                return "bhtx"
        if len(shape) >= 2 and shape[:2] == (rows, length):
            return "btx"
        if len(shape) >= 1 and shape[0] == rows * length and ("experts" not in seen.path or seen.op in _ADD_UP):
            return "flat"
        if "experts" in seen.path and self._picked is not None and shape[:1] == self._picked.shape:
            return "picked"
        if len(shape) >= 1 and shape[0] == rows * length:
            return "flat"
        return "unknown"

    def _place(self, index: list[int], seen: Seen) -> tuple[int | None, int | None, int | None, int | None, int | None]:
        """(row, position, channel, head, expert) of one element."""
        channel = head = expert = None
        layout = self._layout(seen)
        row, position = self._token(index, layout) or (None, None)
        if len(index) > 1 and seen.out.shape[-1] > 1:
            channel = index[-1]
        if len(index) == 4 and layout in _REST:
            head = index[1] if layout == "bhtx" else index[2]
        if layout == "picked" and self._experts is not None and self._experts.shape == seen.out.shape[:1]:
            expert = int(self._experts[index[0]])
        elif layout == "picked" and self._expert is not None:
            expert = self._expert
        elif (parts := seen.path.split(".experts.")) and len(parts) == 2:
            number = parts[1].split(".")[0]
            expert = int(number) if number.isdigit() else None
        return row, position, channel, head, expert


def _ambiguous(shape: tuple[int, ...], rows: int, length: int) -> bool:
    """Whether an output's axes could be read in two ways: as many heads, or experts, as tokens."""
    if len(shape) == 4:
        return shape[0] == rows and shape[1] == shape[2] == length
    return len(shape) == 3 and shape[0] == rows * length and shape[:2] != (rows, length)


_REST = {"btx": [2, 3], "bhtx": [1, 3]}
"""By layout: the axes that are neither rows nor tokens."""


def _over(fine: Tensor, shape: torch.Size, axes: list[int]) -> Tensor:
    """An input of an elementwise operation, fine at all of ``axes``; broadcastable to the output of that shape."""
    try:
        whole = fine.expand(shape)
    except RuntimeError:
        return fine.all()
    return whole.all(dim=axes, keepdim=True) if axes else whole


def _harmful(hits: Tensor, seen: Seen) -> Tensor:
    """Of what goes into a softmax, that which is not -inf, if there is any: -inf beside it comes to nothing."""
    if row_of(seen.path, seen.op, seen.call).role not in ("scores", "router"):
        return hits
    high = hits & (seen.out != -math.inf)
    return high if bool(high.any()) else hits


def _split_alike(fine: Tensor, lead: torch.Size, dims: int, strict: bool) -> Tensor:
    """``fine`` reduced to the leading axes that it shares with an output of ``dims`` axes, broadcastable to it."""
    if strict and fine.dim() != dims:
        return fine.all()  # as many experts as tokens look the same
    for depth in range(min(len(lead), fine.dim()), 0, -1):
        if fine.shape[:depth] == lead[:depth]:
            alike = fine.flatten(depth).all(dim=-1) if fine.dim() > depth else fine
            return alike.view(*lead[:depth], *[1] * (dims - depth))
    return fine.all()


_READERS = ("softmax", "sigmoid", "topk")
"""What reads scores; each is monotonic in them."""

_ADD_UP = ("sum", "index_add_")
"""How experts become one output, a row a token again."""


def _tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (tuple, list)):
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def _first(hits: Tensor) -> list[int]:
    """Index of the first true element; in memory of one byte an element, however many are true."""
    flat = int(hits.contiguous().view(torch.uint8).flatten().argmax())
    index = []
    for extent in reversed(hits.shape):
        index.append(flat % extent)
        flat //= extent
    return index[::-1]


def _only(arg: Tensor, keep: Tensor) -> Tensor:
    try:
        return torch.where(keep, arg, torch.zeros((), dtype=arg.dtype, device=arg.device))
    except RuntimeError:
        return arg


def storages(module: nn.Module) -> dict[int, int | None]:
    """Where this module's weights lie right now; a view of a weight (one expert's part) lies there too.

    By data pointer: where in the storage the weight begins if it holds all experts (three axes), else None.
    """
    return {
        tensor.untyped_storage().data_ptr(): int(tensor.storage_offset()) if tensor.dim() == 3 else None
        for part in module.modules()
        for tensor in part._parameters.values()
        if tensor is not None and tensor.device.type != "meta"
    }


@dataclass
class Clamp(Onlooker):
    """Puts the largest finite number in place of every infinity that one operation gives, and keeps what reads it.

    Args:
        wanted: the operation.
        clamp: whether to replace anything; what is a mask stays in any case.
    """

    wanted: Spot
    clamp: bool
    read: Tensor | None = None
    """What the first reader of the scores (softmax, sigmoid, top-k) in the same module gave."""
    _met: bool = False

    def __call__(self, seen: Seen) -> None:
        """Write into the fresh output of one operation, before anything reads it; keep that of the next reader."""
        if (seen.path, seen.op, seen.call) == self.wanted:
            self._met = True
            if self.clamp:
                bad = torch.isinf(seen.out) if seen.keep is None else torch.isinf(seen.out) & seen.keep
                seen.out.copy_(torch.where(bad, torch.nan_to_num(seen.out), seen.out))
        elif self._met and self.read is None and seen.path == self.wanted[0] and seen.op in _READERS:
            self.read = seen.out.clone()
