"""A pretend accelerator: a device named cuda or mps on a torch that has neither, so that its code runs without a card.

Its tensors are real torch tensors with real storages, pointers and views, whose device says cuda:0. Their memory is the
host's, so each operation is run by the CPU's kernel on a CPU tensor that lies in the same place: the numbers are the
CPU's, bit for bit. What it is for: tensors of two devices in one operation raise as they do on a card, float64 raises
where the device is Apple's, and each time the host would have to wait for the device is written down with the line.

How it is made: ``from_dlpack`` makes a tensor of any device around any pointer. A boxed fallback for the device's
dispatch key gets every operation that is not composite. Operations that only look at memory otherwise (view, set_) go
to the CPU's kernels, which touch no number. The device guard is the one that torch lets Python write for PrivateUse1:
its slot in c10's registry is copied to that of the device. All of this is private to torch, and tried with 2.13.

    pytest --pretend cuda -m device          # a process has one kind of device, made before anything asks for it
"""

import contextlib
import ctypes
import os
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

COUNT = 2
"""Cards of a pretend machine with CUDA."""
TOTAL = 16 << 30
"""Bytes of a card."""

# -- a tensor of any device around any pointer --------------------------------------------------------------------


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor and DLManagedTensor of dlpack.h, in one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CODES = {
    torch.float64: (2, 64),
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.int32: (0, 32),
    torch.int16: (0, 16),
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
    torch.complex64: (5, 64),
}
_DLPACK = {"cpu": 1, "cuda": 2, "mps": 8}

_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free = ctypes.cast(_libc.free, ctypes.c_void_p).value


def _around(tensor: Tensor, kind: str, index: int) -> Tensor:
    """A tensor of ``kind:index`` in the memory of another, which somebody else keeps alive.

    The header is one block of malloc and its deleter is free itself: no Python runs when a storage goes.
    """
    dims = tensor.dim()
    block = _libc.malloc(ctypes.sizeof(_Tensor) + 16 * max(dims, 1))
    start = block + ctypes.sizeof(_Tensor)
    row = (ctypes.c_int64 * (2 * max(dims, 1))).from_address(start)
    row[:dims], row[dims : 2 * dims] = list(tensor.shape), list(tensor.stride())
    header = _Tensor.from_address(block)
    header.data, header.device, header.ndim = tensor.data_ptr(), _Device(_DLPACK[kind], index), dims
    header.dtype = _DType(*_CODES[tensor.dtype], 1)
    header.shape, header.strides, header.byte_offset = start, start + 8 * dims, 0
    header.context, header.deleter = None, _free
    return torch._C._from_dlpack(_capsule(block, b"dltensor", None))  # type: ignore[attr-defined]


# -- how much memory is held; a limit raises as CUDA does ----------------------------------------------------------


@dataclass
class Memory:
    """By card: bytes used, the most there were, and what a caching allocator would not have given back."""

    total: int = TOTAL
    held: dict[int, tuple[StorageWeakRef, Tensor, int, int]] = field(default_factory=dict)
    """By address of the storage: a weak reference to it, the CPU tensor whose memory it is, its size, its card."""
    used: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    reserved: Counter[int] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.RLock)

    def take(self, made: Tensor, host: Tensor, index: int) -> None:
        size = -(-max(host.untyped_storage().nbytes(), 1) // 512) * 512
        with self.lock:
            if len(self.held) % 64 == 0 or self.used[index] + size > self.total:
                self.sweep()
            now = self.used[index] + size
            if now > self.total:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB.")
            self.used[index] = now
            self.peak[index] = max(self.peak[index], now)
            self.reserved[index] = max(self.reserved[index], now)
            ref = StorageWeakRef(made.untyped_storage())
            self.held[ref.cdata] = ref, host, size, index

    def sweep(self) -> None:
        """Give back the memory of storages that are gone."""
        with self.lock:
            for key, (ref, _, size, index) in list(self.held.items()):
                if ref.expired():
                    del self.held[key]
                    self.used[index] -= size

    def empty_cache(self) -> None:
        self.sweep()
        self.reserved.update({index: self.used[index] - held for index, held in self.reserved.items()})

    def free(self, index: int) -> tuple[int, int]:
        """As ``torch.cuda.mem_get_info`` gives it: what the allocator keeps is not free."""
        self.sweep()
        return self.total - self.reserved[index], self.total

    def reset(self, total: int = TOTAL) -> None:
        self.total = total
        self.empty_cache()
        self.peak.update({index: self.used[index] - peak for index, peak in self.peak.items()})


memory = Memory()


# -- when the host would wait --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """Once: ``to host``, a copy or a number; or ``to device``, a copy from memory that is not pinned."""

    direction: str
    op: str
    place: str
    """The innermost line of ours, ``probe/shadow.py:120 _compare``; empty where there is none."""


waits: list[Wait] = []
_OURS = os.sep + "qwen_precision" + os.sep


def _wait(direction: str, op: str) -> None:
    frame, place = sys._getframe(1), ""
    while frame is not None and not place:  # type: ignore[redundant-expr]
        code = frame.f_code
        if _OURS in code.co_filename:
            place = f"{code.co_filename.rpartition(_OURS)[2]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    waits.append(Wait(direction, op, place))


@contextlib.contextmanager
def counting() -> Iterator[list[Wait]]:
    """The waits of a block, when it has ended."""
    start, found = len(waits), list[Wait]()
    yield found
    found.extend(waits[start:])


# -- operations ----------------------------------------------------------------------------------------------------

_kind = "cuda"
_TAKES_A_NUMBER = frozenset(
    "add sub mul div rsub add_ sub_ mul_ div_ eq ne lt le gt ge where masked_fill masked_fill_ clamp clamp_ clamp_min "
    "clamp_max maximum minimum pow fmod remainder bitwise_and bitwise_or bitwise_xor logical_and logical_or copysign "
    "atan2 true_divide floor_divide lerp addcmul index_put index_put_ _index_put_impl_ fill_ nextafter".split()
)
"""A tensor of the host without dimensions is a number to these, as on CUDA."""
_NEEDS_THE_ANSWER = frozenset(
    "_local_scalar_dense nonzero _unique2 unique_dim unique_consecutive masked_select equal is_nonzero bincount".split()
)
_INDEXED = frozenset("index index_put index_put_ _index_put_impl_".split())
_RANDOM = frozenset(
    "multinomial bernoulli_ bernoulli exponential_ normal_ uniform_ random_ randperm rand randn randint normal".split()
)
_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)  # type: ignore[attr-defined]
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # type: ignore[attr-defined]


def _on_host() -> Any:
    """Without the modes of Python that stand around: what happens inside an operation is no operation of theirs."""
    return torch._C._ExcludeDispatchKeyGuard(_PYTHON)  # type: ignore[attr-defined]


def _is_ours(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == _kind


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Over tuples, lists and dicts, which is all that an operation takes or gives."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(function, each) for each in value)
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in value.items()}
    return function(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _adopted(host: Tensor, index: int) -> Tensor:
    """A tensor of the device in the memory of a CPU tensor that nobody else has."""
    if host.dtype == torch.float64 and _kind == "mps":
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    made = _around(host, _kind, index)
    if host.numel():
        memory.take(made, host, index)
    return made


def _as_host(tensor: Tensor) -> Tensor:
    """The same memory as a CPU tensor."""
    if not tensor.numel():
        return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)
    return _around(tensor, "cpu", 0)


def _index_of(device: Any) -> int:
    return (torch.device(device).index or 0) if device is not None else 0


def _one_device(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that all tensors are on.

    Raises:
        RuntimeError: they are on two, as on a card.
    """
    indices = {id(each) for each in args[1] if each is not None} if name in _INDEXED else set()
    if indices and args[0].device.type == "cpu":
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
    device = next((each.device for each in tensors if _is_ours(each)), None)
    for each in tensors:
        passes = id(each) in indices or each.device.type == "meta" or (not each.dim() and name in _TAKES_A_NUMBER)
        if each.device != device and (_is_ours(each) or not passes):
            found = f"{device} and {each.device}"
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, {found}! ({name})"
            )
    return device


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operation that is not composite and has no kernel of its own here: the CPU's, on the same memory."""
    name = op.overloadpacket.__name__.removesuffix("_out")
    device = _one_device(name, args, kwargs)
    index = device.index or 0 if device is not None else _index_of(kwargs.get("device"))
    _note(name, args, kwargs)
    lent: dict[int, tuple[Tensor, Tensor]] = {}
    stream = getattr(Stream.entered, "stream", None)
    if stream is not None:
        stream.catch_up()

    def host(value: Any) -> Any:
        if _is_ours(value):
            return lent.setdefault(id(value), (value, _as_host(value)))[1]
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == _kind else value

    with _on_host():
        called, named = _mapped(host, args), _mapped(host, kwargs)
        result = _run(op, name, called, named, index)
        for value, alias in lent.values():
            if alias.shape != value.shape or (value.numel() and alias.data_ptr() != value.data_ptr()):
                fresh = _adopted(alias, index)  # an output that was given another size
                value.set_(fresh.untyped_storage(), 0, fresh.shape, fresh.stride())  # type: ignore[call-overload]
        return _mapped(lambda value: _given_back(op, value, lent, index), result)


def _run(op: Any, name: str, args: Any, kwargs: Any, index: int) -> Any:
    """By the CPU's kernel, but for what only cards can."""
    args = tuple(_as_tensor(each, argument, args) for each, argument in zip(args, op._schema.arguments, strict=False))
    if name in _RANDOM and any(argument.name == "generator" for argument in op._schema.arguments):
        kwargs.setdefault("generator", dice(index))
    if name in ("_softmax", "_log_softmax") and args[2]:  # half to float in one
        args = (args[0].float(), args[1], False, *args[3:])
    if name == "histc" and not args[0].is_floating_point():
        return op(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return op(*args, **kwargs)


def _as_tensor(value: Any, argument: Any, args: Any) -> Any:
    """torch hands a number that stands for a tensor to Python as the number that it was."""
    if not isinstance(value, (bool, int, float)) or str(argument.type) != "Tensor":
        return value
    like = next((each.dtype for each in args if isinstance(each, Tensor)), None)
    made = torch.tensor(value)
    return made.to(like) if like is not None and like.is_floating_point else made


def _given_back(op: Any, value: Any, lent: dict[int, tuple[Tensor, Tensor]], index: int) -> Any:
    """A result as a tensor of the device: one that was given, a view of one, or a new one."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    for ours, alias in lent.values():
        if alias is value:
            return ours
    for ours, alias in lent.values():
        if value.numel() and alias.numel() and alias.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            if value.dtype != ours.dtype:
                raise NotImplementedError(f"pretend: {op} gives a view in another dtype")
            offset = ours.storage_offset() + (value.data_ptr() - ours.data_ptr()) // value.element_size()
            return torch.ops.aten.as_strided.default.redispatch(
                _CPU, ours, tuple(value.shape), tuple(value.stride()), offset
            )
    return _adopted(value, index)


def _note(name: str, args: Any, kwargs: Any) -> None:
    """Write down why the host would wait, if it would."""
    filled = name in ("masked_fill", "masked_fill_") and _is_ours(args[2])
    repeated = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in _NEEDS_THE_ANSWER or filled or repeated:
        _wait("to host", name)
    elif name in _INDEXED:
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        number = name != "index" and args[2].numel() == 1 and len(masks) == 1 == len(args[1])
        for _ in [] if number else masks:
            _wait("to host", f"{name} by a mask")
        for each in args[1]:
            if each is not None and not _is_ours(each):
                _wait("to device", f"{name}, index on the host")
    elif name == "where":
        for each in args[:3]:
            if isinstance(each, Tensor) and not _is_ours(each):
                _wait("to device", "where, number on the host")


def _copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if not self.numel():
        return self
    if _is_ours(src) and not _is_ours(self):
        _wait("to host", "copy")
    elif not _is_ours(src) and not (non_blocking and src.is_pinned()):
        _wait("to device", "copy")
    with _on_host():
        target = _as_host(self) if _is_ours(self) else self
        stream = getattr(Stream.entered, "stream", None)
        if stream is not None and non_blocking and not _is_ours(src) and src.is_pinned():
            stream.copy_later(target, src)
            return self
        target.copy_(_as_host(src) if _is_ours(src) else src)
    return self


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    with _on_host():
        return _adopted(torch.empty(tuple(size), dtype=dtype), _index_of(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    with _on_host():
        return _adopted(torch.empty_strided(tuple(size), tuple(stride), dtype=dtype), _index_of(device))


# -- torch.cuda and torch.mps ---------------------------------------------------------------------------------------

_current = [0]
_kept: list[Any] = []
_generators: dict[int, torch.Generator] = {}


def dice(index: int) -> torch.Generator:
    """The random numbers of a card: the CPU's, for the same seed."""
    if index not in _generators:
        _generators[index] = torch.Generator()
        _generators[index].manual_seed(0)
    return _generators[index]


class Stream:
    """Everything has happened when a call returns, but copies from pinned memory: those when they are waited for, or
    when something is done after them on the same stream."""

    entered = threading.local()

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device_index = _index_of(device) if device is not None else _current[0]
        self._late: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "Stream":
        self.entered.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self.entered.stream = None

    def copy_later(self, target: Tensor, source: Tensor) -> None:
        """Until then what is read there is garbage."""
        target.fill_(float("nan"))
        self._late.append((target, source))

    def synchronize(self) -> None:
        _wait("to host", "stream.synchronize")
        self.catch_up()

    def catch_up(self) -> None:
        late, self._late = self._late, []
        with _on_host():
            for target, source in late:
                target.copy_(source)

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass


class Event:
    """A time."""

    device: int | None = None
    at = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        self.at, self.device = time.perf_counter(), getattr(stream, "device_index", _current[0])

    def synchronize(self) -> None:
        _wait("to host", "event.synchronize")

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        if self.device != other.device:
            raise ValueError("events of two cards")
        return (other.at - self.at) * 1e3


@contextlib.contextmanager
def _current_device(device: Any) -> Iterator[None]:
    before, _current[0] = _current[0], _index_of(device)
    try:
        yield
    finally:
        _current[0] = before


def _seeded(value: int) -> None:
    for index in range(COUNT):
        dice(index).manual_seed(int(value))


def install(kind: str) -> None:
    """Make the device ``cuda`` (two of them) or ``mps``, once in a process, before anything has asked for it."""
    global _kind
    _kind = kind
    _borrow_guard(kind)
    aten = torch.ops.aten
    library, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _kept.extend([library, rest])
    kernels: dict[str, Any] = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "copy_": _copy_}
    for op in (
        *(aten.as_strided.default, aten.view.default, aten._reshape_alias.default, aten.view_as_real.default),
        *(aten.set_.source_Storage, aten.set_.source_Storage_storage_offset, aten.set_.source_Tensor),
        *(aten.unfold.default, aten.view.dtype),
    ):
        kernels[op.name().removeprefix("aten::")] = _by(op)
    # Composite operations that are one kernel on the CPU: run whole they give the same bits.
    for op in (aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default):
        kernels[op.name().removeprefix("aten::")] = _whole(op)
    for name, kernel in kernels.items():
        library.impl(name, kernel, kind.upper())
    rest.fallback(_fallback, kind.upper())
    (_pretend_cuda if kind == "cuda" else _pretend_mps)()


def _by(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: op.redispatch(_CPU, *args, **kwargs)


def _whole(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _fallback(op, *args, **kwargs)


def _pretend_cuda() -> None:
    properties = types.SimpleNamespace(name="Pretend", major=9, minor=0, total_memory=TOTAL, multi_processor_count=132)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: _current[0],
        "set_device": lambda device: _current.__setitem__(0, _index_of(device)),
        "device": _current_device,
        "mem_get_info": lambda device=None: memory.free(_index_of(device) if device is not None else _current[0]),
        "get_device_name": lambda device=None: "Pretend",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "empty_cache": memory.empty_cache,
        "synchronize": lambda device=None: _wait("to host", "synchronize"),
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "get_rng_state": lambda device="cuda": dice(_index_of(device)).get_state(),
        "set_rng_state": lambda state, device="cuda": dice(_index_of(device)).set_state(state),
        "manual_seed": _seeded,
        "manual_seed_all": _seeded,
        "is_bf16_supported": lambda *_: True,
        "_is_in_bad_fork": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: (memory.sweep(), memory.used[_index_of(device)])[1],
        "memory_reserved": lambda device=None: memory.reserved[_index_of(device)],
        "max_memory_allocated": lambda device=None: memory.peak[_index_of(device)],
        "reset_peak_memory_stats": lambda device=None: memory.reset(),
    }.items():
        setattr(torch.cuda, name, value)
    for name, value in {
        "pin_memory": _pinned,
        "is_pinned": lambda tensor, device=None: getattr(tensor, "pinned", False),
        "record_stream": lambda tensor, stream: None,
    }.items():
        setattr(torch.Tensor, name, value)


def _pinned(tensor: Tensor, device: Any = None) -> Tensor:
    """A copy on the host that says so."""
    if _is_ours(tensor):
        raise RuntimeError(f"cannot pin a tensor on {tensor.device}")
    made = tensor.clone()
    made.pinned = True  # type: ignore[attr-defined]
    return made


def _pretend_mps() -> None:
    torch.backends.mps.is_available = lambda: True
    torch.backends.mps.is_built = lambda: True
    torch.Event = Event  # type: ignore[misc, assignment]
    for name, value in {
        "get_rng_state": lambda: dice(0).get_state(),
        "set_rng_state": lambda state: dice(0).set_state(state),
        "manual_seed": _seeded,
        "synchronize": lambda: _wait("to host", "synchronize"),
        "empty_cache": memory.empty_cache,
        "_is_in_bad_fork": lambda: False,
    }.items():
        setattr(torch.mps, name, value)


def _borrow_guard(kind: str) -> None:
    """Have the guard that Python may write for PrivateUse1 say another type, and copy its slot in c10's registry."""
    found = torch._C._autograd.DeviceType
    number = {"cuda": 1, "mps": 13, "privateuseone": 20}  # c10/core/DeviceType.h

    class Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
        def type_(self) -> Any:
            return {"cuda": found.CUDA, "mps": found.MPS}[kind]

    guard = Guard()
    _kept.append(guard)
    library = Path(torch.__file__).parent / "lib" / ("libc10.dylib" if sys.platform == "darwin" else "libc10.so")
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    slots = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(library)), registry)
    if slots[number[kind]]:
        raise RuntimeError(f"this torch has a real {kind}: nothing to pretend")
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    slots[number[kind]] = slots[number["privateuseone"]]


def devices() -> list[str]:
    """What there is, pretended or real; the last card first: what was put on cuda:0 by mistake shows there."""
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in reversed(range(min(2, torch.cuda.device_count())))]
    return ["mps"] if torch.backends.mps.is_available() else []
